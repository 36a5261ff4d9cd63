"""Training steps: overfitting, normalisation over a whole step, gradient scaling; and resuming to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import find_steps, load_tensors
from nanochat.common import Runtime
from nanochat.gpt import GPTConfig, build_model
from nanochat.optim import build_optimizer
from nanochat.train_step import train_step

REPO = Path(__file__).resolve().parents[1]
CONFIG = GPTConfig(sequence_len=32, vocab_size=256, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L")


def new(dtype=torch.float32):
    torch.manual_seed(0)
    model = build_model(CONFIG, torch.device("cpu"), dtype)
    return model, build_optimizer(model)


def random_batch(seed, rows=8):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (rows, 33), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], rows * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overfits_one_batch(dtype):
    model, optimizer = new(dtype)
    runtime = Runtime(torch.device("cpu"), dtype, "test")
    losses = [train_step(model, optimizer, [random_batch(0)], runtime) for _ in range(60)]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(256.0)).item(), abs=0.1)
    assert losses[-1] < 0.05


def test_loss_is_normalised_by_the_tokens_of_the_whole_step(cpu):
    """Eight rows at once, or in micro-batches of uneven numbers of supervised tokens: the same step."""
    x, y, _ = random_batch(1)
    y = y.clone()
    y[0, 1:] = -1  # one supervised token in the first row
    y[5] = -1
    results = []
    for pieces in ([8], [1, 7], [4, 4], [2, 3, 3]):
        model, optimizer = new()
        batches = [(a, b, (b >= 0).sum().item()) for a, b in zip(x.split(pieces), y.split(pieces))]
        loss = train_step(model, optimizer, batches, cpu)
        results.append((loss, model.lm_head.weight.detach().clone()))
    logits = new()[0](x)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    for loss, weight in results:
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(weight, results[0][1], rtol=1e-4, atol=1e-5)


def test_fp16_scaler_skips_a_step_with_infinite_gradients(cpu):
    model, optimizer = new()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    hook = model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    train_step(model, optimizer, [random_batch(0)], cpu, scaler)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and scaler.get_scale() == 2.0
    hook.remove()
    loss = train_step(model, optimizer, [random_batch(0)], cpu, scaler)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert loss == pytest.approx(5.545, abs=0.1)


# --- resuming, through the scripts in processes of their own ---

BASE = ["scripts.base_train", "--depth=2", "--head-dim=32", "--aspect-ratio=32", "--max-seq-len=64", "--window-pattern=L",
        "--device-batch-size=2", "--total-batch-size=256", "--num-iterations=40", "--eval-every=-1", "--eval-tokens=2000",
        "--sample-every=-1", "--save-every=20", "--warmup-steps=5"]
SFT = ["scripts.chat_sft", "--num-iterations=40", "--eval-every=-1", "--eval-rows=40", "--save-every=20",
       "--spelling-rows=300", "--max-seq-len=64"]


def run(arguments, base_dir, kill_at=None, **env):
    """Run a script; with `kill_at`, SIGKILL it as soon as that step's line appears."""
    process = subprocess.Popen([sys.executable, "-u", "-m", *arguments], cwd=REPO, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=os.environ | {"NANOCHAT_BASE_DIR": str(base_dir)} | env)
    output = []
    for line in process.stdout:
        output.append(line)
        if kill_at is not None and line.startswith(f"step {kill_at}/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    return process.returncode, "".join(output)


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def final(directory):
    model = load_tensors(directory / "model_000040.pt")
    optimizer = load_tensors(directory / "optim_000040_rank0.pt")["optimizer"]["shards"]
    return model | {f"{name} {key}": t for name, state in optimizer.items() for key, t in state.items()}


def wait_for_checkpoint(directory, step):
    deadline = time.monotonic() + 60
    while step not in find_steps(directory) and time.monotonic() < deadline:
        time.sleep(0.05)


def prepare(base, tokenizer):
    tokenizer.save(base / "tokenizer")
    (base / "base_data_builtin").mkdir()
    (base / "base_data_builtin" / "words.txt").write_text("\n".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" + "orange"[:i % 6]
                                                                    for i in range(300)))


