"""Generation: many sequences at once over a fixed number of cache slots, with tools, stop strings and prefix reuse.

B rows of one pass, T new positions, V vocabulary.
"""

import bisect
import random
from collections import deque
from dataclasses import dataclass, field

import torch

from nanochat.answer import AnswerStream, TextStream, join_pieces  # noqa: F401  users look for them here
from nanochat.calculator import calculate
from nanochat.decode_graph import DecodeGraphs
from nanochat.hardware import free_memory_bytes
from nanochat.kv_cache import KVCache
from nanochat.sampling import sample_tokens

CHUNK_TOKENS = {"cuda": 2048, "cpu": 128}  # prompt tokens of one step, so that long prompts do not stall the others,
OFFLINE_FACTOR = 8  # and so many times that where nobody waits for the others' next word
MAX_SLOTS = {"cuda": 256, "cpu": 64}  # on CPUs as many rows as the C kernels take, which sum alike in every batch
MEMORY_SHARE = {"cuda": 0.85, "cpu": 0.5}  # of what is free, for the cache
MIN_ANSWER_TOKENS = 32  # room that a conversation leaves for the answer
WORTH_SHARING_TOKENS = 16  # a common beginning at least so long decides which slot a prompt goes to


@dataclass(frozen=True)
class Request:
    """What to generate; `stop` strings end the text and are left out of it, `text` asks for text beside tokens."""

    prompt: list[int]
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | str = 42
    stop: tuple[str, ...] = ()
    text: bool = False


