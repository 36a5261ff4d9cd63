"""Attention of decoding on GPUs, in Triton: one new position of each row against its own slot of the cache.

B rows, H query heads, Hkv key/value heads, G = H / Hkv of them together, D head dim, S cache places, P parts that a row's
places are dealt out to, so that few rows occupy the whole GPU (Dao et al., Flash-Decoding, 2023).
"""

import functools

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch's CPU builds come without it
    triton = None

PARTS = 16
BLOCK = 64  # places that a program reads at once

if triton is not None:

    @triton.jit
    def _attend_parts(q, k, v, k_cache, v_cache, slots, lengths, mixes, tops, sums, window, scale, slot_stride, place_stride,
                      head_stride, G: tl.constexpr, G_PADDED: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
                      BLOCK: tl.constexpr):
        """Softmax-weighted values over one part of a row's places, for the G query heads that share them."""
        row, head, part, heads = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
        length = tl.load(lengths + row)
        cache = tl.load(slots + row) * slot_stride + head * head_stride
        g, d, s = tl.arange(0, G_PADDED), tl.arange(0, D), tl.arange(0, BLOCK)
        queries = tl.load(q + ((row * heads + head) * G + g)[:, None] * D + d[None], mask=g[:, None] < G, other=0.0)
        queries = queries.to(tl.float32) * scale
        first = tl.where(window >= 0, tl.maximum(length - window, 0), 0)
        each = tl.cdiv(tl.cdiv(length - first, PARTS), BLOCK) * BLOCK
        start, end = first + part * each, tl.minimum(first + (part + 1) * each, length)
        top = tl.full((G_PADDED,), float("-inf"), tl.float32)
        total = tl.zeros((G_PADDED,), tl.float32)
        mix = tl.zeros((G_PADDED, D), tl.float32)
        if part == 0:  # the new position, whose key and value go to the cache
            key, value = tl.load(k + (row * heads + head) * D + d), tl.load(v + (row * heads + head) * D + d)
            tl.store(k_cache + cache + length * place_stride + d, key)
            tl.store(v_cache + cache + length * place_stride + d, value)
            top = tl.sum(queries * key.to(tl.float32)[None], axis=1)
            total += 1.0
            mix += value.to(tl.float32)[None]
        for at in range(start, end, BLOCK):
            there = at + s < end
            places = cache + (at + s)[:, None] * place_stride + d[None]
            keys = tl.load(k_cache + places, mask=there[:, None], other=0.0).to(tl.float32)
            values = tl.load(v_cache + places, mask=there[:, None], other=0.0).to(tl.float32)
            for_each_head = tl.sum(queries[:, None, :] * keys[None], axis=2)  # (G, BLOCK)
            scores = tl.where(there[None], for_each_head, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            weights, shrink = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
            mix = mix * shrink[:, None] + tl.sum(weights[:, :, None] * values[None], axis=1)
            total = total * shrink + tl.sum(weights, axis=1)
            top = higher
        place = ((row * heads + head) * G + g) * PARTS + part
        tl.store(tops + place, top, mask=g < G)
        tl.store(sums + place, total, mask=g < G)
        tl.store(mixes + place[:, None] * D + d[None], mix, mask=g[:, None] < G)

    @triton.jit
    def _join_parts(mixes, tops, sums, out, D: tl.constexpr, PARTS: tl.constexpr):
        """One head's parts -> its output; the first part is never empty."""
        head = tl.program_id(0)
        p, d = tl.arange(0, PARTS), tl.arange(0, D)
        top = tl.load(tops + head * PARTS + p)
        weights = tl.exp(top - tl.max(top, axis=0))
        total = tl.sum(weights * tl.load(sums + head * PARTS + p), axis=0)
        parts = tl.load(mixes + (head * PARTS + p)[:, None] * D + d[None])
        tl.store(out + head * D + d, (tl.sum(weights[:, None] * parts, axis=0) / total).to(out.dtype.element_ty))


@functools.cache
def works(device: torch.device) -> bool:
    """Whether a small problem comes out right on this device; Triton may be there without what it needs (a C compiler)."""
    q = torch.ones(1, 1, 1, 64, device=device)
    k_cache = torch.zeros(1, 4, 1, 64, device=device)
    try:
        out = attention(q, q, 3 * q, k_cache, k_cache.clone(), *torch.tensor([[0], [0]], device=device), -1)
        problem = "" if torch.equal(out, 3 * q) else "a wrong result"
    except Exception as error:  # Triton's errors have no common class
        problem = (str(error).splitlines() or [type(error).__name__])[0]
    if problem:
        print(f"decoding with PyTorch's attention, which is slower: the Triton kernel does not run here ({problem})", flush=True)
    return not problem


def fits(q: torch.Tensor) -> bool:
    """Whether `attention` takes queries like these: one a row, head dim a power of two."""
    D = q.size(-1)
    return triton is not None and q.size(1) == 1 and D >= 16 and D & (D - 1) == 0


def attention(q, k, v, k_cache, v_cache, slots, lengths, window: int) -> torch.Tensor:
    """Store k and v (B, 1, Hkv, D) in the caches (slots, S, Hkv, D) at each row's length; attend with q (B, 1, H, D)."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    B, _, H, D = q.shape
    Hkv = k.size(2)
    mixes = torch.empty(B, H, PARTS, D, dtype=torch.float32, device=q.device)
    tops, sums = torch.empty(2, B, H, PARTS, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    slot_stride, place_stride, head_stride, _ = k_cache.stride()
    _attend_parts[(B, Hkv, PARTS)](q, k, v, k_cache, v_cache, slots, lengths, mixes, tops, sums, window, D**-0.5, slot_stride,
                                   place_stride, head_stride, G=H // Hkv, G_PADDED=triton.next_power_of_2(H // Hkv), D=D,
                                   PARTS=PARTS, BLOCK=BLOCK)
    _join_parts[(B * H,)](mixes, tops, sums, out, D=D, PARTS=PARTS)
    return out
