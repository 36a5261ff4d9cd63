"""Several processes: failures end all of them at once and say why; steps that do not divide; file systems of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dev import tiny
from nanochat import ranks
from nanochat.checkpoint_manager import find_steps
from nanochat.common import Runtime, UserError
from nanochat.dataloader import IGNORE, PretrainLoader
from nanochat.scaling import share_rows

REPO = Path(__file__).resolve().parents[1]
PROGRAM = """
import os, signal, sys, torch
sys.path.insert(0, {repo!r})
from nanochat.common import UserError, compute_cleanup, compute_init, run_script

def main():
    runtime = compute_init("cpu")
    for step in range(10**9):
        runtime.sum(1.0)
        if step == 50 and runtime.rank == 1:
            {deed}

run_script(main)
"""


def run_two(tmp_path, deed: str):
    (tmp_path / "program.py").write_text(PROGRAM.format(repo=str(REPO), deed=deed))
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(tmp_path / "program.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    return done.stdout + done.stderr, time.monotonic() - started


@pytest.mark.parametrize("deed, line", [
    ("raise UserError('the cat ate the data; feed it')", "[rank 1] error: the cat ate the data; feed it"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "exitcode  : -9"),
    ("raise ValueError('a bug')", "[rank 1] error: ValueError: a bug"),
])
def test_a_rank_that_fails_ends_the_job_and_says_why(tmp_path, deed, line):
    output, seconds = run_two(tmp_path, deed)
    assert line in output, output
    assert seconds < 60  # not a time-out of collectives, which is an hour
    assert output.count('program.py", line') == ("bug" in deed)  # a traceback of bugs alone


def test_the_same_mistake_is_told_once(base_dir, tmp_path):
    done = subprocess.run(tiny.command(["scripts.base_train", "--depth=0"], 2), cwd=REPO, capture_output=True, text=True,
                          env=os.environ | {"NANOCHAT_BASE_DIR": str(base_dir)})
    assert done.stderr.count("argument --depth: expected a number from 1 to 1000, got 0") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize("env, message", [({"RANK": "x"}, "RANK=x"), ({"RANK": "3"}, "RANK=3"),
                                          ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun")])
def test_environment_that_makes_no_sense(env, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        ranks.place()


def test_share_rows():
    assert share_rows(16, 4, 1) == (4, 4) and share_rows(16, 4, 2) == (4, 2) and share_rows(16, 16, 4) == (4, 1)
    assert share_rows(16, 4, 3) == (3, 2)  # 3 ranks x 3 rows x 2 micro-steps hold 18 rows: two are filled up
    assert share_rows(256, None, 8) == (32, 1) and share_rows(1, None, 5) == (1, 1)
    with pytest.raises(UserError, match="try 2"):
        share_rows(16, 3, 1)


@pytest.mark.parametrize("worlds", [(1,), (2,), (3,), (5,), (2, 1, 3)])
def test_rows_of_a_step_are_the_same_at_every_world_size(tokenizer, corpus_dir, worlds):
    """Four steps of 16 rows, the world size changing from step to step: the rows of one process with 16 at a time."""
    files = [corpus_dir / "a.parquet"]

    def step(world, state):
        size, micro_steps = share_rows(16, 4, world)
        collected, states = [], []
        for rank in range(world):
            runtime = Runtime(torch.device("cpu"), torch.float32, "", rank, rank, world, world)
            loader = PretrainLoader(tokenizer, files, runtime, size, 32, state, 16)
            batches = loader.next_step()
            states.append(loader.state_dict())
            loader.close()
            assert len(batches) == micro_steps and all(x.shape == (size, 32) for x, *_ in batches)
            assert sum(supervised for *_, supervised in batches) == 16 * 32
            collected.append(batches)
        assert all(s == states[0] for s in states)
        rows = [(x, y) for m in range(micro_steps) for rank in range(world) for x, y in zip(*collected[rank][m][:2])]
        return [torch.cat(pair) for pair in rows if (pair[1] != IGNORE).any()], states[0]

    def four_steps(sizes):
        rows, state = [], None
        for i in range(4):
            more, state = step(sizes[i % len(sizes)], state)
            rows += more
        return torch.stack(rows)

    assert torch.equal(four_steps(worlds), four_steps((1,))) and len(four_steps((1,))) == 64


def test_resume_at_another_world_size_after_sigterm(base_dir, tmp_path, corpus_dir):
    """Two processes, SIGTERM to all of them, then one process: the losses are those of an undisturbed run."""
    arguments = [*tiny.BASE, "--num-iterations=24"]
    env = tiny.environment(tmp_path / "calm", corpus_dir)
    tiny.run(tiny.TOKENIZER, env)
    tiny.run(arguments, env)
    env = tiny.environment(tmp_path / "spot", corpus_dir)
    tiny.run(tiny.TOKENIZER, env)
    process = tiny.start(arguments, env, 2)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step 6/"):
            tiny.kill(process, signal.SIGTERM)
    process.wait()
    directory = tmp_path / "spot" / tiny.SOURCES["base"]
    (step,) = find_steps(directory)
    assert 6 <= step < 24 and "SIGTERM received" in output and f"after step {step}: saved" in output, output
    assert "resumed" in tiny.run(arguments, env)
    assert tiny.losses(tmp_path / "spot", "base") == pytest.approx(tiny.losses(tmp_path / "calm", "base"), rel=1e-5)
