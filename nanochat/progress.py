"""What a person sees of a training, and what is kept of it: step line, ETA, metrics.jsonl, wandb."""

import json
import math
import time
from pathlib import Path

from nanochat.common import Runtime, UserError, get_base_dir, print0


def human(value: float) -> str:
    """1234567 -> "1.23M", three digits or so."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """3661 -> "1:01:01"."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Progress:
    """Prints the step line and writes metrics. Step times count training only: call `begin_step`, `end_step` around it.

    Tokens/s, MFU and ETA come from a running mean of the step times that leaves out the first steps of a process
    (compilation).
    """

    WARM_STEPS = 2

    def __init__(self, runtime: Runtime, directory: Path, *, num_iterations: int, first_step: int, run: str,
                 config: dict, flops_per_token: float, peak_flops: float | None, print_every: int = 1):
        self.runtime, self.num_iterations, self.print_every = runtime, num_iterations, print_every
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.first_step, self.mean_s, self.trained_s = first_step, None, 0.0
        self.losses: list[float] = []  # of this process's steps
        self.metrics, self.file = directory / "metrics.jsonl", None
        self.wandb = _start_wandb(run, config) if runtime.is_main and run not in ("", "dummy") else None

    @property
    def steps_done(self) -> int:
        """Steps of this process."""
        return len(self.losses)

    def begin_step(self) -> None:
        self.runtime.synchronize()
        self.started = time.perf_counter()

    def end_step(self, step: int, loss: float, lr_multiplier: float, tokens: int, extra: str = "", **metrics) -> None:
        """One step is done; `tokens` it has trained on, all ranks together."""
        self.runtime.synchronize()
        seconds = time.perf_counter() - self.started
        self.trained_s += seconds
        skipped = not math.isfinite(loss)
        self.losses.append(loss)
        if step - self.first_step >= self.WARM_STEPS or self.mean_s is None:
            warm = step - self.first_step > self.WARM_STEPS
            self.mean_s = 0.9 * self.mean_s + 0.1 * seconds if warm else seconds
        rate = tokens / self.mean_s
        mfu = rate * self.flops_per_token / self.peak_flops if self.peak_flops else None
        memory = self.runtime.peak_memory_bytes()
        self.log(step, loss=None if skipped else loss, skipped=1 if skipped else None, lr_multiplier=lr_multiplier, seconds=seconds, tokens_per_s=tokens / seconds, mfu=mfu,
                 memory_bytes=memory, **metrics)
        if step % self.print_every == 0 or step == self.num_iterations - 1:
            done = step + 1
            mfu_text = "" if mfu is None else f" | mfu {mfu:.0%}"
            loss_text = "not finite, step skipped" if skipped else f"{loss:.4f}"
            print0(f"step {done:,}/{self.num_iterations:,} {done / self.num_iterations:.0%} | loss {loss_text} | "
                   f"lr {lr_multiplier:.2f}x | {human(rate)} tok/s{mfu_text} | {memory / 2**30:.1f} GiB{extra} | "
                   f"eta {clock((self.num_iterations - done) * self.mean_s)}")

    def log(self, step: int, **metrics) -> None:
        """One line of metrics.jsonl, and wandb; None values are left out."""
        metrics = {k: v for k, v in metrics.items() if v is not None}
        if self.runtime.is_main:
            if self.file is None:
                self.metrics.parent.mkdir(parents=True, exist_ok=True)
                _drop_from_step(self.metrics, self.first_step)
                self.file = open(self.metrics, "a", buffering=1)
            self.file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def _drop_from_step(path: Path, step: int) -> None:
    """Forget the metrics of steps that a resumed run is about to take again (evaluations before `step` are kept)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
            if values["step"] < step or (values["step"] == step and not {"loss", "skipped"} & values.keys()):
                kept.append(line + "\n")
        except (ValueError, KeyError):  # a line that a crash cut off
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _start_wandb(run: str, config: dict):
    import wandb  # slow to import, and needed by few

    try:
        return wandb.init(project="nanochat", name=run, config=config, dir=get_base_dir())
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"wandb does not start ({reason}); run wandb login, or set WANDB_MODE=offline, or leave out "
                        "--run") from error
