"""A tiny pipeline (corpus, tokenizer, base, SFT) in processes of its own, for the checks in this folder."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import torch

from nanochat import synthetic
from nanochat.checkpoint_manager import find_steps, load_tensors
from nanochat.common import repo_dir
from nanochat.dataset import write_parquet

WORDS = ("table apple letter window garden yellow summer butter coffee dinner pepper rabbit kitten mirror pillow banana "
         "cherry orange silver copper planet rocket engine bridge castle forest island jungle meadow river valley desert "
         "harbor market museum palace temple school office studio").split()
TOKENIZER = ["scripts.tok_train", "--vocab-size=512", "--resume"]
# small learning rates: with the usual ones so small a model is chaotic, and rounding grows to differences that one sees
BASE = ["scripts.base_train", "--depth=3", "--model-tag=tiny", "--head-dim=32", "--aspect-ratio=32", "--max-seq-len=64",
        "--window-pattern=L", "--device-batch-size=4", "--total-batch-size=1024", "--eval-every=-1", "--eval-tokens=2000",
        "--sample-every=-1", "--warmup-steps=100", "--keep-last=3", "--resume"]
SFT = ["scripts.chat_sft", "--model-tag=tiny", "--builtin", "--init-lr-frac=0.1", "--eval-every=-1", "--eval-rows=40",
       "--spelling-rows=300", "--max-seq-len=64", "--device-batch-size=4", "--total-batch-size=1024", "--keep-last=3",
       "--resume"]
SOURCES = {"base": "base_checkpoints/tiny", "sft": "chatsft_checkpoints/tiny"}


def write_corpus(folder: Path, documents: int = 600) -> Path:
    """A data directory of two training files and a validation file."""
    rng = random.Random(0)
    for name, count in (("a", documents * 2 // 3), ("b", documents // 3), ("val", 100)):
        texts = ["\n\n".join(synthetic.as_text(synthetic.chat(rng, WORDS)) for _ in range(rng.randrange(1, 6)))
                 for _ in range(count)]
        write_parquet(folder / f"{name}.parquet", texts)
    return folder


def environment(base: Path, data: Path | None = None, **more: str) -> dict[str, str]:
    """Of a process: no hub, fp32, one thread, everything under `base`."""
    base.mkdir(parents=True, exist_ok=True)
    words = base / "words_alpha.txt"
    if not words.exists():  # two letters more make 1600 words out of 40
        words.write_text("\n".join(w + a + b for w in WORDS for a in "abcdefgh" for b in "aeiou"))
    settings = {"NANOCHAT_BASE_DIR": str(base), "HF_HUB_OFFLINE": "1", "NANOCHAT_DTYPE": "float32", "OMP_NUM_THREADS": "1",
                "TORCHDYNAMO_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    return os.environ | settings | ({"NANOCHAT_DATA_DIR": str(data)} if data else {}) | more


def command(arguments: list[str], processes: int = 1) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    return [sys.executable, "-m", *launcher, arguments[0], *(["--"] if launcher else []), *arguments[1:]]


def start(arguments: list[str], env: dict[str, str], processes: int = 1, **options) -> subprocess.Popen:
    """Start a script in a process group of its own; its output is a pipe unless `options` say otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    return subprocess.Popen(command(arguments, processes), cwd=repo_dir(), env=env, text=True, start_new_session=True,
                            **options)


def kill(process: subprocess.Popen, signum: int = signal.SIGKILL) -> None:
    """Signal the whole process group."""
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        pass


def run(arguments: list[str], env: dict[str, str], processes: int = 1) -> str:
    """Run a script to its end -> output; SystemExit with the output if it fails."""
    process = start(arguments, env, processes)
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} ended with code {process.returncode}:\n{output[-4000:]}")
    return output


def losses(base: Path, stage: str) -> list[float]:
    """Losses by step, from metrics.jsonl."""
    lines = map(json.loads, (base / SOURCES[stage] / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def final_tensors(base: Path, stage: str) -> dict[str, torch.Tensor]:
    """Weights, and the optimizer state of every rank, of the last checkpoint."""
    directory = base / SOURCES[stage]
    step = find_steps(directory)[-1]
    tensors = load_tensors(directory / f"model_{step:06d}.pt")
    for path in sorted(directory.glob(f"optim_{step:06d}_rank*.pt")):
        for name, state in load_tensors(path)["optimizer"]["shards"].items():
            tensors |= {f"{path.stem[-5:]} {name} {key}": tensor for key, tensor in state.items()}
    return tensors
