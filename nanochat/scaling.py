"""From depth to a run: width, tokens, batch, learning rates, decay; parameter and FLOP counts."""

import math
from dataclasses import dataclass

from nanochat.common import UserError
from nanochat.gpt import SMEAR_CHANNELS, VE_GATE_CHANNELS, GPTConfig

REFERENCE_BATCH = 2**19  # tokens a step that the default learning rates were tuned for, at depth 12
REFERENCE_DEPTH = 12
BATCH_EXPONENT = 0.383
MAX_DEVICE_BATCH = 32


def config_for_depth(depth: int, vocab_size: int, sequence_len: int = 2048, aspect_ratio: int = 64,
                     head_dim: int = 128, window_pattern: str = "SSSL") -> GPTConfig:
    """The model of a depth: width = depth x aspect ratio, rounded up to whole heads."""
    if head_dim % 2:
        raise UserError(f"head dim {head_dim}: expected an even number (rotary pairs)")
    width = -(-depth * aspect_ratio // head_dim) * head_dim
    heads = width // head_dim
    return GPTConfig(sequence_len, vocab_size, depth, heads, heads, width, window_pattern)


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Number of parameters by kind; "scaling" is what horizons are multiples of, "total" is all of them."""
    kv_channels, gated = config.n_kv_head * config.head_dim, sum(map(config.has_value_embedding, range(config.n_layer)))
    per_block = 2 * config.n_embd**2 + 2 * config.n_embd * kv_channels + 8 * config.n_embd**2
    counts = {
        "wte": config.padded_vocab_size * config.n_embd,
        "value_embeds": gated * config.padded_vocab_size * kv_channels,
        "lm_head": config.padded_vocab_size * config.n_embd,
        "blocks": config.n_layer * per_block + gated * VE_GATE_CHANNELS * config.n_kv_head,
        "scalars": 2 * config.n_layer + SMEAR_CHANNELS + 2,
    }
    return counts | {"scaling": counts["blocks"] + counts["lm_head"], "total": sum(counts.values())}


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs of one token: 6 x matmul parameters + 12 x heads x head_dim x attended positions."""
    counts = count_parameters(config)
    windows = [config.sequence_len if w < 0 else min(w, config.sequence_len) for w in config.windows()]
    attention = 12 * config.n_head * config.head_dim * sum(windows)
    return 6 * (counts["blocks"] + counts["lm_head"] + SMEAR_CHANNELS) + attention


@dataclass(frozen=True)
class RunPlan:
    """Everything that depth decides, after overrides."""

    num_iterations: int
    total_batch_size: int  # tokens a step
    device_batch_size: int  # rows a micro-step
    grad_accum_steps: int
    target_tokens: float
    lr_scale: float
    weight_decay: float
    flops_per_token: int

    @property
    def total_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    @property
    def total_flops(self) -> float:
        return float(self.flops_per_token) * self.total_tokens


def plan(config: GPTConfig, *, num_iterations: int | None = None, target_flops: float | None = None,
         target_param_data_ratio: float = 12.0, total_batch_size: int | None = None,
         device_batch_size: int | None = None, weight_decay: float = 0.28, world_size: int = 1,
         aspect_ratio: int = 64, head_dim: int = 128) -> RunPlan:
    """The run of a model. Horizon: `num_iterations`, else `target_flops`, else ratio x scaling parameters.

    Batch 2^19 x (D / D_ref)^0.383, to a power of two; learning rates x sqrt(B / 2^19); weight decay
    x sqrt(B / 2^19) x D_ref / D, with D_ref = ratio x scaling parameters of depth 12. With `num_iterations`, D is
    ratio x scaling parameters all the same, so that a short trial trains as the full run begins.
    """
    flops = flops_per_token(config)
    ratio = target_param_data_ratio
    reference = config_for_depth(REFERENCE_DEPTH, config.vocab_size, config.sequence_len, aspect_ratio, head_dim)
    reference_tokens = ratio * count_parameters(reference)["scaling"]
    target_tokens = ratio * count_parameters(config)["scaling"]
    if num_iterations is None and target_flops is not None:
        target_tokens = target_flops / flops
    if num_iterations is None and target_tokens < config.sequence_len:
        asked = f"--target-param-data-ratio={ratio:g}" if target_flops is None else f"--target-flops={target_flops:g}"
        raise UserError(f"{asked} is less than one row of {config.sequence_len:,} tokens takes "
                        f"({flops * config.sequence_len:.3g} FLOPs); a shorter --max-seq-len, or more of it")
    batch = total_batch_size or 2 ** round(
        math.log2(REFERENCE_BATCH * (target_tokens / reference_tokens) ** BATCH_EXPONENT))
    if batch % config.sequence_len:
        raise UserError(f"--total-batch-size={batch} tokens is no multiple of the row length {config.sequence_len}; try "
                        f"{max(1, round(batch / config.sequence_len)) * config.sequence_len}")
    device_batch, grad_accum_steps = share_rows(batch // config.sequence_len, device_batch_size, world_size)
    batch_scale = (batch / REFERENCE_BATCH) ** 0.5
    return RunPlan(
        num_iterations=num_iterations or max(1, round(target_tokens / batch)),
        total_batch_size=batch,
        device_batch_size=device_batch,
        grad_accum_steps=grad_accum_steps,
        target_tokens=target_tokens,
        lr_scale=batch_scale,
        weight_decay=weight_decay * batch_scale * reference_tokens / target_tokens,
        flops_per_token=flops,
    )


def share_rows(rows: int, device_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Rows a device takes at a time, and micro-steps, for a step of `rows` rows over all ranks.

    At most `device_batch_size` rows (32 when None), evenly shared; where they do not divide, the loader fills up the
    last micro-step. UserError if `device_batch_size` does not divide the step even on one rank.
    """
    if device_batch_size is not None and rows % device_batch_size:
        fitting = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= device_batch_size)
        raise UserError(f"--device-batch-size={device_batch_size} does not divide the {rows} rows of a step (total batch "
                        f"size / row length); try {fitting}, or another --total-batch-size")
    micro_steps = -(-rows // (world_size * (device_batch_size or MAX_DEVICE_BATCH)))
    return -(-rows // (world_size * micro_steps)), micro_steps


# --- memory -------------------------------------------------------------------------------------------------------

ACTIVATION_BYTES = {"cuda": 34, "cpu": 64}  # a token, layer and channel that backward keeps, compiled, in a 16-bit dtype
PROCESS_BYTES = {"cuda": 1.5e9, "cpu": 0.9e9}  # CUDA context and libraries; Python, PyTorch, the compiler
CPU_PIECE_TOKENS = 8192  # of a micro-batch that a CPU takes at once
LOSS_CHUNK_TOKENS = 1024
FITTING_SHARE = 0.85  # of the free memory, that a device batch may be estimated to take


def training_memory(config: GPTConfig, rows: int, world_size: int = 1, device_type: str = "cuda",
                    dtype_bytes: int = 2) -> dict[str, float]:
    """Estimated bytes of a training process by purpose, and "total"; `rows` at a time on this device.

    The activation figures are fitted: on CPU to measured peaks (dev/LOG.md), on CUDA to device batches known to fit.
    """
    kind = "cuda" if device_type == "cuda" else "cpu"
    counts = count_parameters(config)
    tables = counts["wte"] + counts["value_embeds"]
    matrices = counts["blocks"] + counts["lm_head"]
    weights = 4 * matrices + dtype_bytes * tables
    tokens = rows * config.sequence_len
    if kind == "cpu":
        tokens = min(tokens, max(CPU_PIECE_TOKENS, config.sequence_len))
    parts = {
        "process": PROCESS_BYTES[kind],
        "weights": float(weights + dtype_bytes * matrices),  # with the copies in the compute dtype
        "gradients": float(weights),
        "optimizer": (8 * (tables + counts["lm_head"]) + 4 * counts["blocks"]) / world_size,
        "activations": ACTIVATION_BYTES[kind] / 2 * dtype_bytes * tokens * config.n_embd * config.n_layer,
        "loss": float(min(tokens, LOSS_CHUNK_TOKENS) * config.padded_vocab_size * (dtype_bytes + 4)
                      + 4 * counts["lm_head"]),
    }
    update = 3 * 4 * config.n_layer * 4 * config.n_embd**2  # Muon's stacks of the largest matrices, once backward is over
    parts["activations"] = max(parts["activations"], update - parts["loss"])
    return parts | {"total": sum(parts.values())}


def fitting_rows(config: GPTConfig, rows_per_step: int, memory_bytes: float, world_size: int, device_type: str,
                 dtype_bytes: int = 2) -> int:
    """The most rows at a time (at most 32, a divisor of the step's) that are estimated to fit into `memory_bytes`."""
    sizes = [n for n in range(1, MAX_DEVICE_BATCH + 1) if rows_per_step % n == 0]
    fitting = [n for n in sizes if training_memory(config, n, world_size, device_type, dtype_bytes)["total"]
               <= FITTING_SHARE * memory_bytes]
    return max(fitting, default=1)
