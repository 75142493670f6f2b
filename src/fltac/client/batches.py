"""Which rows a slot visits in a round, and in which batches: a fixed function of (seed, round, client, slot)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fltac.seeding import generator

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class BatchKey:
    """What the order of a slot's rows is drawn from."""

    seed: int
    round_number: int
    client: str
    slot: int


def hold_back(rows: Rows, share: float, seed: int, client: str, slot: int) -> tuple[Rows, Rows]:
    """Sets rows aside that are never trained on, the same in all rounds.

    Args:
        rows: ``[n]`` row numbers, n >= 1.
        share: Of the rows; with a share above 0 at least one is held back and at least one is left, as far as there
            are two.
        seed: Of the run.
        client: The client's id.
        slot: The slot, as in :class:`BatchKey`.

    Returns:
        The rows to train on and those held back, both in their order. They are chosen by place, so that the same rows
        are taken whatever their numbers are.
    """
    if share == 0 or len(rows) == 1:
        return rows, rows[:0]
    count = min(len(rows) - 1, max(1, round(share * len(rows))))
    held = np.zeros(len(rows), dtype=np.bool_)
    held[generator(seed, "held-back", client=client, slot=slot).permutation(len(rows))[:count]] = True
    return rows[~held], rows[held]


def visited_rows(rows: Rows, visits: int, key: BatchKey) -> Rows:
    """The rows that a round visits: shuffled passes over the slot's rows, cut after ``visits``.

    Args:
        rows: ``[n]`` row numbers of the task's training split, n >= 1.
        visits: Number of row visits, steps times batch size.
        key: What to draw the order from.

    Returns:
        ``[visits]``; where n < visits, rows come again, each pass in a new order.
    """
    draw = generator(key.seed, "batches", key.round_number, key.client, key.slot)
    passes = -(-visits // len(rows))
    return np.concatenate([draw.permutation(rows) for _ in range(passes)])[:visits]


def make_batches(
    rows: Rows,
    lengths: NDArray[np.int64],
    steps: int,
    batch_size: int,
    batching: Literal["shuffled", "length"],
    key: BatchKey,
) -> Rows:
    """Cuts a round's rows into batches.

    ``length`` sorts the same rows by length first, so that a batch holds rows of like length, then shuffles the
    batches. That shuffle is drawn from (seed, round) alone: slots with equally many steps take their short and
    their long batches at the same time, so that slots trained side by side are padded little.

    Args:
        rows: ``[n]`` row numbers.
        lengths: Tokens of every row of the split, indexed by row number.
        steps: Number of batches.
        batch_size: Rows in each.
        batching: How to order the rows.
        key: What to draw the order from.

    Returns:
        ``[steps, batch_size]`` row numbers.
    """
    visited = visited_rows(rows, steps * batch_size, key)
    if batching == "shuffled":
        return visited.reshape(steps, batch_size)
    ordered = visited[np.argsort(lengths[visited], kind="stable")].reshape(steps, batch_size)
    order: Rows = generator(key.seed, "batch-order", key.round_number).permutation(steps)
    return ordered[order]
