"""Reinforcement learning: sampled answers, their rewards, and the policy gradient.

On-policy REINFORCE (Williams 1992) with the mean reward of a question's answers as baseline, and one weight for every token
of a step, as in DAPO (arXiv 2503.14476): no reference model, no clipping, since each answer is learnt from once, by the model
that wrote it.

B answers, T tokens.
"""

from dataclasses import dataclass
from math import comb

import torch

from nanochat.chat_eval import render_prompts
from nanochat.checkpoint_manager import build_from_state
from nanochat.engine import Engine, Request
from nanochat.scaling import CPU_PIECE_TOKENS

LENGTH_STEPS = 8  # lengths that batches are padded to


@dataclass(frozen=True)
class Settings:
    """How answers are sampled; the same distribution is learnt."""

    num_samples: int  # answers a question
    max_new_tokens: int
    temperature: float
    top_k: int | None
    batch_size: int  # answers written at a time


@dataclass(frozen=True)
class Sample:
    """A question and an answer: tokens, whether the model chose each (the one that closes the answer included; not the
    question, not what the tool said), the reward, and how far that is above the mean of the question's answers."""

    tokens: list[int]
    chosen: list[int]
    reward: float
    advantage: float
    text: str


class Sampler:
    """Writes answers with a model under training, from a copy of it in the compute dtype."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.copy = build_from_state(model.config, model.state_dict(), model.device, model.dtype).for_inference()
        self.engine = Engine(self.copy, tokenizer, graphs=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights as they are now, in place: captured graphs stay valid."""
        for mine, trained in zip(self.copy.parameters(), self.model.parameters(), strict=True):
            mine.copy_(trained)
        self.engine.forget()

    def sample(self, task, numbers: list[int], settings: Settings, seed: int | str) -> list[list[Sample]]:
        """Answers to some problems of a task, by problem. An answer depends on the seed and the problem's number alone,
        not on which others are asked along with it."""
        engine, n = self.engine, settings.num_samples
        room = min(settings.max_new_tokens, engine.context // 2)
        prompts = render_prompts(task, numbers, engine.tokenizer, engine.context - room)
        requests = [Request(prompt, settings.max_new_tokens, settings.temperature, settings.top_k, seed=f"{seed}-{number}-{i}")
                    for number, prompt in zip(numbers, prompts) for i in range(n)]
        completions = engine.complete(requests, settings.batch_size)
        groups = []
        for place, number in enumerate(numbers):
            answers = completions[place * n:(place + 1) * n]
            texts = [engine.tokenizer.decode(answer.tokens) for answer in answers]
            rewards = [task.reward(task[number], text) for text in texts]
            mean = sum(rewards) / n if len(set(rewards)) > 1 else rewards[0]
            groups.append([_make_sample(prompts[place], answer, reward, reward - mean, text)
                           for answer, reward, text in zip(answers, rewards, texts)])
        return groups


def _make_sample(prompt, answer, reward, advantage, text) -> Sample:
    closing = [] if answer.closing is None else [answer.closing]
    return Sample(prompt + answer.tokens + closing, [0] * len(prompt) + answer.mask + [1] * len(closing), reward, advantage,
                  text)


def is_informative(group: list[Sample]) -> bool:
    """Whether a question's answers teach something: not when all are as good."""
    return any(sample.advantage for sample in group)


def collate(samples: list[Sample], rows: int, length_step: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs (B, T), targets (B, T; -1 where the model had no choice), and on the host the advantage of each target, in their
    order. B is filled up to `rows` and T to a multiple of `length_step`, so that few shapes are compiled."""
    T = -(-(max(len(sample.tokens) for sample in samples) - 1) // length_step) * length_step
    inputs, targets = torch.zeros(rows, T, dtype=torch.int64), torch.full((rows, T), -1)
    advantages = []
    for row, sample in enumerate(samples):
        tokens, chosen = torch.tensor(sample.tokens), torch.tensor(sample.chosen[1:], dtype=torch.bool)
        inputs[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, :len(tokens) - 1] = torch.where(chosen, tokens[1:], -1)
        advantages += [sample.advantage] * int(chosen.sum())
    return inputs.to(device), targets.to(device), torch.tensor(advantages, dtype=torch.float64)


def policy_gradient(model, samples: list[Sample], tokens: float, device_batch_size: int, settings: Settings,
                    scaler=None) -> torch.Tensor:
    """Add the gradient of this rank's share of the loss to the parameters -> that share.

    loss = - sum of advantage x log-probability over the tokens that the model chose / `tokens`, their number in the whole
    step on all ranks. The log-probabilities are those of the distribution that was sampled from.
    """
    total, context = torch.zeros((), device=model.device), model.config.sequence_len
    rows = min(device_batch_size, max(1, CPU_PIECE_TOKENS // context)) if model.device.type == "cpu" else device_batch_size
    useful = sorted((s for s in samples if s.advantage and any(s.chosen)), key=lambda s: len(s.tokens))  # similar lengths together
    for start in range(0, len(useful), rows):
        inputs, targets, advantages = collate(useful[start:start + rows], rows, -(-context // LENGTH_STEPS), model.device)
        log_probabilities = model.log_probabilities(inputs, targets, settings.temperature, settings.top_k)
        loss = -(advantages.to(log_probabilities) * log_probabilities).sum() / tokens
        total += loss.detach()
        (loss if scaler is None else scaler.scale(loss)).backward()
    for parameter in model.parameters():  # ranks that had nothing to learn from take part in the sums
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return total


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Probability that one of k answers is right, from how many of `samples` were (Chen et al., arXiv 2107.03374)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)
