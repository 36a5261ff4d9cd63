"""The step line and the metrics: speed from training time alone, and no step twice after a resume."""

import json

import pytest

from nanochat import progress as module
from nanochat.common import get_base_dir
from nanochat.progress import Progress, clock, human


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now

    def time(self):
        return self.now


def make(tmp_path, cpu, first_step=0):
    return Progress(cpu, tmp_path, num_iterations=10, first_step=first_step, run="dummy", config={}, flops_per_token=100.0,
                    peak_flops=1e6)


def test_speed_leaves_out_what_is_not_training(tmp_path, cpu, monkeypatch, capsys):
    """Two seconds a step and an evaluation of a hundred between: 500 tokens/s and MFU 5 %, whatever the micro-steps."""
    ticks = Clock()
    monkeypatch.setattr(module, "time", ticks)
    progress = make(tmp_path, cpu)
    for step in range(6):
        ticks.now += 100.0
        progress.begin_step()
        ticks.now += 2.0 if step >= 2 else 30.0  # the first steps compile
        progress.end_step(step, 1.5, 1.0, 1000)
    progress.close()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("step 6/10 60% | loss 1.5000 | lr 1.00x | 500 tok/s | mfu 5% | ") and line.endswith("eta 0:00:08")
    metrics = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["tokens_per_s"] == 500 and metrics[-1]["mfu"] == pytest.approx(0.05)
    assert progress.trained_s == pytest.approx(68.0) and progress.losses == [1.5] * 6


def test_resumed_run_forgets_the_steps_it_takes_again(tmp_path, cpu):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": s}) + "\n" for s in range(8))
                                            + '{"step": 5, "val_bpb": 1.0}\n{"st')
    resumed = make(tmp_path, cpu, first_step=5)
    resumed.log(6, loss=6.5)
    resumed.close()
    assert [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4, 5, 6]


def test_wandb_offline_needs_no_account(tmp_path, cpu, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    progress = Progress(cpu, tmp_path, num_iterations=2, first_step=0, run="trial", config={"depth": 1},
                        flops_per_token=1.0, peak_flops=None)
    progress.begin_step()
    progress.end_step(0, 2.0, 1.0, 10)
    progress.close()
    assert list((get_base_dir() / "wandb").glob("offline-run-*"))


def test_formats():
    assert [human(x) for x in (999, 1234, 1_234_567, 5e9, 2e12)] == ["999", "1.23k", "1.23M", "5B", "2T"]
    assert clock(3661) == "1:01:01" and clock(59.9) == "0:00:59"
