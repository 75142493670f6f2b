"""What all rows of a client have in common, whatever their task: a client effect that the tasks' adapters share.

Purposes used: ``client-labels`` (client = client id, slot = class number), ``client-rows`` (client = client id and
task) and ``client-quarter`` (client = client id).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fltac.config.data import ClientSkew
from fltac.errors import InputError
from fltac.seeding import generator

KEY = "federation.partition.client_skew"
QUARTERS = 4

Rows = NDArray[np.int64]
Choose = Callable[[str, str, Rows], NDArray[np.bool_]]
"""Client, task and ``[n]`` rows to which of them are kept."""


def keep_own(
    rows: Mapping[tuple[str, str], Rows],
    skew: ClientSkew,
    seed: int,
    labels: Mapping[str, NDArray[Any]],
    lengths: Mapping[str, NDArray[np.int64]] | None,
) -> dict[tuple[str, str], Rows]:
    """Leaves of each client's rows those that are typical of this client; the others are in nobody's hands.

    Args:
        rows: (client, task) to ``[n]`` row numbers.
        skew: ``labels``: a client keeps a row of class c with a probability that it draws for c once, for all its
            tasks (exponential, over the largest of the task's classes: label shares ~ Dirichlet(1)). ``length``: it
            keeps the rows in one quarter of the task's lengths, the same quarter in all its tasks.
        seed: Of the federation.
        labels: Task to the labels of all its training rows.
        lengths: Task to their tokens; needed for ``length``.

    Raises:
        InputError: the lengths are not known or all equal, or a regression has no classes.
    """
    if skew == "none":
        return dict(rows)
    choose = _by_label(seed, labels) if skew == "labels" else _by_length(seed, lengths)
    kept = {(client, task): own[choose(client, task, own)] for (client, task), own in rows.items()}
    return {key: own for key, own in kept.items() if len(own)}


def _by_label(seed: int, labels: Mapping[str, NDArray[Any]]) -> Choose:
    for task, values in labels.items():
        if np.issubdtype(values.dtype, np.floating):
            raise InputError(f"{KEY}: got 'labels', but task {task} is a regression; allowed are none, length")

    def choose(client: str, task: str, own: Rows) -> NDArray[np.bool_]:
        classes = np.unique(labels[task])
        wish = np.array([generator(seed, "client-labels", client=client, slot=int(c)).exponential() for c in classes])
        keep = (wish / wish.max())[np.searchsorted(classes, labels[task][own])]
        draws = generator(seed, "client-rows", client=f"{client}/{task}").random(len(own))
        return np.asarray(draws < keep)

    return choose


def _by_length(seed: int, lengths: Mapping[str, NDArray[np.int64]] | None) -> Choose:
    if lengths is None:
        raise InputError(f"{KEY}: got 'length', which needs encoded rows; allowed here are none, labels")
    for task, values in lengths.items():
        if values.min() == values.max():
            raise InputError(
                f"{KEY}: got 'length', but all rows of task {task} are equally long; allowed: none, labels"
            )

    def choose(client: str, task: str, own: Rows) -> NDArray[np.bool_]:
        quarter = int(generator(seed, "client-quarter", client=client).integers(QUARTERS))
        # By rank, so that a quarter is a quarter of the rows however many are equally long.
        rank = np.argsort(np.argsort(lengths[task], kind="stable"))
        return np.asarray(rank[own] * QUARTERS // len(rank) == quarter)

    return choose
