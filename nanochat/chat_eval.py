"""Accuracy of a chat model on a task: multiple choice by the logits of the letters, or generated answers."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from nanochat.engine import Engine


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers of a task, its standard error, and the accuracy above guessing on a scale to 1."""

    correct: int
    total: int
    baseline: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.total)

    @property
    def centered(self) -> float:
        """(accuracy - baseline) / (1 - baseline)."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)


def chatcore_metric(accuracies: dict[str, Accuracy], names) -> float | None:
    """Mean centered accuracy of the named tasks, None where one is missing."""
    return sum(accuracies[name].centered for name in names) / len(names) if set(names) <= set(accuracies) else None


def render_prompts(task, indices, tokenizer, limit: int) -> list[list[int]]:
    """The questions of some problems, of which those longer than `limit` tokens keep their end."""
    return [tokenizer.render_for_completion(task[i], max_tokens=limit) for i in indices]


@torch.inference_mode()
def _categorical_verdicts(model, tokenizer, task, indices, batch_size: int) -> list[bool]:
    """Compares the logits of the letters at the answer position; prompts of similar length share a batch."""
    prompts = render_prompts(task, indices, tokenizer, model.config.sequence_len)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    verdicts = [False] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        longest = max(len(prompts[i]) for i in batch)
        # padding on the right changes nothing before it, since attention is causal
        idx = torch.tensor([prompts[i] + [0] * (longest - len(prompts[i])) for i in batch], device=model.device)
        ends = torch.tensor([len(prompts[i]) - 1 for i in batch], device=model.device)
        features = model.features(idx)[torch.arange(len(batch), device=model.device), ends]
        conversations = [task[indices[i]] for i in batch]
        letters = sorted({letter for conversation in conversations for letter in conversation["letters"]})
        logits = model.logits(features, [tokenizer.encode(letter)[0] for letter in letters]).tolist()
        for i, conversation, row in zip(batch, conversations, logits):
            answer = max(conversation["letters"], key=lambda letter: row[letters.index(letter)])
            verdicts[i] = task.evaluate(conversation, answer)
    return verdicts


def _generative_verdicts(engine: Engine, task, indices, *, num_samples, max_new_tokens, temperature, top_k, batch_size,
                         seed) -> list[bool]:
    """Many problems at once; a problem is passed if one of its samples is right."""
    tokenizer = engine.tokenizer
    room = min(max_new_tokens, engine.context // 2)  # left for the answer; longer prompts keep their end
    prompts = render_prompts(task, indices, tokenizer, engine.context - room)
    completions = engine.generate_many([p for p in prompts for _ in range(num_samples)], max_tokens=max_new_tokens,
                                       temperature=temperature, top_k=top_k, seed=seed, batch_size=batch_size)
    texts = [tokenizer.decode(completion.tokens) for completion in completions]

    def passed(n: int) -> bool:
        return any(task.evaluate(task[indices[n]], text) for text in texts[n * num_samples:(n + 1) * num_samples])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # for tasks whose answers are programs, which run elsewhere
        return list(pool.map(passed, range(len(indices))))


def evaluate_task(model, tokenizer, task, runtime, *, max_problems: int | None = None, batch_size: int = 32,
                  num_samples: int = 1, max_new_tokens: int = 512, temperature: float = 0.0,
                  top_k: int | None = 50, seed: int = 42) -> Accuracy:
    """Accuracy over the first `max_problems` problems, shared among the ranks."""
    total = len(task) if max_problems is None else min(len(task), max_problems)
    indices = range(runtime.rank, total, runtime.world_size)
    if task.eval_type == "categorical":
        verdicts = _categorical_verdicts(model, tokenizer, task, indices, batch_size)
    else:
        verdicts = _generative_verdicts(Engine(model, tokenizer, graphs=True), task, indices, num_samples=num_samples,
                                        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                                        batch_size=batch_size, seed=seed)
    return Accuracy(int(runtime.sum(float(sum(verdicts)))), total, task.baseline)
