"""The cache of keys and values: a fixed number of slots, each with a length of its own.

N slots, B rows of one forward pass, T new positions, S cache places, Hkv key/value heads, D head dim, L layers.
"""

import torch

from nanochat.flash_attention import flash_attn


class KVCache:
    """Keys and values of every layer for `batch_size` slots; and each slot's last token, for the smear.

    Given to the model it stands for all its slots in order; `rows` picks some. Slot N, one more than asked for, takes
    what padding writes.
    """

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int, device, dtype):
        shape = (num_layers, batch_size + 1, num_heads, seq_len, head_dim)  # a head's places lie next to each other
        self.k_cache, self.v_cache = (torch.zeros(shape, device=device, dtype=dtype).transpose(2, 3) for _ in range(2))
        self.batch_size, self.seq_len = batch_size, seq_len
        self.lengths = [0] * batch_size  # the host's copy
        self._lengths = torch.zeros(batch_size + 1, dtype=torch.int64, device=device)
        self._last_tokens = torch.full((batch_size + 1,), -1, dtype=torch.int64, device=device)  # -1: none yet

    @classmethod
    def for_model(cls, model, batch_size: int, seq_len: int) -> "KVCache":
        config = model.config
        return cls(batch_size, config.n_kv_head, seq_len, config.head_dim, config.n_layer, model.device, model.dtype)

    @staticmethod
    def slot_bytes(model, seq_len: int) -> int:
        """Memory of one slot."""
        config = model.config
        return 2 * config.n_layer * seq_len * config.n_kv_head * config.head_dim * model.dtype.itemsize

    def rows(self, slots: list[int], counts: list[int] | None = None) -> "CacheRows":
        """These slots for one forward pass; `counts`: how many of the T positions each row really has (None: all)."""
        return CacheRows(self, slots, counts)

    def set_row(self, slot: int, length: int, last_token: int, source: int | None = None) -> None:
        """Make a slot hold its own first `length` places, or those of slot `source`; `last_token` is the last of them."""
        if source is not None and source != slot:
            for cache in (self.k_cache, self.v_cache):
                cache[:, slot, :length] = cache[:, source, :length]
        self.lengths[slot] = length
        self._lengths[slot] = length
        self._last_tokens[slot] = last_token if length else -1

    def for_pass(self) -> "CacheRows":
        return self.rows(list(range(self.batch_size)))

    def forget_spare(self) -> None:
        """Empty the spare slot, which otherwise fills up with padding."""
        self._lengths[-1:].zero_()


class CacheRows:
    """Rows of a cache in one forward pass; `for_pass`, `positions`, `last_tokens`, `layer`, `advance` serve the model."""

    def __init__(self, cache: KVCache, slots: list[int], counts: list[int] | None):
        device = cache._lengths.device
        self.cache, self.slots, self.counts = cache, slots, counts
        self.slot_index = torch.tensor(slots, device=device)  # (B,)
        self.count_index = None if counts is None else torch.tensor(counts, device=device)
        self.lengths = cache._lengths[self.slot_index]  # (B,)
        self.shortest = min(cache.lengths[slot] for slot in slots)
        self.longest = max(cache.lengths[slot] for slot in slots)

    @classmethod
    def on_device(cls, cache: KVCache, slot_index: torch.Tensor) -> "CacheRows":
        """Rows whose slots (B,) only the device knows, each with one new position; the host's lengths are the caller's."""
        rows = cls.__new__(cls)
        rows.cache, rows.slots, rows.counts, rows.slot_index, rows.count_index = cache, [], None, slot_index, None
        rows.lengths = cache._lengths[slot_index]
        rows.shortest, rows.longest = 0, cache.seq_len - 1
        return rows

    def for_pass(self) -> "CacheRows":
        return self

    def positions(self, T: int) -> torch.Tensor:
        """Positions (B, T) of the new tokens."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def last_tokens(self) -> torch.Tensor:
        """The token (B,) before the first new one, -1 where there is none."""
        return self.cache._last_tokens[self.slot_index]

    def layer(self, index: int) -> "LayerCache":
        return LayerCache(self, self.cache.k_cache[index], self.cache.v_cache[index])

    def advance(self, idx: torch.Tensor) -> None:
        """Count the tokens of idx (B, T) as cached."""
        cache, T = self.cache, idx.size(1)
        counts = T if self.count_index is None else self.count_index
        last = idx[:, -1] if self.count_index is None else idx.gather(1, self.count_index[:, None] - 1)[:, 0]
        cache._lengths[self.slot_index] = self.lengths + counts
        cache._last_tokens[self.slot_index] = last
        for row, slot in enumerate(self.slots):
            cache.lengths[slot] += T if self.counts is None else self.counts[row]


class LayerCache:
    """One layer's keys and values (N + 1, S, Hkv, D) for the rows of a pass."""

    def __init__(self, rows: CacheRows, k_cache: torch.Tensor, v_cache: torch.Tensor):
        self.rows, self.k_cache, self.v_cache = rows, k_cache, v_cache

    def attend(self, q, k, v, window: int) -> torch.Tensor:
        """Store k and v (B, T, Hkv, D), attend with q (B, T, H, D)."""
        rows, T = self.rows, q.size(1)
        if T == 1 and rows.counts is None:
            end = rows.longest + 1
            return flash_attn.flash_attn_with_kvcache(
                q, self.k_cache[:, :end], self.v_cache[:, :end], k, v, cache_seqlens=rows.lengths,
                cache_batch_idx=rows.slot_index, causal=True, window_size=(window, 0))
        self._store(k, v)
        if rows.longest == 0:  # nothing cached before: plain causal attention, which has faster kernels
            return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        start = max(0, rows.shortest - window) if window >= 0 else 0
        end = min(rows.longest + T, self.k_cache.size(1))
        return flash_attn.flash_attn_with_kvcache(
            q, self.k_cache[:, start:end], self.v_cache[:, start:end], cache_seqlens=rows.lengths + T - start,
            cache_batch_idx=rows.slot_index, causal=True, window_size=(window, 0))

    def _store(self, k, v) -> None:
        """Write k and v to their places; those of padding to the spare slot."""
        rows, T = self.rows, k.size(1)
        slots, places = rows.slot_index[:, None].expand(-1, T), rows.positions(T)
        if rows.count_index is not None:
            real = torch.arange(T, device=places.device) < rows.count_index[:, None]
            slots, places = torch.where(real, slots, self.k_cache.size(0) - 1), torch.where(real, places, 0)
        self.k_cache[slots, places], self.v_cache[slots, places] = k, v
