"""Generation: the KV cache, sampling, and the tool state machine.

B rows of a batch, T new positions, S cache positions, Hkv key/value heads, D head dim, L layers, V vocabulary.
"""

import random
from collections import deque
from dataclasses import dataclass, field

import torch

from nanochat.calculator import calculate
from nanochat.flash_attention import flash_attn


class KVCache:
    """Keys and values of every layer, with a length for each row; and each row's last embedding, for the smear."""

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int, device, dtype):
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.k_cache, self.v_cache = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.longest = 0  # the greatest length, known on the host
        self.last_embedding: torch.Tensor | None = None  # (B, C)

    @classmethod
    def for_model(cls, model, batch_size: int, seq_len: int) -> "KVCache":
        config = model.config
        return cls(batch_size, config.n_kv_head, seq_len, config.head_dim, config.n_layer, model.device, model.dtype)

    # --- used by the model ---

    def positions(self, T: int) -> torch.Tensor:
        """Positions (B, T) of the next T tokens of every row."""
        return self.lengths[:, None].long() + torch.arange(T, device=self.lengths.device)

    def shift_embeddings(self, x: torch.Tensor) -> torch.Tensor:
        """Each position's predecessor of x (B, T, C); zero before the first."""
        first = torch.zeros_like(x[:, 0]) if self.last_embedding is None else self.last_embedding
        self.last_embedding = x[:, -1].clone()
        return torch.cat((first[:, None], x[:, :-1]), dim=1)

    def layer(self, index: int) -> "_LayerCache":
        return _LayerCache(self, index)

    def advance(self, T: int) -> None:
        self.lengths += T
        self.longest += T

    # --- rows ---

    def set_row(self, row: int, source: "KVCache") -> None:
        """Copy a cache of one row into row `row`."""
        n = source.longest
        self.k_cache[:, row, :n], self.v_cache[:, row, :n] = source.k_cache[:, 0, :n], source.v_cache[:, 0, :n]
        self.lengths[row] = n
        self.longest = max(self.longest, n)
        if self.last_embedding is None:
            self.last_embedding = source.last_embedding.new_zeros(self.lengths.size(0), source.last_embedding.size(1))
        self.last_embedding[row] = source.last_embedding[0]


