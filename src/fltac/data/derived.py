"""Label spaces made from the same rows: groups of classes, and the turn that an image was given."""

import difflib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fltac.data.labels import LabelArray, Labels
from fltac.data.tasks import ResolvedTask
from fltac.errors import InputError
from fltac.seeding import generator

TURNS = ("0", "90", "180", "270")
"""Degrees against the clock; class number k is k quarter turns."""

TURNS_SEED = 0
"""Fixed: the turned images are a data set like any other, the same in runs of all seeds."""


def quarter_turns(split: str, count: int) -> NDArray[np.int64]:
    """By how many quarter turns each row of a split is turned.

    Args:
        split: Its name.
        count: Its rows.

    Returns:
        int64 ``[count]``, 0 to 3; the first of a longer split's are the same.
    """
    return generator(TURNS_SEED, "quarter-turns", client=split).integers(0, len(TURNS), size=count, dtype=np.int64)


def turn_labels(turns: dict[str, NDArray[np.int64]]) -> Labels:
    """The labels of turned images: their turns."""
    values: dict[str, LabelArray] = dict(turns)
    return Labels(values, TURNS, len(TURNS))


def grouped(task: ResolvedTask, labels: Labels) -> Labels:
    """Labels by the groups of ``task.classes``.

    Args:
        task: The task, with groups.
        labels: By the classes of its label column; those without names are called by their number.

    Raises:
        InputError: a group names a class that there is not, or a class stands in no group.
    """
    groups = task.classes or ()
    names = labels.names or tuple(map(str, range(labels.outputs)))
    number_of = {member: number for number, (_, members) in enumerate(groups) for member in members}
    for member in number_of:
        if member not in names:
            near = difflib.get_close_matches(member, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(names[:20])}"
            raise InputError(f"{task.key('classes')}: got {member!r}, which is no class of the label column; {hint}")
    for name in names:
        if name not in number_of:
            raise InputError(
                f"{task.key('classes')}: the class {name!r} stands in no group; every class has to stand in one"
            )
    table = np.array([number_of[name] for name in names], dtype=np.int64)
    values: dict[str, LabelArray] = {split: table[own.astype(np.int64)] for split, own in labels.values.items()}
    return replace(labels, values=values, names=tuple(group for group, _ in groups), outputs=len(groups))
