"""Downloads from a local server that speaks the hub's protocol and misbehaves on request."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dev.fake_hub import COMMIT, Hub
from nanochat import hub
from nanochat.common import UserError
from nanochat.dataset import CLIMBMIX_REPO, main as dataset_main, write_parquet

CONTENT = bytes(range(256)) * 2000


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    server.files["/file.bin"] = CONTENT
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    yield server
    server.server.shutdown()


@pytest.mark.parametrize("faults", [[], [503, 503], [None, "drop"], [None, "wrong"], [429, None, "drop", None, "drop"]])
def test_download_recovers(server, tmp_path, faults):
    server.faults = list(faults)
    path = hub.download(server.url + "/file.bin", tmp_path / "sub" / "file.bin")
    assert path.read_bytes() == CONTENT and not list(tmp_path.rglob("*.partial"))
    assert server.requests[0][1]["Authorization"] == "Bearer secret"
    if "drop" in faults:  # resumed, not begun again
        assert any("Range" in headers for _, headers in server.requests)
    count = len(server.requests)
    hub.download(server.url + "/file.bin", path)
    assert len(server.requests) == count  # it is here: nobody is asked


def test_download_gives_up_with_one_line_and_no_bad_file(server, tmp_path):
    server.faults = [503] * 50
    with pytest.raises(hub.DownloadError, match="HTTP 503"):
        hub.download(server.url + "/file.bin", tmp_path / "a")
    server.faults = [None, "wrong"] * 50
    with pytest.raises(hub.DownloadError, match="wrong content"):
        hub.download(server.url + "/file.bin", tmp_path / "b")
    server.faults = []
    with pytest.raises(hub.DownloadError, match="HTTP 404"):
        hub.download(server.url + "/nothing", tmp_path / "c")
    with pytest.raises(hub.DownloadError, match="wrong content"):
        hub.download(server.url + "/file.bin", tmp_path / "d", sha256="0" * 64)
    assert not any((tmp_path / name).exists() for name in "abcd")


def test_a_drip_is_broken_off_and_resumed(server, tmp_path, monkeypatch):
    """A server that sends a byte now and then would take days: the connection is given up and made anew."""
    monkeypatch.setattr(hub, "SLOW_WINDOW_S", 0.3)
    server.faults = [None, "drip"]
    assert hub.download(server.url + "/file.bin", tmp_path / "a").read_bytes() == CONTENT
    assert any("Range" in headers for _, headers in server.requests)


def test_progress_is_not_given_up(server, tmp_path, monkeypatch):
    """More broken connections than tries: each brought something, so the download goes on to its end."""
    monkeypatch.setattr(hub, "PROGRESS_BYTES", 1000)
    server.faults = [None, "drop"] * 8
    assert hub.download(server.url + "/file.bin", tmp_path / "a").read_bytes() == CONTENT


def test_interrupted_download_goes_on(server, tmp_path):
    (tmp_path / "file.bin.partial").write_bytes(CONTENT[:1000])
    assert hub.download(server.url + "/file.bin", tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests[0][1]["Range"] == "bytes=1000-"


def test_many_ask_one_fetches(server, tmp_path):
    threads = [threading.Thread(target=hub.download, args=(server.url + "/file.bin", tmp_path / "x")) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (tmp_path / "x").read_bytes() == CONTENT and len(server.requests) == 2  # the redirect and the file


def test_offline_asks_nobody(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        hub.download(server.url + "/file.bin", tmp_path / "a")
    assert not hub.is_reachable() and not server.requests


def test_climbmix_shards(server, tmp_path, monkeypatch):
    """The wanted shards and the validation shard come from the hub's address, once."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    write_parquet(tmp_path / "shard.parquet", ["some text"])
    for index in (0, 1, 6542):
        server.files[f"/datasets/{CLIMBMIX_REPO}/resolve/main/shard_{index:05d}.parquet"] = \
            (tmp_path / "shard.parquet").read_bytes()
    assert dataset_main(["-n", "2"]) == {"corpus": "ClimbMix", "train": 2, "val": 1}
    count = len(server.requests)
    dataset_main(["--auto", "-n", "2"])
    assert len(server.requests) == count
    with pytest.raises(UserError, match="shard_00002"):
        dataset_main(["-n", "3"])


def test_data_sets_come_through_the_hub_and_then_from_the_cache(server, tmp_path):
    """The real `datasets` library against the local hub: the commit is pinned, and afterwards no network is needed."""
    table = io.BytesIO()
    pq.write_table(pa.table({"question": ["1+1?", "2+2?"], "answer": ["#### 2", "#### 4"]}), table)
    splits = "".join(f"  - split: {s}\n    path: main/{s}.parquet\n" for s in ("train", "test"))
    server.dataset = {"README.md": f"---\nconfigs:\n- config_name: main\n  data_files:\n{splits}---\n".encode(),
                      "main/train.parquet": table.getvalue(), "main/test.parquet": table.getvalue()}
    program = "from tasks.gsm8k import GSM8K; t = GSM8K('test'); print(len(t), t[1]['messages'][0]['content'])"
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "NANOCHAT_BASE_DIR": str(tmp_path)}
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        count = len(server.requests)
        done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).resolve().parents[1], env=env | offline,
                              capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.split() == ["2", "2+2?"], done.stderr[-2000:]
        assert json.loads((tmp_path / "datasets.json").read_text()) == {"openai/gsm8k": COMMIT}
    assert len(server.requests) == count  # offline, nobody was asked
