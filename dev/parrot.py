"""A tiny chat model that has learnt a few conversations by heart: for tests and load, where the answers must be known."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.common import Runtime, repo_dir
from nanochat.gpt import GPTConfig, build_model
from nanochat.tokenizer import RustBPETokenizer

HOSTILE = ('Look: <script>document.title = "hacked"</script> <img src=x onerror="document.title=\'hacked\'"> '
           '[click](javascript:document.title="hacked") ![i](x" onerror="document.title=\'hacked\'")')
RICH = ("# Title\n\nSome **bold** and *slanted* text with `code < 1`.\n\n1. one\n2. two\n\n```python\nif a < b:\n    print(a & b)\n"
        "```\n\n| a | b |\n|---|---|\n| 1 | 2 |")
ANSWERS = {
    "Hello": "Hello! How can I help you?",
    "Count": " ".join(map(str, range(1, 61))),
    "Accents": "Caf\u00e9 na\u00efve \u4f60\u597d \U0001f600!",
    "Hack": HOSTILE,
    "Rich": RICH,
    "Sum": [{"type": "text", "text": "Let me see: "}, {"type": "python", "text": "12 * 37"},
            {"type": "python_output", "text": "444"}, {"type": "text", "text": " is the product."}],
}
AFTER = [("Hello", "Count"), ("Count", "Accents"), ("Rich", "Sum"), ("Hello", "Accents")]  # known as second questions, too


def teach(base: Path, tokenizer: RustBPETokenizer | None = None, context: int = 512, channels: int = 128, steps: int = 160,
          dtype: torch.dtype = torch.float32) -> Path:
    """Write the tokenizer and the SFT checkpoint `parrot` into a base directory; takes about 20 s -> the directory."""
    if tokenizer is None:
        tokenizer = RustBPETokenizer.train_from_iterator(iter(["the cat sat on the mat 1 2 3"]), 300)
    tokenizer.save(base / "tokenizer")
    rows = [tokenizer.render_conversation({"messages": [
        message for question in questions for message in ({"role": "user", "content": question},
                                                          {"role": "assistant", "content": ANSWERS[question]})]})
            for questions in [*((question,) for question in ANSWERS), *AFTER]]
    longest = max(len(ids) for ids, _ in rows)
    ids, targets = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    targets.fill_(-1)
    for row, (tokens, mask) in enumerate(rows):
        ids[row, :len(tokens)] = torch.tensor(tokens)
        targets[row, :len(tokens) - 1] = torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(tokens[1:]), -1)
    torch.manual_seed(0)
    config = GPTConfig(context, tokenizer.get_vocab_size(), 2, 2, 2, channels, "L")
    model = build_model(config, torch.device("cpu"), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        loss = model(ids, targets)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, 1.2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
    if loss.item() > 0.02:
        raise RuntimeError(f"the conversations were not learnt: loss {loss.item():.3f}")
    runtime = Runtime(torch.device("cpu"), dtype, "")
    writer = checkpoints.CheckpointWriter(checkpoints.source_dir("sft") / "parrot", runtime)
    writer.save(steps, model.state_dict(), {}, {
        "step": steps, "model_config": checkpoints.config_to_meta(config), "world_size": 1, "dtype": runtime.dtype_name,
        "tokenizer_hash": tokenizer.content_hash()})
    writer.wait()
    return base


def serve(base: Path, *flags: str, **environment: str) -> tuple[subprocess.Popen, int]:
    """The chat server as a person starts it, on a free port -> (process, port)."""
    process = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", "-p", "0", *flags], cwd=repo_dir(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"NANOCHAT_BASE_DIR": str(base)} | environment)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(r"open http://localhost:(\d+)", line):
            return process, int(found[1])
    raise RuntimeError("the server did not start:\n" + "".join(seen))
