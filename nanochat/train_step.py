"""One optimizer step: micro-steps, normalisation of the loss, gradient scaling; and when Python collects garbage."""

import gc

import torch
import torch.distributed as dist

from nanochat.common import UserError, compile_problem, print0

CPU_PIECE_TOKENS = 8192  # of a micro-batch that a CPU takes at once
EAGER_FLOPS = 2e13  # runs on CPU below this are done before compilation would be


def make_scaler(runtime) -> torch.amp.GradScaler | None:
    """A gradient scaler under fp16, None in every other dtype."""
    return torch.amp.GradScaler(runtime.device.type) if runtime.dtype == torch.float16 else None


def start_compile(model, total_flops: float) -> bool:
    """Compile the model's training path if this machine can and the run is long enough; says what it does and why."""
    problem = compile_problem(model.device)
    if problem is None and model.device.type == "cpu" and total_flops < EAGER_FLOPS:
        problem = "the run is too short to pay for compiling"
    if problem is None:
        print0("torch.compile: the first step compiles, which takes a minute or so")
        model.compile()
    else:
        print0(f"torch.compile: off, {problem}")
    return problem is None


def check_dtype(meta: dict | None, runtime) -> None:
    """UserError if NANOCHAT_DTYPE would have a resumed run go on in another dtype."""
    if meta is not None and str(runtime.dtype).removeprefix("torch.") != meta["dtype"]:
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


def train_step(model, optimizer, batches: list, runtime, scaler=None) -> float:
    """Train on this rank's micro-batches -> mean loss over the supervised tokens of the whole step, all ranks.

    Each batch is (inputs, targets, supervised tokens in it over all ranks); the loss is divided by their sum, so that
    every supervised token of the step weighs the same wherever it stands.
    """
    tokens = sum(supervised for _, _, supervised in batches)
    total = torch.zeros((), device=runtime.device)
    for inputs, targets in (piece for x, y, _ in batches for piece in _pieces(x, y)):
        loss = model(inputs, targets, loss_reduction="sum") / tokens
        total += loss.detach()
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.unscale_(optimizer)
        if runtime.world_size > 1:  # one rank's overflow skips the step on all of them
            for found in scaler._found_inf_per_device(optimizer).values():
                dist.all_reduce(found, op=dist.ReduceOp.MAX)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return runtime.sum(total.item())


def collect_garbage(steps_done: int) -> None:
    """Call after each step: what the first one made is kept for good, later garbage is collected rarely."""
    if steps_done == 1:
        gc.collect()
        gc.freeze()
        gc.disable()
    elif steps_done % 2000 == 0:
        gc.collect()
