"""How long training waits while a checkpoint is saved, next to one plain copy of the same tensors in host memory.

python -m dev.bench_save --depth 12
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from nanochat.checkpoint_manager import CheckpointWriter
from nanochat.common import Parser, add_runtime_flags, compute_init, integer, run_script
from nanochat.gpt import build_model
from nanochat.optim import build_optimizer
from nanochat.scaling import config_for_depth


def tensors_of(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value.values() for t in tensors_of(v)] if isinstance(value, dict) else []


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    add_runtime_flags(parser)
    parser.add_argument("--depth", type=integer(1), default=12, help="number of layers")
    parser.add_argument("--repeats", type=integer(1), default=5, help="saves, and copies, in turn")
    args = parser.parse_args(argv)
    runtime = compute_init(args.device_type)
    model = build_model(config_for_depth(args.depth, 32768), runtime.device, runtime.dtype)
    optimizer = build_optimizer(model)
    tensors = tensors_of(model.state_dict()) + tensors_of(optimizer.state_dict()["shards"])
    size = sum(t.numel() * t.element_size() for t in tensors)
    pauses, copies, writes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder) / "run", runtime, keep_last=1)
        for step in range(args.repeats + 1):
            start = time.perf_counter()
            held = [t.detach().to("cpu", copy=True) for t in tensors]
            copies.append(time.perf_counter() - start)
            del held
            start = time.perf_counter()
            writer.save(step, model.state_dict(), {"optimizer": optimizer.state_dict()}, {"step": step})
            pauses.append(time.perf_counter() - start)
            writer.wait()
            writes.append(time.perf_counter() - start)
        writer.close()
    pause, copy, write = (statistics.median(values[1:]) for values in (pauses, copies, writes))
    print(f"depth {args.depth}: {size / 2**30:.2f} GiB of weights and optimizer state")
    print(f"{'pause of the training':<40}{pause:>8.2f} s")
    print(f"{'one copy to host memory':<40}{copy:>8.2f} s")
    print(f"{'until the checkpoint is on disk':<40}{write:>8.2f} s")
    return {"pause_s": pause, "copy_s": copy}


if __name__ == "__main__":
    run_script(main)
