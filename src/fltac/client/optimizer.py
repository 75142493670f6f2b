"""AdamW and SGD on a matrix whose rows are adapters that know nothing of each other.

Norms, moments, learning rates and weight decay act on rows, so that a lane gets what it would get alone.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fltac.config import TrainingConfig

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of a step of a round.

    Args:
        config: Gives the peak rate, the schedule and the warm-up.
        step: From 0.
        steps: Number of steps of this lane's round.

    Returns:
        With warm-up of w steps: ``lr * (step + 1) / (w + 1)`` before step w; then constant, or falling to 0 at
        ``steps`` along a line or half a cosine.
    """
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.peak_lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "linear":
        return config.peak_lr * (1.0 - done)
    if config.schedule == "cosine":
        return config.peak_lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.peak_lr


class LaneOptimizer:
    """The optimizer of several adapters, each at a step of its own."""

    def __init__(
        self, config: TrainingConfig, received: Tensor, steps: Sequence[int], frozen: Tensor | None = None
    ) -> None:
        """Prepares moments for all adapters.

        Args:
            config: The ``training`` section.
            received: ``[adapters, width]``, the values before the first step.
            steps: Each adapter's number of steps in this round.
            frozen: Columns that are not trained, int64; they enter no norm.
        """
        self.frozen = frozen
        self.config = config
        self.steps = steps
        self.done = [0] * len(steps)
        self.received = received.clone() if config.prox else received
        self.first = torch.zeros_like(received)
        self.second = torch.zeros_like(received) if config.optimizer == "adamw" else self.first

    @torch.no_grad()
    def step(self, numbers: Sequence[int], values: Tensor, gradients: Tensor) -> None:
        """One step of some adapters from their gradients, which are then zeroed.

        Args:
            numbers: Which adapters.
            values: ``[len(numbers), width]``, changed in place.
            gradients: The same shape.
        """
        config, w, g, rows = self.config, values, gradients, list(numbers)
        kept = None if self.frozen is None else w[:, self.frozen]
        if self.frozen is not None:
            g[:, self.frozen] = 0.0
        if config.prox:
            g.add_(w - self.received[rows], alpha=config.prox)
        if config.clip_norm is not None:
            norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
            g.mul_((config.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        rate = self._column([learning_rate(config, self.done[row], self.steps[row]) for row in rows], w)
        if config.optimizer == "adamw":
            self._adamw(w, g, rate, rows)
        else:
            self._sgd(w, g, rate, rows)
        if kept is not None:
            w[:, self.frozen] = kept  # Weight decay has moved it.
        g.zero_()
        for row in rows:
            self.done[row] += 1

    def _adamw(self, w: Tensor, g: Tensor, rate: Tensor, rows: list[int]) -> None:
        """Decoupled weight decay (arXiv 1711.05101), as torch.optim.AdamW computes it."""
        counts = [self.done[row] + 1 for row in rows]
        first_share = self._column([1.0 - BETA1**count for count in counts], w)
        second_root = self._column([math.sqrt(1.0 - BETA2**count) for count in counts], w)
        if self.config.weight_decay:
            w.mul_(1.0 - rate * self.config.weight_decay)
        m = self.first[rows].lerp_(g, 1.0 - BETA1)
        v = self.second[rows].mul_(BETA2).addcmul_(g, g, value=1.0 - BETA2)
        self.first[rows], self.second[rows] = m, v
        w.sub_(m / (v.sqrt_() / second_root).add_(EPSILON) * (rate / first_share))

    def _sgd(self, w: Tensor, g: Tensor, rate: Tensor, rows: list[int]) -> None:
        """Momentum and coupled weight decay, as torch.optim.SGD computes them."""
        if self.config.weight_decay:
            g = g + self.config.weight_decay * w
        if self.config.momentum:
            # From zero, the first step gives the gradient itself.
            g = self.first[rows].mul_(self.config.momentum).add_(g)
            self.first[rows] = g
        w.sub_(rate * g)

    @staticmethod
    def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).unsqueeze(1)
