"""Downloads from a local server that speaks the hub's protocol and misbehaves on request."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import hub
from nanochat.common import UserError
from nanochat.dataset import CLIMBMIX_REPO, main as dataset_main, write_parquet

COMMIT = "a" * 40
CONTENT = bytes(range(256)) * 2000


class Hub:
    """Files by path; `faults` are carried out one request at a time, then it behaves."""

    def __init__(self):
        self.files, self.faults, self.requests, self.dataset = {}, [], [], {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                if self.path.startswith("/datasets/"):
                    return self.hub_file(head=True)
                self.send_response(200)
                self.end_headers()

            def hub_file(self, head=False):
                """A file of the small data set below, as the hub serves it; 404 in the hub's words for another."""
                name = unquote(self.path.split(f"/resolve/{COMMIT}/")[-1])
                content = outer.dataset.get(name)
                self.send_response(404 if content is None else 200)
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                else:
                    self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                    self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if content and not head:
                    self.wfile.write(content)

            def hub_api(self):
                """What the hub says of the data set: its commit and files, or a folder's entries."""
                if "/tree/" in self.path:
                    folder = unquote(self.path.split("?")[0].split(f"/tree/{COMMIT}")[-1]).strip("/")
                    answer = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                              for name, content in outer.dataset.items() if name.startswith(folder + "/" if folder else "")]
                else:
                    answer = {"id": "openai/gsm8k", "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                              "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": n} for n in outer.dataset]}
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                if self.path.startswith("/api/datasets/"):
                    return self.hub_api()
                if self.path.startswith("/datasets/openai/"):
                    return self.hub_file()
                fault = outer.faults.pop(0) if outer.faults else None
                content = outer.files.get(self.path.split("?")[0])
                if isinstance(fault, int):
                    self.send_response(fault)
                    self.send_header("Retry-After", "0")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if content is None:
                    self.send_error(404)
                    return
                if "redirected" not in self.path:  # the hub redirects to its storage, hash and size on the first hop
                    self.send_response(302)
                    self.send_header("Location", self.path + "?redirected")
                    self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
                    self.send_header("X-Linked-Size", str(len(content)))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = int(self.headers.get("Range", "bytes=0-")[6:-1])
                body = content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if fault == "drop":
                    self.wfile.write(body[:len(body) // 2])
                    self.close_connection = True
                elif fault == "wrong":
                    self.wfile.write(b"x" * len(body))
                else:
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


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