@dataclass
class Completion:
    """A generated continuation: tokens, mask (0 for tokens that the tool forced), the `closing` token that ended it (no part
    of it; None where none did), and why it ended.

    finish_reason: "stop" (end of the answer, or a stop string), "length" (max_tokens), "context" (the context is full),
    "cancelled". pieces: the text by parts, where text or stop strings were asked for.
    """

    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    closing: int | None = None
    pieces: list[tuple[str, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)


class Sequence:
    """One request under generation: its random numbers, its tool state, what is forced next."""

    def __init__(self, engine: "Engine", request: Request):
        self.engine, self.request = engine, request
        self.random = random.Random(request.seed)
        self.tokens = list(request.prompt)  # prompt and continuation
        self.limit = min(engine.context - len(self.tokens),
                         engine.context if request.max_tokens is None else request.max_tokens)
        self.reused = 0  # tokens of the prompt that were in the cache already
        self.completion = Completion()
        self.answer = AnswerStream(engine.tokenizer, request.stop) if request.stop or request.text else None
        self.forced: deque[int] = deque()
        self.call: list[int] | None = None  # tokens of the tool call being written
        if self.limit <= 0:
            self._finish_by_length()

    @property
    def done(self) -> bool:
        return self.completion.finish_reason is not None

    def accept(self, sampled: int) -> tuple[int, int]:
        """The token that follows (a forced one instead of `sampled`, if any) and its mask; ends the row if it must."""
        mask = 0 if self.forced else 1
        token = self.forced.popleft() if self.forced else sampled
        if token in self.engine.stop_tokens:
            self.completion.closing = token
            self.finish("stop")
            return token, mask
        self.tokens.append(token)
        self.completion.tokens.append(token)
        self.completion.mask.append(mask)
        self._follow_tool(token)
        if self.answer is not None:
            self.completion.pieces += self.answer.push(token)
            if self.answer.stopped:
                self.finish("stop")
                return token, mask
        if len(self.completion.tokens) >= self.limit:
            self._finish_by_length()
        return token, mask

    def finish(self, reason: str) -> None:
        if self.answer is not None:
            self.completion.pieces += self.answer.flush()
            reason = "stop" if self.answer.stopped and reason != "cancelled" else reason
        self.completion.finish_reason = reason

    def _finish_by_length(self) -> None:
        self.finish("context" if len(self.tokens) >= self.engine.context else "length")

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


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with in common: ([1, 2, 3], [1, 2, 4, 5]) -> 2."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return bisect.bisect_left(range(1, shorter + 1), True, key=lambda n: a[:n] != b[:n])


def prompt_limit(context: int, max_tokens: int) -> int:
    """Tokens that a conversation may take of the context, so that an answer of up to a quarter of it has room."""
    return max(1, context - min(max_tokens, max(MIN_ANSWER_TOKENS, context // 4)))


class Engine:
    """Generates with a model and its tokenizer; a sequence depends on its seed, not on what else is in the batch.

    `submit` requests, `step` until they are done; or use `generate`, `generate_batch`, `generate_many`, which do that.
    With `slots` the cache is made at once, for the whole context, as many slots as memory allows; without, as needed.
    `graphs`: decode by CUDA graphs, which take a moment to make; left out, where `slots` are given. For one thread only.
    """

    def __init__(self, model, tokenizer, slots: int | None = None, graphs: bool | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.use_graphs = model.device.type == "cuda" and (slots is not None if graphs is None else graphs)
        self.context = model.config.sequence_len
        self.chunk_tokens = CHUNK_TOKENS.get(model.device.type, 128) * (OFFLINE_FACTOR if slots is None else 1)
        special = tokenizer.encode_special
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.stop_tokens = {special("<|assistant_end|>"), special("<|bos|>")}
        self.finish_reasons: list[str | None] = []  # of the rows of the last `generate`
        self.waiting: deque[Sequence] = deque()
        self.cache: KVCache | None = None
        self.reused_tokens = self.prefilled_tokens = 0
        if slots is not None:
            self._reserve(slots, self.context)

    # --- slots ---

    @torch.inference_mode()
    def _reserve(self, slots: int, length: int) -> None:
        """Have at least so many slots of at least this length, or as many as memory allows."""
        if self.cache is not None and self.cache.batch_size >= slots and self.cache.seq_len >= length:
            return
        if self.cache is not None:
            if any(self.occupants):
                return  # the running ones keep their places; the others wait
            slots, length = max(slots, self.cache.batch_size), max(length, self.cache.seq_len)
            self.cache = self.graphs = None
        device = self.model.device
        room = MEMORY_SHARE.get(device.type, 0.5) * free_memory_bytes(device)
        slots = max(1, min(slots, MAX_SLOTS.get(device.type, 64), int(room / KVCache.slot_bytes(self.model, length)) - 1))
        self.cache = KVCache.for_model(self.model, slots, length)
        self.graphs = DecodeGraphs(self.model, self.cache) if self.use_graphs else None
        self.occupants: list[Sequence | None] = [None] * slots
        self.held: list[list[int]] = [[] for _ in range(slots)]  # tokens that free slots still hold
        self.since = [0] * slots  # the step at which each became free, or was taken
        self.steps = 0

    def _place(self, prompt: list[int], free: list[int]) -> tuple[int, int, int] | None:
        """(slot, slot to copy from, tokens of the prompt that it has), None if waiting for others' work pays."""
        wanted = prompt[:-1]  # the last one is computed in any case: its logits are needed
        oldest = min(free, key=lambda slot: (len(self.held[slot]) > 0, self.since[slot]))
        shared = {slot: common_prefix(self.held[slot], wanted) for slot in free}
        best = max(free, key=shared.get)
        if shared[best] < WORTH_SHARING_TOKENS:
            best = oldest
        others = {slot: common_prefix(other.tokens, wanted) for slot, other in enumerate(self.occupants) if other}
        source = max(others, key=others.get, default=best)
        if others.get(source, 0) >= shared[best] + WORTH_SHARING_TOKENS:
            if self.cache.lengths[source] < others[source]:
                return None
            return oldest, source, others[source]
        return best, best, shared[best]

    def _admit(self) -> None:
        free = [slot for slot, occupant in enumerate(self.occupants) if occupant is None]
        for sequence in list(self.waiting):
            if not free:
                return
            place = self._place(sequence.tokens, free)
            if place is None:
                continue
            slot, source, length = place
            self.cache.set_row(slot, length, sequence.tokens[length - 1], source)
            sequence.reused = length
            self.reused_tokens += length
            self.waiting.remove(sequence)
            self.occupants[slot], self.since[slot] = sequence, self.steps
            free.remove(slot)

    def _release(self, slot: int) -> None:
        self.held[slot] = self.occupants[slot].tokens[:self.cache.lengths[slot]]
        self.occupants[slot], self.since[slot] = None, self.steps

    def forget(self) -> None:
        """The weights have changed: what free slots hold of earlier prompts is of no use any more."""
        assert not self.busy
        if self.cache is not None:
            self.held = [[] for _ in self.held]

    # --- steps ---

    def submit(self, request: Request) -> Sequence:
        """Queue a request; it is `done` at once where there is no room for a single token."""
        if not 0 < len(request.prompt) <= self.context:
            raise ValueError(f"prompt of {len(request.prompt)} tokens, expected 1 to {self.context}")
        sequence = Sequence(self, request)
        if not sequence.done:
            self._reserve(1, min(self.context, len(sequence.tokens) + sequence.limit))
            self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now; its slot is free from then on."""
        if sequence.done:
            return
        sequence.finish("cancelled")
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.occupants:
            self._release(self.occupants.index(sequence))

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or self.active > 0

    @property
    def active(self) -> int:
        """Slots at work."""
        return 0 if self.cache is None else sum(occupant is not None for occupant in self.occupants)

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, int, int]]:
        """Let waiting sequences in, read a piece of the new prompts, add a token to all others -> (sequence, token, mask)s."""
        self.steps += 1
        self._admit()
        self._prefill()
        return self._decode()

    def _left(self, slot: int) -> int:
        """Tokens of a slot's sequence that are not in the cache yet."""
        return len(self.occupants[slot].tokens) - self.cache.lengths[slot]

    def _prefill(self) -> None:
        """Compute a piece of the prompts, all but their last token, within the budget of a step."""
        slots = [slot for slot, occupant in enumerate(self.occupants) if occupant and self._left(slot) > 1]
        if not slots:
            return
        budget = self.chunk_tokens
        # short prompts first, which are soon done; every other step the one that has been there longest
        slots.sort(key=self._left if self.steps % 2 else self.since.__getitem__)
        T = min(budget, self._left(slots[0]) - 1)
        slots = slots[:max(1, budget // T)]
        counts = [min(T, self._left(slot) - 1) for slot in slots]
        T = max(counts)
        chunks = []
        for slot, count in zip(slots, counts):
            start = self.cache.lengths[slot]
            chunks.append(self.occupants[slot].tokens[start:start + count] + [0] * (T - count))
        rows = self.cache.rows(slots, None if min(counts) == T else counts)
        self.model.features(torch.tensor(chunks, device=self.model.device), rows)
        self.prefilled_tokens += sum(counts)

    def _decode(self) -> list[tuple[Sequence, int, int]]:
        slots = [slot for slot, occupant in enumerate(self.occupants) if occupant and self._left(slot) == 1]
        if not slots:
            return []
        sequences = [self.occupants[slot] for slot in slots]
        tokens, requests = [sequence.tokens[-1] for sequence in sequences], [s.request for s in sequences]
        if self.graphs is not None:
            logits = self.graphs.next_logits(tokens, slots)
        else:
            logits = self.model.next_logits(torch.tensor(tokens, device=self.model.device)[:, None],
                                            self.cache.rows(slots))
        sampled = sample_tokens(logits, [s.random.random() for s in sequences], [r.temperature for r in requests],
                                [r.top_k for r in requests], [r.top_p for r in requests]).tolist()
        events = [(sequence, *sequence.accept(token)) for sequence, token in zip(sequences, sampled)]
        for slot, sequence in zip(slots, sequences):
            if sequence.done:
                self._release(slot)
        return events

    # --- whole generations ---

    def _submit_all(self, requests: list[Request], batch_size: int) -> list[Sequence]:
        if requests:
            longest = max(len(r.prompt) + (self.context if r.max_tokens is None else r.max_tokens) for r in requests)
            self._reserve(min(batch_size, len(requests)), min(self.context, longest))
        return [self.submit(request) for request in requests]

    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None, seed: int = 42, top_p: float = 1.0):
        """Continue one prompt `num_samples` times; yields (token_column, token_masks), one entry a sample.

        The column holds the closing special token of a sample when it ends, and -1 for it from then on. Why each
        ended is in `finish_reasons` afterwards.
        """
        sequences = self._submit_all([Request(tokens, max_tokens, temperature, top_k, top_p, f"{seed}-{i}")
                                      for i in range(num_samples)], num_samples)
        queues: list[deque] = [deque() for _ in sequences]
        self.finish_reasons = [None] * num_samples
        try:
            while any(queues) or not all(s.done for s in sequences):
                if not all(queue or s.done for queue, s in zip(queues, sequences)):
                    for sequence, token, mask in self.step():
                        if sequence in sequences:
                            queues[sequences.index(sequence)].append((token, mask))
                    continue
                column = [queue.popleft() if queue else (-1, 0) for queue in queues]
                self.finish_reasons = [None if q else s.completion.finish_reason for q, s in zip(queues, sequences)]
                yield [token for token, _ in column], [mask for _, mask in column]
            self.finish_reasons = [s.completion.finish_reason for s in sequences]
        finally:
            for sequence in sequences:
                self.cancel(sequence)

    def generate_batch(self, tokens: list[int], num_samples: int = 1, **kwargs) -> tuple[list, list]:
        """(results, masks): prompt and continuation of each sample, without the closing token; prompts have mask 0."""
        kwargs.setdefault("batch_size", num_samples)
        completions = self.generate_many([tokens] * num_samples, **kwargs)
        return ([tokens + c.tokens for c in completions], [[0] * len(tokens) + c.mask for c in completions])

    def generate_many(self, prompts: list[list[int]], max_tokens: int | None = None, temperature: float = 1.0,
                      top_k: int | None = None, seed: int = 42, batch_size: int = 32, top_p: float = 1.0,
                      stop: tuple[str, ...] = ()) -> list[Completion]:
        """Continue many different prompts, `batch_size` at a time."""
        return self.complete([Request(prompt, max_tokens, temperature, top_k, top_p, f"{seed}-{i}", stop)
                              for i, prompt in enumerate(prompts)], batch_size)

    def complete(self, requests: list[Request], batch_size: int = 32) -> list[Completion]:
        """Answer requests of all kinds, `batch_size` at a time."""
        sequences = self._submit_all(requests, batch_size)
        while not all(sequence.done for sequence in sequences):
            self.step()
        return [sequence.completion for sequence in sequences]
