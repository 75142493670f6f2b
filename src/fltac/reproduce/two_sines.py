"""Two noisy sine tasks, and small fully connected nets on them: the experiment behind the paper's Fig. 3.

Task 0 is sin(x), task 1 is sin(x + 0.5) with larger noise. The hidden width of a net stands for the rank of an adapter.
Nets of one width train together, one batched product for all of them and all seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fltac.seeding import derive, generator

PHASES: Final = (0.0, 0.5)
NOISE: Final = (0.1, 0.3)
"""Standard deviation of the targets' noise; the paper says only that the second is larger."""
LEARNING_RATE: Final = 0.03
TEST_POINTS: Final = 200

ARMS: Final = ("one", "told", "two")
"""``one``: a net of width w that is given x alone. ``told``: the same, given the task's number as well. ``two``: a net
for each task, of the largest width at which both together have no more parameters than ``one``."""


@dataclass(frozen=True)
class Errors:
    """Mean squared errors against the sines without noise.

    Attributes:
        width: Hidden width of the one net.
        small: Hidden width of each of the two.
        of: Arm to float64 ``[seeds, tasks]``.
    """

    width: int
    small: int
    of: dict[str, NDArray[np.float64]]


def small_width(width: int) -> int:
    """The largest w with 2 (3 w + 1) <= 3 width + 1, which is below half the width."""
    return (3 * width - 1) // 6


def errors(width: int, seeds: Sequence[int], points: int, epochs: int) -> Errors:
    """Trains all arms at one width.

    Args:
        width: Of the one net, at least 3.
        seeds: Each draws its own data and its own nets.
        points: Training points of each task.
        epochs: Full-batch steps.
    """
    torch.set_num_threads(1)  # the products are too small to be shared out
    x, y = (torch.from_numpy(np.stack(part)) for part in zip(*(_data(seed, points) for seed in seeds), strict=True))
    grid = torch.linspace(-pi, pi, TEST_POINTS)[None, None, :, None].expand(len(seeds), 2, -1, 1)
    truth = torch.stack([torch.sin(grid[:, task, :, 0] + phase) for task, phase in enumerate(PHASES)], dim=1)
    small, out = small_width(width), {}
    for arm in ARMS:
        hidden = small if arm == "two" else width
        rows, targets, tests = _for_arm(arm, x, y, grid)
        draws = [torch.Generator().manual_seed(derive(seed, f"two-sines-{arm}-{width}")) for seed in seeds]
        answers = trained(rows, targets, tests, hidden, epochs, draws).reshape(len(seeds), 2, TEST_POINTS)
        out[arm] = ((answers - truth) ** 2).mean(dim=2).double().numpy()
    return Errors(width, small, out)


def _data(seed: int, points: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Inputs and noisy targets, float32 ``[tasks, points, 1]`` and ``[tasks, points]``."""
    draw = generator(seed, "two-sines-data")
    x = draw.uniform(-pi, pi, (2, points))
    y = np.sin(x + np.array(PHASES)[:, None]) + np.array(NOISE)[:, None] * draw.standard_normal((2, points))
    return x[..., None].astype(np.float32), y.astype(np.float32)


def _for_arm(arm: str, x: Tensor, y: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nets' training rows ``[nets, rows, inputs]``, targets ``[nets, rows]`` and test rows ``[nets, rows, inputs]``."""
    if arm == "two":
        return x.flatten(0, 1), y.flatten(0, 1), grid.flatten(0, 1)
    if arm == "told":
        x, grid = _numbered(x), _numbered(grid)
    return x.flatten(1, 2), y.flatten(1, 2), grid.flatten(1, 2)


def _numbered(x: Tensor) -> Tensor:
    """With the task's number, -1 or 1, as a second input."""
    number = torch.tensor([-1.0, 1.0])[None, :, None, None].expand(*x.shape[:3], 1)
    return torch.cat([x, number], dim=3)


def trained(
    rows: Tensor, targets: Tensor, tests: Tensor, hidden: int, epochs: int, draws: Sequence[torch.Generator]
) -> Tensor:
    """Answers of the trained nets on the test rows: ``[nets, rows]``. One hidden layer, tanh, Adam, MSE.

    Args:
        rows: ``[nets, rows, inputs]``.
        targets: ``[nets, rows]``.
        tests: ``[nets, rows, inputs]``.
        hidden: Width.
        epochs: Full-batch steps.
        draws: Of the first weights, each for as many nets that follow one another.
    """
    nets, inputs = rows.shape[0], rows.shape[2]
    bound, each = inputs**-0.5, nets // len(draws)
    shapes = (((each, inputs, hidden), bound), ((each, 1, hidden), bound), ((each, hidden, 1), hidden**-0.5))
    weights = []
    for shape, limit in shapes:
        drawn = torch.cat([torch.rand(shape, generator=draw) for draw in draws])
        weights.append(((2 * drawn - 1) * limit).requires_grad_())
    weights.append(torch.zeros(nets, 1, 1, requires_grad=True))
    first, shift, second, offset = weights

    def answers(x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(x @ first + shift) @ second + offset
        return out.squeeze(2)

    adam = torch.optim.Adam(weights, LEARNING_RATE)
    for _ in range(epochs):
        adam.zero_grad()
        # A sum over nets of each one's mean: no net's gradient depends on how many there are.
        loss = ((answers(rows) - targets) ** 2).mean(dim=1).sum()
        torch.autograd.backward(loss)
        adam.step()
    with torch.no_grad():
        return answers(tests)
