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
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "linear":
        return config.lr * (1.0 - done)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr


class LaneOptimizer:
    """One local training's optimizer for several lanes that started together.

    Lanes are ordered by their number of steps, the longest first, so that the lanes still training are always
    the first rows. All of them are at the same step, which is their own step count.
    """

    def __init__(self, config: TrainingConfig, values: Tensor, gradients: Tensor, steps: Sequence[int]) -> None:
        """Keeps references to ``values`` and ``gradients`` ``[lanes, width]``; ``steps`` is each lane's total."""
        self.config = config
        self.values = values
        self.gradients = gradients
        self.steps = steps
        self.step_number = 0
        self.received = values.clone() if config.prox else values
        self.first = torch.zeros_like(values)
        self.second = torch.zeros_like(values) if config.optimizer == "adamw" else self.first

    @torch.no_grad()
    def step(self, active: int) -> None:
        """One step of the first ``active`` lanes from their gradients, which are then zeroed."""
        config, w, g = self.config, self.values[:active], self.gradients[:active]
        if config.prox:
            g.add_(w - self.received[:active], alpha=config.prox)
        if config.clip_norm is not None:
            norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
            g.mul_((config.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        rates = [learning_rate(config, self.step_number, self.steps[lane]) for lane in range(active)]
        rate = torch.tensor(rates, dtype=w.dtype, device=w.device).unsqueeze(1)
        if config.optimizer == "adamw":
            self._adamw(w, g, rate, active)
        else:
            self._sgd(w, g, rate, active)
        g.zero_()
        self.step_number += 1

    def _adamw(self, w: Tensor, g: Tensor, rate: Tensor, active: int) -> None:
        """Decoupled weight decay (arXiv 1711.05101), as torch.optim.AdamW computes it."""
        m, v, count = self.first[:active], self.second[:active], self.step_number + 1
        if self.config.weight_decay:
            w.mul_(1.0 - rate * self.config.weight_decay)
        m.lerp_(g, 1.0 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1.0 - BETA2)
        denominator = v.sqrt().div_(math.sqrt(1.0 - BETA2**count)).add_(EPSILON)
        w.sub_(m / denominator * (rate / (1.0 - BETA1**count)))

    def _sgd(self, w: Tensor, g: Tensor, rate: Tensor, active: int) -> None:
        """Momentum and coupled weight decay, as torch.optim.SGD computes them."""
        if self.config.weight_decay:
            g = g + self.config.weight_decay * w
        if self.config.momentum:
            buffer = self.first[:active]
            g = buffer.copy_(g) if self.step_number == 0 else buffer.mul_(self.config.momentum).add_(g)
        w.sub_(rate * g)