def test_resume_is_bit_exact_after_sigkill_for_base_and_sft(base_dir, tokenizer, tmp_path):
    """40 steps in one go, and 20, kill -9, 20 more: the same losses to the last digit, the same weights and moments."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    for base in (once, twice):
        prepare(base, tokenizer)
    for arguments, source in ((BASE, "base_checkpoints"), (SFT, "chatsft_checkpoints")):
        code, output = run(arguments, once)
        assert code == 0, output
        code, output = run(arguments, twice, kill_at=28)
        assert code == -signal.SIGKILL, output
        a, b = once / source / "d2", twice / source / "d2"
        assert find_steps(b) == [20]
        code, output = run([*arguments, "--resume"], twice)
        assert code == 0 and "resumed" in output, output
        assert len(losses(a)) == 40 and losses(a) == losses(b)
        expected, got = final(a), final(b)
        assert expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in expected)
        code, output = run([*arguments, "--resume"], twice)
        assert code == 0 and "finished already" in output
    meta = json.loads((twice / "chatsft_checkpoints" / "d2" / "meta_000040.json").read_text())
    base_meta = json.loads((twice / "base_checkpoints" / "d2" / "meta_000040.json").read_text())
    assert meta["step"] == 40 and meta["model_config"] == base_meta["model_config"]
    head = "lm_head.weight"  # SFT starts from 0.8 x the scaled learning rate, not the flag's
    assert meta["effective_lrs"][head] == pytest.approx(0.8 * base_meta["effective_lrs"][head])
    assert base_meta["effective_lrs"][head] == pytest.approx(0.008 * (256 / 2**19) ** 0.5 * (64 / 768) ** -0.5)
    assert losses(twice / "chatsft_checkpoints" / "d2")[-1] < losses(twice / "chatsft_checkpoints" / "d2")[0]


def signalled(arguments, base_dir, signum, at):
    """Run a script and send it a signal when the line of step `at` appears -> exit code, output, steps saved."""
    process = subprocess.Popen([sys.executable, "-u", "-m", *arguments], cwd=REPO, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=os.environ | {"NANOCHAT_BASE_DIR": str(base_dir)})
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith(f"step {at}/"):
            process.send_signal(signum)
    return process.wait(), "".join(output), find_steps(base_dir / "base_checkpoints" / "d2")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(signum, base_dir, tokenizer, tmp_path):
    base = tmp_path / "b"
    prepare(base, tokenizer)
    code, output, steps = signalled([*BASE, "--save-every=-1"], base, signum, 6)
    assert code == 0 and len(steps) == 1 and 6 <= steps[0] <= 8 and "--resume goes on" in output, output


def test_signal_in_the_last_step_finishes_the_run(base_dir, tokenizer, tmp_path):
    base = tmp_path / "b"
    prepare(base, tokenizer)
    arguments = [*BASE, "--num-iterations=6"]
    code, output, (step,) = signalled(arguments, base, signal.SIGTERM, 5)
    assert code == 0 and "Traceback" not in output and step in (5, 6), output
    code, output = run([*arguments, "--resume"], base)
    assert code == 0 and "val_bpb" in output


def test_two_processes_on_cpu_train_as_one(base_dir, tokenizer, tmp_path):
    """torchrun on CPU synchronises its replicas (gloo): losses of two processes are those of one."""
    results = {}
    arguments = [*BASE, "--num-iterations=6", "--save-every=-1"]
    for name, command in (("one", [sys.executable, "-m"]),
                          ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"])):
        base = tmp_path / name
        prepare(base, tokenizer)
        done = subprocess.run([*command, *arguments], cwd=REPO, text=True, capture_output=True,
                              env=os.environ | {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        results[name] = (losses(base / "base_checkpoints" / "d2"),
                         load_tensors(base / "base_checkpoints" / "d2" / "model_000006.pt"))
    assert results["two"][0] == pytest.approx(results["one"][0], rel=1e-5)
    for name, tensor in results["one"][1].items():
        torch.testing.assert_close(results["two"][1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
