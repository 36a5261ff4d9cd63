"""Scores continuations under a model: many questions in a batch, what a question's rows share computed once, and the head
applied only where something is scored.

R rows of a batch, B questions, P positions that a question's rows share, S positions of their own, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.flash_attention import flash_attn

BATCH_TOKENS = {"cuda": 2**16, "cpu": 2**13}
HEAD_TOKENS = 512  # positions whose logits exist at once
WORTH_SHARING_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """Rows of tokens; of row i the tokens from starts[i] on are scored. The right row is `gold`."""

    rows: tuple[np.ndarray, ...]
    starts: tuple[int, ...]
    gold: int

    @property
    def shared(self) -> int:
        """Positions at the beginning that all rows have in common and that are not needed for their scores."""
        first, n = self.rows[0], min(min(self.starts) - 1, *(len(row) for row in self.rows))
        if len(self.rows) < 2:
            return 0
        for row in self.rows[1:]:
            differs = np.flatnonzero(first[:n] != row[:n])
            n = int(differs[0]) if len(differs) else n
        return n if n >= WORTH_SHARING_TOKENS else 0

    @property
    def cost(self) -> int:
        """Positions to compute: a row's last token is never read."""
        shared = self.shared
        return shared + sum(len(row) - 1 - shared for row in self.rows)


@dataclass(frozen=True)
class Score:
    """For each row of a question: mean loss of its scored tokens, and whether each of them was the likeliest."""

    losses: tuple[float, ...]
    hits: tuple[bool, ...]


def make_batches(questions: list[Question], budget: int, sharing: bool = True) -> list[list[int]]:
    """Indices of questions by batch: similar lengths together, at most `budget` positions with padding (or one question).

    Without `sharing` every row counts whole.
    """
    shared = [question.shared if sharing else 0 for question in questions]
    shapes = [(n, max(map(len, question.rows)) - n) for n, question in zip(shared, questions)]
    batches: list[list[int]] = []
    longest, rows = (0, 0), 0
    for i in sorted(range(len(questions)), key=lambda i: (shapes[i][0], shapes[i][1])):
        grown = tuple(map(max, longest, shapes[i]))
        more = rows + len(questions[i].rows)
        begun = shapes[batches[-1][0]][0] if batches else 0
        if (batches and (begun > 0) == (shapes[i][0] > 0)
                and (len(batches[-1]) + 1) * grown[0] + more * grown[1] <= budget):
            batches[-1].append(i)
            longest, rows = grown, more
        else:
            batches.append([i])
            longest, rows = shapes[i], len(questions[i].rows)
    return batches


class SharedPrefix:
    """Keys and values of what each question's rows share. It stands for the cache in the pass over the beginnings (B, P),
    and, once `continue_with` has said whose they are, in the pass over the rows' own positions (R, S)."""

    counts = ()  # neither all positions of a row are real, nor does one know how many

    def __init__(self, beginnings: torch.Tensor, lengths: torch.Tensor):
        self.beginnings, self.lengths, self.owner = beginnings, lengths, None
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._masks: dict[int, torch.Tensor] = {}

    def continue_with(self, owner: torch.Tensor) -> "SharedPrefix":
        """`owner` (R,): the question of each row."""
        self.owner = owner
        return self

    def for_pass(self) -> "SharedPrefix":
        return self

    def positions(self, T: int) -> torch.Tensor:
        first = torch.zeros_like(self.lengths) if self.owner is None else self.lengths[self.owner]
        return first[:, None] + torch.arange(T, device=first.device)

    def last_tokens(self) -> torch.Tensor:
        if self.owner is None:
            return torch.full_like(self.lengths, -1)
        return self.beginnings.gather(1, self.lengths[:, None] - 1)[self.owner, 0]

    def layer(self, index: int) -> "SharedPrefixLayer":
        return SharedPrefixLayer(self, index)

    def advance(self, idx: torch.Tensor) -> None:
        pass

    def mask(self, T: int, window: int) -> torch.Tensor:
        """(R, 1, T, P + T): a position sees the beginning that its row has, and its own row so far."""
        if window not in self._masks:
            places = torch.arange(self.beginnings.size(1), device=self.lengths.device).expand(len(self.owner), -1)
            real = places < self.lengths[self.owner, None]
            positions = self.positions(T)
            places = torch.cat((places, positions), dim=1)[:, None]  # (R, 1, P + T)
            seen = places <= positions[..., None]
            seen[..., :real.size(1)] &= real[:, None]
            if window >= 0:
                seen &= places >= positions[..., None] - window
            self._masks[window] = seen[:, None]
        return self._masks[window]


class SharedPrefixLayer:
    def __init__(self, prefix: SharedPrefix, index: int):
        self.prefix, self.index = prefix, index

    def attend(self, q, k, v, window: int) -> torch.Tensor:
        prefix = self.prefix
        if prefix.owner is None:
            prefix.keys.append(k)
            prefix.values.append(v)
            return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        k, v = (torch.cat((stored[self.index][prefix.owner], own), dim=1)
                for stored, own in ((prefix.keys, k), (prefix.values, v)))  # (R, P + S, Hkv, D)
        repeats = q.size(2) // k.size(2)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=prefix.mask(q.size(1), window))
        return out.transpose(1, 2)


def _padded(rows: list[np.ndarray], device) -> torch.Tensor:
    """(rows, longest), filled up with 0 on the right, where causal attention never looks."""
    idx = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        idx[i, :len(row)] = row
    return torch.from_numpy(idx).to(device)


@torch.inference_mode()
def score_batch(model, questions: list[Question]) -> list[Score]:
    """Scores of all rows of some questions."""
    shared = [question.shared for question in questions]
    rows = [(q, row, start, n) for q, (question, n) in enumerate(zip(questions, shared))
            for row, start in zip(question.rows, question.starts)]
    idx = _padded([row[n:-1] for _, row, _, n in rows], model.device)
    cache = None
    if any(shared):
        beginnings = _padded([question.rows[0][:n] for question, n in zip(questions, shared)], model.device)
        cache = SharedPrefix(beginnings, torch.tensor(shared, device=model.device))
        model.features(beginnings, cache)
        cache.continue_with(torch.tensor([q for q, *_ in rows], device=model.device))
    features = model.features(idx, cache)  # (R, S, C)
    places = [(r, place - 1 - n) for r, (_, row, start, n) in enumerate(rows) for place in range(start, len(row))]
    targets = torch.from_numpy(np.concatenate([row[start:] for _, row, start, _ in rows]).astype(np.int64)).to(model.device)
    r, s = torch.tensor(places, device=model.device).T
    losses, hits = [], []
    for wanted, target in zip(features[r, s].split(HEAD_TOKENS), targets.split(HEAD_TOKENS)):
        logits = model.logits(wanted)
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(dim=-1) == target)
    losses, hits = torch.cat(losses).tolist(), torch.cat(hits).tolist()
    scores, at = [], 0
    for question in questions:
        ends = [len(row) - start for row, start in zip(question.rows, question.starts)]
        spans = []
        for n in ends:
            spans.append((sum(losses[at:at + n]) / n, all(hits[at:at + n])))
            at += n
        scores.append(Score(*map(tuple, zip(*spans))))
    return scores
