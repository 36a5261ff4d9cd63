"""Choosing tokens: temperature, top-k and top-p, each row with settings of its own.

B rows, V vocabulary, K candidates.
"""

import torch

FEW = 1024
BLOCK = 128  # tokens whose probabilities are summed first, so that the whole vocabulary needs no fine-grained sum


def _sample_all(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """A token (B,) in proportion to weights (B, V) by inverting their running sum: first the block, then the token."""
    V = weights.size(-1)
    if V % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -V % BLOCK))
    weights = weights.unflatten(-1, (-1, BLOCK))  # (B, blocks, BLOCK)
    running = weights.sum(dim=-1).cumsum(dim=-1)
    target = (uniforms * running[:, -1])[:, None]
    block = torch.searchsorted(running, target, right=True).clamp(max=running.size(-1) - 1)  # (B, 1)
    before = torch.where(block > 0, running.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = weights.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(dim=-1)
    place = torch.searchsorted(inside, (target - before).clamp(max=inside[:, -1:] * (1 - 1e-7)), right=True)
    return (block * BLOCK + place).clamp(max=V - 1)[:, 0]


def _sample_few(weights: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """A token (B,) of tokens (B, K) in proportion to their falling weights, without those that come after the mass
    `keep` (B, 1) is reached."""
    weights = torch.where(weights.cumsum(dim=-1) - weights < keep, weights, 0.0)
    running = weights.cumsum(dim=-1)
    choice = torch.searchsorted(running, uniforms[:, None] * running[:, -1:] * (1 - 1e-7), right=True)
    return tokens.gather(1, choice.clamp(max=weights.size(-1) - 1))[:, 0]


def _sample_top_k(logits, temperature, uniforms, top_k: torch.Tensor, top_p: torch.Tensor, most: int) -> torch.Tensor:
    """Among the `top_k` (B, 1; at most `most`) likeliest, and of those the ones that make up `top_p` (B, 1)."""
    values, tokens = logits.topk(most, dim=-1)  # (B, K), falling
    weights = torch.exp((values - values[:, :1]) / temperature)
    weights = torch.where(torch.arange(most, device=logits.device) < top_k, weights, 0.0)
    return _sample_few(weights, tokens, uniforms, top_p * weights.sum(dim=-1, keepdim=True))


def _sample_top_p(weights, uniforms, top_p: torch.Tensor) -> torch.Tensor:
    """Among the likeliest that make up `top_p` (B, 1); on CPUs, where sorting is slow, it first looks at a few."""
    keep = top_p * weights.sum(dim=-1, keepdim=True)
    if weights.is_cpu and weights.size(-1) > FEW:
        values, tokens = weights.topk(FEW, dim=-1)
        if (values.sum(dim=-1, keepdim=True) >= keep).all():
            return _sample_few(values, tokens, uniforms, keep)
    return _sample_few(*weights.sort(dim=-1, descending=True), uniforms, keep)


def _kind(temperature: float, top_k: int, top_p: float, V: int) -> str:
    if temperature == 0 or top_k == 1 or top_p == 0:
        return "greedy"
    return "top_k" if top_k < V else "top_p" if top_p < 1 else "all"


def sample_tokens(logits: torch.Tensor, uniforms: list[float], temperature: list[float], top_k: list[int | None],
                  top_p: list[float]) -> torch.Tensor:
    """One token a row of logits (B, V) -> (B,), each row by its own random number and settings.

    Temperature 0 takes the likeliest. Rows of the same kind are worked on together; the lists live on the host.
    """
    B, V = logits.shape
    limits = [min(k or V, V) for k in top_k]
    kinds = [_kind(temperature[i], limits[i], top_p[i], V) for i in range(B)]
    out = torch.empty(B, dtype=torch.int64, device=logits.device)
    for kind in set(kinds):
        rows = [i for i in range(B) if kinds[i] == kind]

        def column(values) -> torch.Tensor:  # (rows, 1)
            return torch.tensor([[values[i]] for i in rows], dtype=torch.float32).to(logits.device)

        chosen = (logits if len(rows) == B else logits[rows]).float()
        if kind == "greedy":
            out[rows] = chosen.argmax(dim=-1)
        elif kind == "top_k":
            out[rows] = _sample_top_k(chosen, column(temperature), column(uniforms)[:, 0], column(limits),
                                      column(top_p), max(limits[i] for i in rows))
        else:
            weights = (chosen - chosen.amax(dim=-1, keepdim=True)).div_(column(temperature)).exp_()
            out[rows] = _sample_all(weights, column(uniforms)[:, 0]) if kind == "all" else \
                _sample_top_p(weights, column(uniforms)[:, 0], column(top_p))
    return out
