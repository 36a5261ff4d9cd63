"""The pipelines' stages in bash, preflight, prefetch."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from dev.fake_hub import Hub
from nanochat import core_eval, hub
from nanochat.common import UserError
from nanochat.gpt import build_model
from nanochat.scaling import count_parameters, config_for_depth, fitting_rows, training_memory
from nanochat.train_step import rows_that_fit
from scripts import preflight, prefetch

REPO = Path(__file__).resolve().parents[1]


def bash(tmp_path, program: str):
    """Run stages -> exit code, output."""
    head = f'set -euo pipefail\nNANOCHAT_BASE_DIR={tmp_path} TAG=t AGAIN="bash again.sh"\nsource {REPO}/runs/stages.sh\n'
    done = subprocess.run(["bash", "-c", head + program], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_failed_stage_stops_and_says_where_why_and_what_to_do(tmp_path):
    code, output = bash(tmp_path, 'stage one echo fine\nbad() { echo "error: the disk is full"; return 7; }\n'
                                  'stage "two, failing" bad --flag\nstage three echo never\n')
    assert code == 7 and "fine" in output and "never" not in output
    for part in ('stage "two, failing" failed (exit code 7)', "error: the disk is full", "two__failing.log", "bad --flag",
                 "bash again.sh"):
        assert part in output


def test_a_training_that_was_stopped_in_good_order_is_not_followed(tmp_path):
    code, output = bash(tmp_path, 'training "p" echo "stopped by SIGTERM after step 3"\nstage next echo never\n')
    assert code == 130 and "never" not in output and "goes on from here" in output
    code, output = bash(tmp_path, 'training "p" echo "done: 5 steps"\nstage next echo followed\ntable\n')
    assert code == 0 and "followed" in output and "in all" in output


def test_kept_stages_are_shown_until_their_input_changes(tmp_path):
    program = f'once s {tmp_path}/input bash -c "echo counted; echo x >> {tmp_path}/count"\n'
    (tmp_path / "input").write_text("")
    os.utime(tmp_path / "input", (1, 1))
    for _ in range(2):
        code, output = bash(tmp_path, program)
        assert code == 0 and "counted" in output
    assert "done before" in output and (tmp_path / "count").read_text() == "x\n"
    os.utime(tmp_path / "input", (2e9, 2e9))
    bash(tmp_path, program)
    assert (tmp_path / "count").read_text() == "x\nx\n"


def test_scripts_are_valid_bash():
    for path in (REPO / "runs").glob("*.sh"):
        assert subprocess.run(["bash", "-n", path]).returncode == 0, path
    done = subprocess.run(["bash", REPO / "runs" / "speedrun.sh", "--rehearsal"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown argument --rehearsal")


def test_preflight(base_dir, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--depth=2", "--nproc=1", "--head-dim=64", "--max-seq-len=128", "--num-iterations=2",
                 "--total-batch-size=1024", "--vocab-size=1000"]
    assert preflight.main(arguments)["verdict"] == "WARN"  # no hub; compile is off in tests
    out = capsys.readouterr().out
    assert "OK   memory" in out and "OK   attention" in out and "WARN hub" in out and "FAIL" not in out
    assert preflight.main([*arguments, "--fp8"])["verdict"] == "FAIL"
    assert preflight.main(["--depth=200", "--nproc=1"])["verdict"] == "FAIL"
    out = capsys.readouterr().out
    assert "FAIL fp8" in out and "FAIL memory" in out and "FAIL disk" in out


def test_memory_estimate_counts_what_is_there(cpu):
    """Weights and optimizer state of an fp32 model to the byte; sharded by the ranks; more rows, more memory."""
    config = config_for_depth(2, 1000, 64, head_dim=32, window_pattern="L")
    model = build_model(config, cpu.device, cpu.dtype)
    parameter_bytes = sum(p.numel() * 4 for p in model.parameters())
    parts = training_memory(config, 4, 1, "cpu", 4)
    copies = 4 * (count_parameters(config)["blocks"] + count_parameters(config)["lm_head"])
    assert parts["weights"] - copies == pytest.approx(parameter_bytes, rel=1e-3)
    assert training_memory(config, 4, 2, "cpu", 4)["optimizer"] == parts["optimizer"] / 2
    sizes = [training_memory(config_for_depth(24, 32768), n)["total"] for n in (8, 16, 32)]
    assert sizes == sorted(sizes) and sizes[1] < 80e9 < sizes[2]  # known of 80 GB GPUs: 16 rows fit, 32 do not
    assert fitting_rows(config_for_depth(24, 32768), 512, 80e9, 8, "cuda") == 16
    assert fitting_rows(config, 12, 1e12, 1, "cuda") == 12 and fitting_rows(config, 12, 1, 1, "cuda") == 1
    assert rows_that_fit(config, 12, cpu) == (12, 1)


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    yield server
    server.server.shutdown()


def test_bundle(server, base_dir, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("eval_bundle/core.yaml", "icl_tasks: []")
    server.files["/bundle.zip"] = (tmp_path / "b.zip").read_bytes()
    server.files["/other.zip"] = b"not a zip"
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", server.url + "/other.zip")
    with pytest.raises(UserError, match="no zip archive"):
        core_eval.bundle_dir()
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", server.url + "/bundle.zip")
    assert (core_eval.bundle_dir() / "core.yaml").read_text() == "icl_tasks: []"
    count = len(server.requests)
    assert core_eval.bundle_dir() == base_dir / "eval_bundle" and len(server.requests) == count


def test_prefetch_fetches_what_it_can_and_names_the_rest(server, base_dir, capsys, monkeypatch):
    monkeypatch.setattr(prefetch, "WORDS_URL", server.url + "/words.txt")
    monkeypatch.setattr(prefetch, "HUB_SPLITS", ())
    server.files["/words.txt"] = b"apple\nbanana\n"
    with pytest.raises(UserError, match="ClimbMix, CORE bundle"):
        monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", server.url + "/nothing.zip")
        prefetch.main(["-n", "1"])
    assert "OK    word list" in capsys.readouterr().out and (base_dir / "words_alpha.txt").read_text() == "apple\nbanana\n"
