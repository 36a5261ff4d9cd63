"""What the training loops do: one optimizer step with its mishaps, the loop's state, signals, garbage collection."""

import gc
import logging
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import ranks
from nanochat.common import Runtime, UserError, compile_problem, print0
from nanochat.hardware import free_memory_bytes, is_out_of_memory
from nanochat.progress import clock
from nanochat.scaling import CPU_PIECE_TOKENS, fitting_rows, share_rows

EAGER_FLOPS = 2e13  # runs on CPU below this are done before compilation would be
MAX_SKIPPED_IN_A_ROW = 5  # steps whose loss or gradient is not finite


# --- the loop's state ---------------------------------------------------------------------------------------------


@dataclass
class LoopState:
    """What a training loop knows; saved and restored whole."""

    step: int = 0
    val_bpb: float | None = None
    best_val_bpb: float | None = None
    evaluated_step: int | None = None  # the last step at which evaluation and samples, if due, were done
    saved_step: int | None = None
    trained_s: float = 0.0
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0

    def due(self, every: int | None, last: bool) -> bool:
        """Whether something that happens every so many steps (None: at the end only) happens now."""
        return last or (every is not None and self.step > 0 and self.step % every == 0)

    def count(self, loss: float, writer) -> None:
        """A step is done. UserError after a few in a row that were not finite: the weights are those before them."""
        self.step += 1
        self.skipped_in_a_row = 0 if math.isfinite(loss) else self.skipped_in_a_row + 1
        self.skipped += not math.isfinite(loss)
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            writer.wait()  # the last checkpoint may be under way
            good = f"the checkpoint of step {self.saved_step} in {writer.directory} is good (--resume)" \
                if self.saved_step is not None else "no checkpoint was saved yet"
            raise UserError(f"loss or gradient not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, the last of them step "
                            f"{self.step}; {good}. Lower the learning rates, or look at the data")

    def farewell(self, finished: bool, directory: Path, runtime: Runtime, signal_name: str | None, result: str) -> None:
        """Say how the run ended, with what `result`."""
        if self.skipped:
            print0(f"{self.skipped} steps were skipped: their loss or gradient was not finite")
        if finished and self.val_bpb is not None and not math.isfinite(self.val_bpb):
            raise UserError(f"the model is broken (bits per byte: {self.val_bpb}) after {self.step} steps, saved in {directory}; "
                            "lower the learning rates and train again")
        if finished:
            print0(f"done: {self.step:,} steps in {clock(self.trained_s)} of training, {result}, peak memory "
                   f"{runtime.peak_memory_bytes() / 2**30:.2f} GiB, in {directory}")
        else:
            print0(f"stopped by {signal_name or 'another rank'} after step {self.step}: saved in {directory}; the same command "
                   "with --resume goes on")


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that the training loop reads; a second signal ends the program at once.

    Under torchrun a second one is no more than the echo of the first (to the process group, and once more by torchrun,
    which kills what does not end in time).
    """

    def __init__(self):
        self.name: str | None = None

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        if self.name is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        elif self.name is None:
            self.name = signal.Signals(signum).name
            if os.environ.get("LOCAL_RANK", "0") == "0":  # not print: it cannot be called while the loop is in one
                os.write(1, f"\n{self.name} received: finishing this step, saving, then leaving\n".encode())

    def agreed(self, runtime: Runtime) -> bool:
        """True on every rank as soon as one rank was signalled."""
        return runtime.any(self.name is not None)


# --- a step -------------------------------------------------------------------------------------------------------


def make_scaler(runtime) -> torch.amp.GradScaler | None:
    """A gradient scaler under fp16, None in every other dtype."""
    return torch.amp.GradScaler(runtime.device.type) if runtime.dtype == torch.float16 else None


def start_compile(model, total_flops: float) -> bool:
    """Compile the model's training path if this machine can and the run is long enough; says what it does and why."""
    problem = compile_problem(model.device)
    if problem is None and model.device.type == "cpu" and total_flops < EAGER_FLOPS:
        problem = "the run is too short to pay for compiling"
    if problem is None:
        if model.device.type == "cpu":  # where it finds a CUDA compiler, which it will not use
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        print0("torch.compile: the first step compiles, which takes a minute or so")
        model.compile()
    else:
        print0(f"torch.compile: off, {problem}")
    return problem is None


def rows_that_fit(config, rows_per_step: int, runtime) -> tuple[int, int]:
    """Device batch and micro-steps by an estimate for the device that has the least free memory."""
    free = free_memory_bytes(runtime.device, runtime.local_world_size)
    mine = fitting_rows(config, rows_per_step, free, runtime.world_size, runtime.device.type, runtime.dtype.itemsize)
    rows = min(map(int, ranks.gather(str(mine))))
    print0(f"device batch: {rows} rows at a time are estimated to fit into {free / 2**30:.1f} GiB")
    return share_rows(rows_per_step, rows, runtime.world_size)


