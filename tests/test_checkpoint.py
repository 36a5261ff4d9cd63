"""Checkpoints: whole or not at all, found, refused when damaged, kept when the disk is full."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.gpt import GPTConfig, build_model

CONFIG = GPTConfig(sequence_len=16, vocab_size=600, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)


def save(directory, steps, cpu, keep_last=None, **meta):
    torch.manual_seed(0)
    model = build_model(CONFIG, torch.device("cpu"), torch.float32)
    writer = cm.CheckpointWriter(directory, cpu, keep_last)
    for step in steps:
        writer.save(step, model.state_dict(), {"optimizer": {"x": torch.ones(3)}},
                    {"step": step, "model_config": cm.config_to_meta(CONFIG), "world_size": 1, **meta})
    writer.wait()
    return model


def test_saved_is_found_and_loaded(base_dir, cpu, tokenizer):
    model = save(cm.source_dir("base") / "d1", [5, 10], cpu, tokenizer_hash=tokenizer.content_hash(), dtype="float32")
    for phase in ("train", "eval"):
        loaded, tok, meta = cm.load_model("base", torch.device("cpu"), phase)
        assert meta["step"] == 10 and meta["tag"] == "d1" and tok.content_hash() == tokenizer.content_hash()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))
        assert loaded.training == (phase == "train")
    assert cm.load_model("base", torch.device("cpu"), "eval", "d1", 5)[2]["step"] == 5


def test_saving_copies_at_once(tmp_path, cpu):
    """What training changes after `save` returns does not reach the file."""
    model = build_model(CONFIG, torch.device("cpu"), torch.float32)
    before = model.lm_head.weight.detach().clone()
    writer = cm.CheckpointWriter(tmp_path, cpu)
    writer.save(1, model.state_dict(), {}, {"step": 1})
    with torch.no_grad():
        model.lm_head.weight.zero_()
    writer.wait()
    assert torch.equal(cm.load_tensors(tmp_path / "model_000001.pt")["lm_head.weight"], before)


def test_keep_last(tmp_path, cpu):
    save(tmp_path, [1, 2, 3, 4], cpu, keep_last=2)
    assert cm.find_steps(tmp_path) == [3, 4]
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [
        "model_000003.pt", "model_000004.pt", "optim_000003_rank0.pt", "optim_000004_rank0.pt"]


def test_half_written_is_never_found_and_cleaned_up(tmp_path, cpu):
    save(tmp_path, [1], cpu)
    for name in ("model_000002.pt", "optim_000002_rank0.pt", "model_000003.pt.tmp", "meta_000003.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert cm.find_steps(tmp_path) == [1]
    cm.CheckpointWriter(tmp_path, cpu)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta_000001.json", "model_000001.pt", "optim_000001_rank0.pt"]


def test_most_recent_run_is_taken(base_dir, cpu):
    root = cm.source_dir("base")
    save(root / "d2", [1], cpu)
    save(root / "d10", [1], cpu)
    os.utime(root / "d10" / "meta_000001.json", (1, 1))
    assert cm.find_run("base").name == "d2" and cm.find_run("base", "d10").name == "d10"


def test_clear_errors(base_dir, cpu, tokenizer):
    with pytest.raises(UserError, match="scripts.base_train"):
        cm.load_model("base", torch.device("cpu"), "eval")
    root = cm.source_dir("base")
    save(root / "d1", [1], cpu, tokenizer_hash="other")
    with pytest.raises(UserError, match="there are: d1"):
        cm.find_run("base", "d7")
    with pytest.raises(UserError, match="there are: 1"):
        cm.find_step(root / "d1", 3)
    with pytest.raises(UserError, match="tokenizer"):
        cm.load_model("base", torch.device("cpu"), "eval")
    save(root / "d1", [1], cpu, tokenizer_hash=tokenizer.content_hash())
    path = root / "d1" / "model_000001.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated or damaged"):
        cm.load_model("base", torch.device("cpu"), "eval")
    for text in ("{", "{}"):
        (root / "d1" / "meta_000001.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            cm.load_model("base", torch.device("cpu"), "eval")
    save(root / "d1", [1], cpu, tokenizer_hash=tokenizer.content_hash())
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        cm.load_model("base", torch.device("cpu"), "eval")


def test_going_on_from_an_earlier_step_keeps_the_later_ones_aside(tmp_path, cpu):
    run = tmp_path / "d1"
    save(run, [1, 2, 3], cpu)
    cm.set_aside_after(run, 1)
    assert cm.find_steps(run) == [1] and cm.find_steps(tmp_path / "d1.previous1") == [2, 3]
    save(run, [2], cpu, keep_last=1)
    assert cm.find_steps(run) == [2]
    cm.set_aside(run)
    assert cm.find_steps(tmp_path / "d1.previous2") == [2] and cm.find_steps(tmp_path / "d1.previous1") == [2, 3]


def test_only_tensors_are_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, tmp_path / "model_000001.pt")
    with pytest.raises(UserError):
        cm.load_tensors(tmp_path / "model_000001.pt")
    assert not (tmp_path / "ran").exists()


DISK_FULL = """
import resource, signal, sys, torch
sys.path.insert(0, {repo!r})
from pathlib import Path
from nanochat.checkpoint_manager import CheckpointWriter
from nanochat.common import Runtime, UserError
writer = CheckpointWriter(Path({directory!r}), Runtime(torch.device("cpu"), torch.float32, ""))
writer.save(1, {{"w": torch.ones(1000)}}, {{}}, {{"step": 1}})
writer.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # files cannot grow: what a full disk looks like
writer.save(2, {{"w": torch.ones(1_000_000)}}, {{}}, {{"step": 2}})
try:
    writer.wait()
except UserError as error:
    print(error)
    sys.exit(2)
"""


def test_full_disk_leaves_earlier_checkpoints_intact(tmp_path):
    repo = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", DISK_FULL.format(repo=repo, directory=str(tmp_path))],
                          capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "checkpoint of step 1 is intact" in done.stdout and "Traceback" not in done.stderr
    assert cm.find_steps(tmp_path) == [1] and torch.equal(cm.load_tensors(tmp_path / "model_000001.pt")["w"],
                                                          torch.ones(1000))
    assert not list(tmp_path.glob("*.tmp")) and json.loads((tmp_path / "meta_000001.json").read_text()) == {"step": 1}


@pytest.mark.parametrize("damage", [{"model_config": {}}, {"model_config": None}, {"step": 7}, {"step": None},
                                    {"model_config": {"version": "x"}}])
def test_a_meta_file_with_wrong_contents(base_dir, cpu, tokenizer, damage):
    directory = cm.source_dir("base") / "d1"
    save(directory, [1], cpu, tokenizer_hash=tokenizer.content_hash())
    path = directory / "meta_000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(UserError, match="damaged|does not fit"):
        cm.load_model("base", torch.device("cpu"), "eval")
