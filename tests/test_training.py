"""The training loop's mishaps: steps that are not finite, memory that does not suffice, a run that is in use."""

import math

import pytest
import torch

from nanochat.checkpoint_manager import CheckpointWriter, find_steps
from nanochat.common import UserError
from nanochat.dataloader import PretrainLoader
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.optim import build_optimizer
from nanochat.train_step import LoopState, train_on_next, train_step

CONFIG = GPTConfig(sequence_len=32, vocab_size=600, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")


class Troubled(GPT):
    """A model that misbehaves: `bad_calls` give an infinite loss, more than `most_rows` rows are too many."""

    calls, bad_calls, most_rows = 0, (), 1000

    def forward(self, idx, targets=None, **kwargs):
        if len(idx) > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss = super().forward(idx, targets, **kwargs)
        self.calls += 1
        return loss * math.inf if self.calls in self.bad_calls else loss


def train(cpu, tokenizer, corpus_dir, writer=None, steps=8, rows=4, **trouble):
    """Steps of 4 rows, saved every second one where there is a writer -> losses, state, model, loader."""
    torch.manual_seed(0)
    model = build_model(CONFIG, torch.device("cpu"), torch.float32)
    model.__class__ = Troubled
    for name, value in trouble.items():
        setattr(model, name, value)
    optimizer, state, losses = build_optimizer(model), LoopState(), []
    loader = PretrainLoader(tokenizer, [corpus_dir / "a.parquet"], cpu, rows, 32, rows_per_step=4)
    try:
        for _ in range(steps):
            if writer and state.due(2, False):
                writer.save(state.step, model.state_dict(), {}, {})
                state.saved_step = state.step
            losses.append(train_on_next(model, optimizer, loader, cpu, first=not losses)[0])
            state.count(losses[-1], writer)
    finally:
        loader.close()
    return losses, state, model, loader


def test_a_step_that_is_not_finite_is_skipped_and_counted(cpu, tokenizer, corpus_dir):
    losses, state, model, _ = train(cpu, tokenizer, corpus_dir, bad_calls=(3, 6))
    assert [i for i, loss in enumerate(losses) if not math.isfinite(loss)] == [2, 5]
    assert state.skipped == 2 and state.skipped_in_a_row == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_infinite_gradients_change_nothing(cpu):
    torch.manual_seed(0)
    model = build_model(CONFIG, torch.device("cpu"), torch.float32)
    optimizer = build_optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda grad: grad * math.inf)
    x = torch.randint(0, 600, (2, 33))
    loss = train_step(model, optimizer, [(x[:, :-1], x[:, 1:], 64)], cpu)
    assert math.isnan(loss) and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(group["step"] == 0 for group in optimizer.param_groups if group["kind"] == "adamw")


def test_five_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(tmp_path, cpu, tokenizer, corpus_dir):
    writer = CheckpointWriter(tmp_path / "run", cpu)
    with pytest.raises(UserError, match="step 8; the checkpoint of step 6 .* is good"):
        train(cpu, tokenizer, corpus_dir, writer, bad_calls=(4, 5, 6, 7, 8))
    assert find_steps(tmp_path / "run") == [2, 4, 6]


def test_too_many_rows_are_halved_and_the_step_stays_the_same(cpu, tokenizer, corpus_dir, capsys):
    fitting, *_ = train(cpu, tokenizer, corpus_dir, rows=1)
    losses, _, _, loader = train(cpu, tokenizer, corpus_dir, rows=4, most_rows=1)
    assert losses == pytest.approx(fitting, rel=1e-6) and loader.rows_per_rank == 1
    assert "4 rows at a time: going on with 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="one row at a time"):
        train(cpu, tokenizer, corpus_dir, most_rows=0)


def test_two_trainings_do_not_share_a_directory(tmp_path, cpu, monkeypatch):
    monkeypatch.setattr("nanochat.checkpoint_manager.LOCK_TIMEOUT_S", 0.1)
    first = CheckpointWriter(tmp_path / "run", cpu)
    with pytest.raises(UserError, match="another training writes to"):
        CheckpointWriter(tmp_path / "run", cpu)
    first.close()
    CheckpointWriter(tmp_path / "run", cpu).close()
