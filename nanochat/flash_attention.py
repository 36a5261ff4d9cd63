"""One attention interface, Flash Attention's, over the backends that this machine can run.

B batch, T queries, S cache positions, H query heads, Hkv key/value heads (H a multiple of Hkv), D head dim.
`window_size=(w, 0)`: each position sees itself and the w positions before it; w = -1 means all of them.
"""

import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanochat import cpu_kernels, gpu_kernels
from nanochat.common import UserError, print0


# --- sdpa: PyTorch's scaled dot product attention, on every device ------------------------------------------------


def _heads_first(q, k, v):
    """(B, T, H, D) -> (B, H, T, D), with key/value heads repeated for grouped queries."""
    repeats = q.size(2) // k.size(2)
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _sdpa(q, k, v, causal, window_size):
    q, k, v = _heads_first(q, k, v)
    window = window_size[0]
    if window < 0 or window >= q.size(2) - 1 or not causal:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        out = _sdpa_windowed(q, k, v, window)
    return out.transpose(1, 2)


def _sdpa_windowed(q, k, v, window):
    """Causal attention over `window` previous positions and the own one, (B, H, T, D).

    The sequence is folded into blocks of `window`: a block's queries see their own block and the one before, so the
    cost is linear in T and no T x T mask exists.
    """
    B, H, T, D = q.shape
    if window == 0:
        return v
    pad = -T % window
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    blocks = q.size(2) // window
    first = F.scaled_dot_product_attention(q[:, :, :window], k[:, :, :window], v[:, :, :window], is_causal=True)

    def fold(x):  # (B, H, blocks, w, D) -> (B * (blocks - 1), H, w, D), block 0 left out
        return x.transpose(1, 2)[:, 1:].reshape(B * (blocks - 1), H, -1, D)

    queries, keys, values = (x.view(B, H, blocks, window, D) for x in (q, k, v))
    previous = [torch.cat((x.roll(1, dims=2), x), dim=3) for x in (keys, values)]  # (B, H, blocks, 2w, D)
    query, key = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)[None]
    mask = (key >= query) & (key <= query + window)
    rest = F.scaled_dot_product_attention(fold(queries), *map(fold, previous), attn_mask=mask)
    rest = rest.view(B, blocks - 1, H, window, D).transpose(1, 2).reshape(B, H, -1, D)
    return torch.cat((first, rest), dim=2)[:, :, :T]


def _sdpa_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, causal, window_size):
    B, T = q.shape[:2]
    new = torch.arange(T, device=q.device)
    positions = cache_seqlens[:, None].long() + (new if k is not None else new - T)  # (B, T)
    rows = torch.arange(B, device=q.device)[:, None] if cache_batch_idx is None else cache_batch_idx[:, None].long()
    if k is not None:
        k_cache[rows, positions], v_cache[rows, positions] = k, v
    window = window_size[0]
    if T == 1 and causal and 0 <= window < k_cache.size(1) - 1:  # each row's window alone
        columns = (positions - window).clamp(min=0) + torch.arange(window + 1, device=q.device)  # (B, w + 1)
        keys, values = k_cache[rows, columns], v_cache[rows, columns]
    else:
        columns = torch.arange(k_cache.size(1), device=q.device)[None]
        keys, values = (k_cache, v_cache) if cache_batch_idx is None else (k_cache[rows[:, 0]], v_cache[rows[:, 0]])
    last = positions if causal else positions[:, -1:].expand(B, T)
    mask = columns[:, None] <= last[..., None]  # (B, T, S)
    if window >= 0:
        mask &= columns[:, None] >= positions[..., None] - window
    q, keys, values = _heads_first(q, keys, values)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None]).transpose(1, 2)


# --- c: our kernel for CPUs, two to three times as fast in bf16 ----------------------------------------------------


def _c(q, k, v, causal, window_size):
    return cpu_kernels.attention(q, k, v, window_size[0]) if causal else _sdpa(q, k, v, causal, window_size)


C = SimpleNamespace(name="c", usable=lambda device, dtype: device.type == "cpu" and cpu_kernels.trains(dtype), func=_c)
SDPA = SimpleNamespace(name="sdpa", usable=lambda device, dtype: True, func=_sdpa)
BACKENDS = (C, SDPA)  # best first


# --- choice -------------------------------------------------------------------------------------------------------


def _runs(backend, device, dtype) -> bool:
    """Launch a small windowed problem: a backend that loads is not yet a backend that runs."""
    q = torch.ones(1, 8, 1, 64, device=device, dtype=dtype)
    try:
        out = backend.func(q, q, q, True, (2, 0))
        return bool(torch.isfinite(out).all())
    except (RuntimeError, ImportError, NotImplementedError) as error:
        print0(f"attention backend {backend.name} does not run here ({str(error).splitlines()[0]})")
        return False


_chosen: dict = {}  # (device type, dtype) -> backend


def choose_backend(device_type: str, dtype: torch.dtype):
    """The best backend that runs on this device, chosen once; $NANOCHAT_ATTENTION names one instead."""
    if (device_type, dtype) not in _chosen:
        _chosen[device_type, dtype] = _choose_backend(device_type, dtype)
    return _chosen[device_type, dtype]


def _choose_backend(device_type: str, dtype: torch.dtype):
    wanted = os.environ.get("NANOCHAT_ATTENTION")
    names = [b.name for b in BACKENDS]
    if wanted and wanted not in names:
        raise UserError(f"NANOCHAT_ATTENTION={wanted}: expected one of {', '.join(names)}")
    device = torch.device(device_type)
    for backend in BACKENDS:
        if wanted in (None, "", backend.name) and backend.usable(device, dtype) and _runs(backend, device, dtype):
            return backend
    raise UserError(f"no attention backend runs on {device_type} in {dtype}"
                    + (f"; unset NANOCHAT_ATTENTION={wanted}" if wanted else ""))


def flash_attn_func(q, k, v, causal: bool = True, window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:
    """Attention of q (B, T, H, D) over k and v (B, T, Hkv, D) -> (B, T, H, D)."""
    return choose_backend(q.device.type, q.dtype).func(q, k, v, causal, window_size)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, cache_batch_idx=None,
                            causal: bool = True, window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:
    """Write k and v (B, T, Hkv, D) into the caches (N, S, Hkv, D) at each row's length, then attend -> (B, T, H, D).

    `cache_seqlens` (B,): how many places of each row are filled before this call; without k and v, how many are filled
    with the queries' own, which are then the last T. `cache_batch_idx` (B,): each row's place in the caches.
    """
    if not (q.is_cuda and k is not None and causal and gpu_kernels.fits(q) and gpu_kernels.works(q.device)):
        return _sdpa_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, causal, window_size)
    rows = torch.arange(q.size(0), device=q.device) if cache_batch_idx is None else cache_batch_idx.long()
    return gpu_kernels.attention(q, k, v, k_cache, v_cache, rows, cache_seqlens.long(), window_size[0])


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
