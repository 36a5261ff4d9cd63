"""Bits per byte: the validation loss that does not depend on the vocabulary."""

import math

import torch


@torch.no_grad()
def evaluate_bpb(model, inputs: torch.Tensor, targets: torch.Tensor, token_bytes: torch.Tensor, runtime,
                 device_batch_size: int) -> float:
    """Bits per byte of rows (N, T): summed loss in bits over summed bytes of the targets, over all ranks.

    Targets of -1 and tokens of 0 bytes (specials) are not counted. The same for every batch and world size, up to
    rounding.
    """
    sizes = token_bytes.to(runtime.device, torch.int64)
    nats, num_bytes = 0.0, 0.0
    for start in range(runtime.rank * device_batch_size, len(inputs), runtime.world_size * device_batch_size):
        x, y = (t[start:start + device_batch_size].to(runtime.device, torch.int64) for t in (inputs, targets))
        losses = model(x, y, loss_reduction="none")
        y = y.flatten()
        target_bytes = torch.where(y >= 0, sizes[y.clamp(min=0)], 0)
        nats += losses[target_bytes > 0].double().sum().item()
        num_bytes += target_bytes.sum().item()
    nats, num_bytes = runtime.sum(nats), runtime.sum(num_bytes)
    return nats / math.log(2) / num_bytes if num_bytes else math.inf
