"""Which adapters share a pass of the backbone: known before a round's first step, since all lengths are.

Packed rows need no company of their own length: the adapters with the most steps left go first, up to a number of
tokens. Padded rows are padded to the longest of the pass, so adapters whose next batches are about equally long go
together, however far each has come.
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
        packed: Rows are packed one after the other instead of padded.
        workers: The most passes that run side by side; with fewer jobs they have more threads each. A pass is many
            small operations, which threads share badly.
    """

    lanes: int
    tokens: int
    packed: bool = False
    workers: int = 1


def plan_passes(sizes: Sequence[Numbers], plan: LanePlan) -> list[list[int]]:
    """Plans all passes of some adapters.

    Args:
        sizes: For each adapter its batches' tokens, in the order of its steps: all real ones if rows are packed;
            else rows times the longest row, with equally many rows for all adapters.
        plan: Limits of a pass.

    Returns:
        The passes in order, each the numbers of the adapters that make their next step in it, ascending.
    """
    total = np.array([len(own) for own in sizes])
    done = np.zeros_like(total)
    choose = _choose_packed if plan.packed else _choose_padded
    passes = []
    while (done < total).any():
        live = np.flatnonzero(done < total)
        upcoming = np.array([sizes[number][done[number]] for number in live.tolist()])
        chosen = choose(upcoming, 1.0 - done[live] / total[live], plan)
        numbers = np.sort(live[chosen])
        done[numbers] += 1
        passes.append(numbers.tolist())
    return passes


def _choose_packed(upcoming: Numbers, left: NDArray[np.float64], plan: LanePlan) -> Numbers:
    """Indices of the adapters for one pass: those most behind, as many as fit."""
    order = np.argsort(-left, kind="stable")
    chosen, room = [order[0]], plan.tokens - upcoming[order[0]]
    for index in order[1:]:
        if len(chosen) == plan.lanes:
            break
        if upcoming[index] <= room:
            chosen.append(index)
            room -= upcoming[index]
    return np.array(chosen)


def _choose_padded(upcoming: Numbers, left: NDArray[np.float64], plan: LanePlan) -> Numbers:
    """Indices of the adapters for one pass: the one most behind and, of those not longer, the best company."""
    behind = np.flatnonzero(left == left.max())
    leader = behind[np.argmax(upcoming[behind])]
    longest = upcoming[leader]
    capacity = max(1, min(plan.lanes, plan.tokens // int(longest)))
    company = np.flatnonzero(upcoming <= longest)
    company = company[company != leader]
    cost = WEIGHT_OF_LENGTH * (longest - upcoming[company]) / longest - left[company]
    best = company[np.argsort(cost, kind="stable")][: capacity - 1]
    return np.append(best, leader)
