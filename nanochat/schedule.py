"""Learning rate, Muon momentum and weight decay as pure functions of the optimizer step."""

import math


def warmdown_steps(num_iterations: int, warmdown_ratio: float) -> int:
    return round(warmdown_ratio * num_iterations)


def lr_multiplier(step: int, num_iterations: int, warmup_steps: int = 40, warmdown_ratio: float = 0.65,
                  final_lr_frac: float = 0.05) -> float:
    """Factor on every learning rate: linear warmup, constant, linear warmdown to `final_lr_frac`.

    lr_multiplier(0, 1000) -> 1/40; lr_multiplier(350, 1000) -> 1.0; lr_multiplier(1000, 1000) -> 0.05
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    warmdown = warmdown_steps(num_iterations, warmdown_ratio)
    left = min(1.0, max(0.0, (num_iterations - step) / warmdown)) if warmdown > 0 else 1.0
    return min(warmup, left + (1 - left) * final_lr_frac)


def muon_momentum(step: int, num_iterations: int, warmdown_ratio: float = 0.65) -> float:
    """0.85 rising to 0.97 over 400 steps, from there (or from what a short run has reached) to 0.90 in the warmdown."""
    start = num_iterations - warmdown_steps(num_iterations, warmdown_ratio)
    reached = 0.85 + (0.97 - 0.85) * min(1.0, min(step, start) / 400)
    if step <= start:
        return reached
    return reached + (0.90 - reached) * min(1.0, (step - start) / (num_iterations - start))


def weight_decay(step: int, num_iterations: int, initial: float) -> float:
    """Cosine from `initial` to 0."""
    return initial * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_iterations)))
