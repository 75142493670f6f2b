"""Which adapters share a pass of the backbone: known before a round's first step, since all lengths are.

The rows of a pass are padded to its longest row. So adapters whose next batches are about equally long go together,
however far each has come; the one with the most steps left decides, so that all come to their end together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

POOL = 64
"""Adapters held in memory and chosen from at a time."""
WEIGHT_OF_LENGTH = 3.0
"""How much a difference in length counts against one in steps left, both as shares."""


@dataclass(frozen=True)
class LanePlan:
    """How large a pass may be; chosen once for a run and stored with it, since it changes rounding.

    Attributes:
        lanes: The most adapters in a pass.
        tokens: The most tokens in a pass, padding included; a single adapter's batch may be larger.
    """

    lanes: int
    tokens: int


def plan_passes(lengths: Sequence[Numbers], rows: int, plan: LanePlan) -> list[list[int]]:
    """Plans all passes of some adapters.

    Args:
        lengths: For each adapter its batches' lengths in tokens, in the order of its steps.
        rows: Rows in every batch.
        plan: Limits of a pass.

    Returns:
        The passes in order, each the numbers of the adapters that make their next step in it, ascending.
    """
    total = np.array([len(own) for own in lengths])
    done = np.zeros_like(total)
    passes = []
    while (done < total).any():
        live = np.flatnonzero(done < total)
        upcoming = np.array([lengths[number][done[number]] for number in live.tolist()])
        chosen = _choose(upcoming, 1.0 - done[live] / total[live], rows, plan)
        numbers = np.sort(live[chosen])
        done[numbers] += 1
        passes.append(numbers.tolist())
    return passes


def _choose(upcoming: Numbers, left: NDArray[np.float64], rows: int, plan: LanePlan) -> Numbers:
    """Indices of the adapters for one pass: the one most behind and, of those not longer, the best company."""
    behind = np.flatnonzero(left == left.max())
    leader = behind[np.argmax(upcoming[behind])]
    longest = upcoming[leader]
    capacity = max(1, min(plan.lanes, plan.tokens // int(longest * rows)))
    company = np.flatnonzero(upcoming <= longest)
    company = company[company != leader]
    cost = WEIGHT_OF_LENGTH * (longest - upcoming[company]) / longest - left[company]
    best = company[np.argsort(cost, kind="stable")][: capacity - 1]
    return np.append(best, leader)
