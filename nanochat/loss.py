"""Cross-entropy of softcapped logits, without the fp32 logits of a whole batch.

N tokens, C channels, V vocabulary. logits = cap * tanh(hidden @ weight.T / cap), |logits| <= cap, so the exponentials
need no maximum subtracted. Targets of -1 are ignored.
"""

import functools

import torch
import torch.nn.functional as F

from nanochat import cpu_kernels
from nanochat.common import at_least_fp32

SOFTCAP = 15.0


def softcap(logits: torch.Tensor) -> torch.Tensor:
    """15 * tanh(logits / 15), in fp32 at least."""
    return SOFTCAP * torch.tanh(at_least_fp32(logits) / SOFTCAP)


def softmax_gradient_(raw: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Overwrite raw logits (n, V) with d logsumexp / d raw, rows that are not `valid` (n, 1) with 0; returns the sums
    of exponentials (n, 1). The one elementwise pass over all logits."""
    squashed = torch.tanh(raw.float() / SOFTCAP)
    exponentials = torch.exp(SOFTCAP * squashed)
    normalizer = exponentials.sum(dim=-1, keepdim=True)
    raw.copy_(exponentials * (valid / normalizer) * (1 - squashed * squashed))
    return normalizer


def softmax_gradient_on(device: torch.device, dtype: torch.dtype):
    """The fastest `softmax_gradient_` there is without compiling."""
    in_c = device.type == "cpu" and cpu_kernels.trains(dtype)
    return functools.partial(cpu_kernels.softmax_gradient_, cap=SOFTCAP) if in_c else softmax_gradient_


def _chunk_loss_and_gradient(raw: torch.Tensor, targets: torch.Tensor, gradient_fn):
    """Raw logits (n, V) and targets (n,) -> summed loss; `raw` becomes its gradient."""
    valid, index = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    at_target = torch.tanh(raw.gather(1, index).float() / SOFTCAP)  # (n, 1)
    normalizer = gradient_fn(raw, valid)
    probability = torch.exp(SOFTCAP * at_target) / normalizer
    raw.scatter_(1, index, (valid * (probability - 1) * (1 - at_target * at_target)).to(raw.dtype))
    return (valid * (normalizer.log() - SOFTCAP * at_target)).sum()


class _SummedLoss(torch.autograd.Function):
    """Computes the gradients chunk by chunk in the forward pass, while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_tokens, gradient_fn):
        compute_weight = weight.to(hidden.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.size(0), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            raw = F.linear(hidden[rows], compute_weight)
            total += _chunk_loss_and_gradient(raw, targets[rows], gradient_fn)
            torch.mm(raw, compute_weight, out=grad_hidden[rows])
            grad_weight += raw.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_output), grad_weight.mul_(grad_output), None, None, None


def _token_losses(hidden, weight, targets):
    logits = softcap(F.linear(hidden, weight.to(hidden.dtype)))
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def softcap_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str = "mean",
                          chunk_tokens: int = 1024, gradient_fn=softmax_gradient_) -> torch.Tensor:
    """Loss of hidden (N, C) under the head `weight` (V, C) for targets (N,), in fp32.

    reduction "sum" or "mean" (over the targets that are not -1) gives a scalar, "none" gives (N,). `gradient_fn` lets
    the caller pass a faster `softmax_gradient_`.
    """
    if reduction == "none" or not torch.is_grad_enabled():
        losses = torch.cat([torch.utils.checkpoint.checkpoint(_token_losses, h, weight, t, use_reentrant=False)
                            for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens))])
        if reduction == "none":
            return losses
        total = losses.sum()
    else:
        total = _SummedLoss.apply(hidden, weight, targets, chunk_tokens, gradient_fn)
    return total / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else total


def _log_probabilities(hidden, weight, tokens, temperature, top_k):
    logits = softcap(F.linear(hidden, weight.to(hidden.dtype))) / temperature
    chosen = logits.gather(1, tokens[:, None])  # (n, 1)
    if top_k is not None and top_k < logits.size(1):
        logits, candidates = logits.topk(top_k, dim=1)  # (n, k)
        # a token that was among the likeliest when it was sampled may, by rounding, not be any more
        beyond = (candidates != tokens[:, None]).all(dim=1, keepdim=True)
        logits = torch.cat((logits, chosen.masked_fill(~beyond, -torch.inf)), dim=1)
    return (chosen - logits.logsumexp(dim=1, keepdim=True))[:, 0]


def log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0,
                      top_k: int | None = None, chunk_tokens: int = 1024) -> torch.Tensor:
    """Log-probabilities (N,) of tokens (N,) after hidden (N, C), under what sampling with these settings draws from.

    Chunk by chunk; backward computes the logits once more instead of keeping them.
    """
    chunks = [torch.utils.checkpoint.checkpoint(_log_probabilities, h, weight, t, temperature, top_k, use_reentrant=False)
              for h, t in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens))]
    return torch.cat(chunks)