class _LayerCache:
    """One layer's view of the cache, as attention uses it."""

    def __init__(self, cache: KVCache, index: int):
        self.cache, self.index = cache, index

    def attend(self, q, k, v, window: int) -> torch.Tensor:
        """Store k and v (B, T, Hkv, D), attend with q (B, T, H, D)."""
        cache, T = self.cache, q.size(1)
        end = cache.longest + T
        k_cache, v_cache = cache.k_cache[self.index, :, :end], cache.v_cache[self.index, :, :end]
        if cache.longest == 0:  # nothing cached yet: plain causal attention, which has faster kernels
            k_cache[:], v_cache[:] = k, v
            return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        return flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache.lengths, causal=True,
                                                  window_size=(window, 0))


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float = 1.0,
                  top_k: int | None = None) -> torch.Tensor:
    """One token a row of logits (B, V) by inverting the cumulative distribution at uniforms (B,); argmax at 0."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and 0 < top_k < logits.size(-1):
        kept = logits.topk(top_k, dim=-1)
        cumulative = torch.softmax(kept.values, dim=-1).double().cumsum(dim=-1)
        choice = torch.searchsorted(cumulative, uniforms[:, None].double() * cumulative[:, -1:], right=True)
        return kept.indices.gather(1, choice.clamp(max=top_k - 1))[:, 0]
    cumulative = torch.softmax(logits, dim=-1).double().cumsum(dim=-1)
    choice = torch.searchsorted(cumulative, uniforms[:, None].double() * cumulative[:, -1:], right=True)
    return choice.clamp(max=logits.size(-1) - 1)[:, 0]


@dataclass
class Completion:
    """A generated continuation: tokens, mask (0 for tokens that the tool forced), and why it ended.

    finish_reason: "stop" (end of the answer), "length" (max_tokens), "context" (the context is full).
    """

    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class _Row:
    """One sequence under generation: its random numbers, its tool state, what is forced next."""

    def __init__(self, engine: "Engine", prompt: list[int], seed: str, max_tokens: int | None):
        self.engine, self.prompt = engine, prompt
        self.random = random.Random(seed)
        self.room = engine.context - len(prompt)
        self.max_tokens = max_tokens
        self.forced: deque[int] = deque()
        self.call: list[int] | None = None  # tokens of the tool call being written
        self.completion = Completion()

    @property
    def done(self) -> bool:
        return self.completion.finish_reason is not None

    def accept(self, sampled: int) -> tuple[int, int]:
        """The token that follows (a forced one instead of `sampled`, if any) and its mask; ends the row if it must."""
        mask = 0 if self.forced else 1
        token = self.forced.popleft() if self.forced else sampled
        if token in self.engine.stop_tokens:
            self.completion.finish_reason = "stop"
            return token, mask
        self.completion.tokens.append(token)
        self.completion.mask.append(mask)
        self._follow_tool(token)
        count = len(self.completion.tokens)
        if self.max_tokens is not None and count >= self.max_tokens:
            self.completion.finish_reason = "length"
        elif count >= self.room:
            self.completion.finish_reason = "context"
        return token, mask

    def _follow_tool(self, token: int) -> None:
        engine = self.engine
        if token == engine.python_start:
            self.call = []
        elif token == engine.python_end and self.call is not None:
            result = calculate(engine.tokenizer.decode(self.call))
            self.call = None
            if result is not None:
                self.forced.extend([engine.output_start, *engine.tokenizer.encode(result), engine.output_end])
        elif self.call is not None:
            self.call.append(token)


class Engine:
    """Generates with a model and its tokenizer; results depend on the seed, not on what else is in the batch."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.context = model.config.sequence_len
        special = tokenizer.encode_special
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.stop_tokens = {special("<|assistant_end|>"), special("<|bos|>")}
        self.finish_reasons: list[str | None] = []  # of the rows of the last `generate`

    def _prefill(self, prompt: list[int]) -> tuple[KVCache, torch.Tensor]:
        """A cache of one row that holds the prompt, and the logits (V,) after it."""
        if not 0 < len(prompt) <= self.context:
            raise ValueError(f"prompt of {len(prompt)} tokens, expected 1 to {self.context}")
        cache = KVCache.for_model(self.model, 1, len(prompt))
        idx = torch.tensor([prompt], device=self.model.device)
        return cache, self.model.next_logits(idx, cache)[0]

    @torch.inference_mode()
    def _run(self, rows: list[_Row], batch_size: int, temperature: float, top_k: int | None):
        """Generate all rows, `batch_size` at a time; a finished row's place is taken by the next one.

        Yields after each step [(row index, token, mask)] of the rows that took part.
        """
        waiting = deque(i for i, row in enumerate(rows) if not self._full(row))
        slots: list[int | None] = [None] * min(batch_size, len(waiting))
        if not slots:
            return
        limit = max(len(row.prompt) + min(row.room, row.max_tokens or row.room) for row in rows)
        cache = KVCache.for_model(self.model, len(slots), limit + 1)
        logits, prefilled = None, (None, None)
        while True:
            for slot, occupant in enumerate(slots):
                if occupant is None and waiting:
                    slots[slot] = index = waiting.popleft()
                    if prefilled[0] != rows[index].prompt:  # samples of one prompt share its prefill
                        prefilled = (rows[index].prompt, self._prefill(rows[index].prompt))
                    cache.set_row(slot, prefilled[1][0])
                    if logits is None:
                        logits = prefilled[1][1].new_zeros(len(slots), prefilled[1][1].size(-1))
                    logits[slot] = prefilled[1][1]
            if all(occupant is None for occupant in slots):
                return
            uniforms = torch.tensor([0.0 if i is None else rows[i].random.random() for i in slots], device=logits.device)
            sampled = sample_tokens(logits, uniforms, temperature, top_k).tolist()
            step, inputs = [], []
            for slot, index in enumerate(slots):
                token = 0
                if index is not None:
                    token, mask = rows[index].accept(sampled[slot])
                    step.append((index, token, mask))
                    if rows[index].done:
                        slots[slot] = None
                inputs.append(token)
            yield step
            self._drop_empty(cache, slots)
            if any(index is not None for index in slots):
                logits = self.model.next_logits(torch.tensor(inputs, device=logits.device)[:, None], cache).clone()

    @staticmethod
    def _full(row: _Row) -> bool:
        if row.room <= 0:
            row.completion.finish_reason = "context"
        elif row.max_tokens is not None and row.max_tokens <= 0:
            row.completion.finish_reason = "length"
        return row.done

    @staticmethod
    def _drop_empty(cache: KVCache, slots: list) -> None:
        """Rows without an occupant start over at length 0, so that they never outgrow the cache."""
        empty = [slot for slot, index in enumerate(slots) if index is None]
        if empty:
            cache.lengths[empty] = 0
            cache.longest = int(cache.lengths.max())

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None, seed: int = 42):
        """Continue one prompt `num_samples` times; yields (token_column, token_masks), one entry a sample.

        The column holds the closing special token of a sample when it ends, and -1 for it from then on. Why each
        ended is in `finish_reasons` afterwards.
        """
        rows = [_Row(self, tokens, f"{seed}-{i}", max_tokens) for i in range(num_samples)]
        self.finish_reasons = [None] * num_samples
        for step in self._run(rows, num_samples, temperature, top_k):
            column, masks = [-1] * num_samples, [0] * num_samples
            for index, token, mask in step:
                column[index], masks[index] = token, mask
            self.finish_reasons = [row.completion.finish_reason for row in rows]
            yield column, masks
        self.finish_reasons = [row.completion.finish_reason for row in rows]

    def generate_batch(self, tokens: list[int], num_samples: int = 1, **kwargs) -> tuple[list, list]:
        """(results, masks): prompt and continuation of each sample, without the closing token; prompts have mask 0."""
        kwargs.setdefault("batch_size", num_samples)
        completions = self.generate_many([tokens] * num_samples, **kwargs)
        return ([tokens + c.tokens for c in completions], [[0] * len(tokens) + c.mask for c in completions])

    def generate_many(self, prompts: list[list[int]], max_tokens: int | None = None, temperature: float = 1.0,
                      top_k: int | None = None, seed: int = 42, batch_size: int = 32) -> list[Completion]:
        """Continue many different prompts, `batch_size` at a time."""
        rows = [_Row(self, prompt, f"{seed}-{i}", max_tokens) for i, prompt in enumerate(prompts)]
        for _ in self._run(rows, batch_size, temperature, top_k):
            pass
        return [row.completion for row in rows]


class TextStream:
    """Turns tokens into text as they come, in whole characters only."""

    def __init__(self, tokenizer):
        self.tokenizer, self._pending = tokenizer, b""

    def push(self, token: int) -> str:
        """Text that became complete with this token; a multi-byte character comes when its last byte is there."""
        self._pending += self.tokenizer.decode_bytes([token])
        cut = len(self._pending)
        for back in range(1, min(4, cut) + 1):  # an unfinished character is at most three bytes long
            byte = self._pending[cut - back]
            if byte >= 0xC0:  # a lead byte: 2, 3 or 4 bytes long
                length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
                cut = cut - back if length > back else cut
                break
            if byte < 0x80:
                break
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text.decode("utf-8", errors="replace")

    def flush(self) -> str:
        """What is left at the end, unfinished characters replaced."""
        text, self._pending = self._pending.decode("utf-8", errors="replace"), b""
        return text