def check_dtype(meta: dict | None, runtime) -> None:
    """UserError if NANOCHAT_DTYPE would have a resumed run go on in another dtype."""
    if meta is not None and runtime.dtype_name != meta["dtype"]:
        raise UserError(f"--resume: the checkpoint was trained in {meta['dtype']}, NANOCHAT_DTYPE says {runtime.dtype}; "
                        "unset it")


def get_rng_state(scaler) -> dict:
    """State of the random number generators and of the gradient scaler."""
    state = {"torch": torch.get_rng_state(), "scaler": scaler.state_dict() if scaler else {}}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict, scaler) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def set_schedules(optimizer, lr_multiplier: float, momentum: float | None = None,
                  weight_decay: float | None = None) -> None:
    """Write this step's learning rates, Muon momentum and Muon weight decay into the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_multiplier
        if group["kind"] == "muon":
            group["momentum"] = group["momentum"] if momentum is None else momentum
            group["weight_decay"] = group["weight_decay"] if weight_decay is None else weight_decay


def _pieces(inputs, targets):
    """A micro-batch as it is; on CPU in equal parts of few rows, which saves memory and costs no speed."""
    rows, T = inputs.shape
    if inputs.device.type != "cpu":
        return [(inputs, targets)]
    size = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * T <= CPU_PIECE_TOKENS))
    return zip(inputs.split(size), targets.split(size))


class OutOfMemory(Exception):
    """A rank has not enough memory for a micro-step; raised on all of them."""


def train_step(model, optimizer, batches: list, runtime, scaler=None, may_run_out: bool = False) -> float:
    """Train on this rank's micro-batches -> mean loss over the supervised tokens of the whole step, all ranks.

    Each batch is (inputs, targets, supervised tokens in it over all ranks); the loss is divided by their sum, so that
    every supervised token of the step weighs the same wherever it stands. If the loss or a gradient is not finite on
    any rank, the result is nan and nothing has changed. With `may_run_out`, OutOfMemory says that a rank's memory did
    not suffice; nothing has changed then either.
    """
    tokens = sum(supervised for _, _, supervised in batches)
    total = torch.zeros((), device=runtime.device)
    ran_out = False
    try:
        for inputs, targets in (piece for x, y, _ in batches for piece in _pieces(x, y)):
            loss = model(inputs, targets, loss_reduction="sum") / tokens
            total += loss.detach()
            (loss if scaler is None else scaler.scale(loss)).backward()
    except RuntimeError as error:
        if not may_run_out or not is_out_of_memory(error):
            raise
        ran_out, loss = True, None  # the graph's tensors are freed
    if may_run_out and runtime.any(ran_out):
        optimizer.zero_grad(set_to_none=True)
        raise OutOfMemory
    return apply_gradients(model, optimizer, total, runtime, scaler)


def apply_gradients(model, optimizer, total: torch.Tensor, runtime, scaler=None) -> float:
    """The optimizer step, with this rank's share of the loss -> the loss of all ranks; nan, and nothing has changed, if it
    or a gradient is not finite on any of them."""
    if scaler is None:  # under a scaler infinite gradients are part of the game
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        total += 0 * norm  # not a number unless every gradient is finite
    loss = runtime.sum(total.item())
    if not math.isfinite(loss):
        loss = math.nan
    elif scaler is None:
        optimizer.step()
    else:
        scaler.unscale_(optimizer)
        if runtime.world_size > 1:  # one rank's overflow skips the step on all of them
            for found in scaler._found_inf_per_device(optimizer).values():
                dist.all_reduce(found, op=dist.ReduceOp.MAX)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss


def train_on_next(model, optimizer, loader, runtime, scaler=None, first: bool = False) -> tuple[float, int]:
    """One step on the loader's next batches -> loss, supervised tokens of all ranks.

    In the `first` step of a process the device batch is halved, on all ranks, until it fits into memory.
    """
    while True:
        before = loader.state_dict()
        batches = loader.next_step()
        try:
            return (train_step(model, optimizer, batches, runtime, scaler, may_run_out=first),
                    sum(supervised for *_, supervised in batches))
        except OutOfMemory:
            del batches
            size = loader.rows_per_rank
            if size == 1:
                raise UserError("out of memory with one row at a time; train a smaller --depth or --max-seq-len") from None
            if runtime.device.type == "cuda":
                torch.cuda.empty_cache()
            loader.restart(before, -(-size // 2))
            print0(f"out of memory with {size} rows at a time: going on with {loader.rows_per_rank}, in more micro-steps "
                   f"(--device-batch-size={loader.rows_per_rank} starts there)")


def collect_garbage(steps_done: int) -> None:
    """Call after each step: what the first one made is kept for good, later garbage is collected rarely."""
    if steps_done == 1:
        gc.collect()
        gc.freeze()
        gc.disable()
    elif steps_done % 2000 == 0:
        gc.collect()
