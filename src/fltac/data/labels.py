"""Label columns as class numbers or real numbers, the same for a task's training and validation rows."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import ClassLabel
from numpy.typing import NDArray

from fltac.data.tasks import ResolvedTask
from fltac.errors import InputError

MOST_UNNAMED = 1000
"""Classes that bare numbers may make, unless there are more rows; beyond, they are ids, not classes."""

LabelArray = NDArray[np.int64] | NDArray[np.float32]


@dataclass(frozen=True)
class LabelColumn:
    """A label column as stored: ``[n]`` values and, for a hub class label, the names of its numbers."""

    values: pa.ChunkedArray
    class_names: tuple[str, ...] | None

    @classmethod
    def of(cls, values: pa.ChunkedArray, feature: object) -> "LabelColumn":
        names = tuple(feature.names) if isinstance(feature, ClassLabel) and feature.names else None
        return cls(values, names)


@dataclass(frozen=True)
class Labels:
    """What a task's label columns come to.

    Attributes:
        values: For each split int64 class numbers ``[n]``, or float32 for a regression.
        names: Names of the classes where there are any.
        outputs: Outputs that a head needs: the number of classes, or 1 for a regression.
    """

    values: dict[str, LabelArray]
    names: tuple[str, ...] | None
    outputs: int


def read_labels(task: ResolvedTask, columns: Mapping[str, LabelColumn]) -> Labels:
    """Turns label columns into numbers.

    Classes are those of ``labels`` in the config, else the hub's class names, else the sorted names among the
    training rows, else 0 up to the largest number among the training rows.

    Args:
        task: The task.
        columns: Split name to column; the first is the training split.

    Raises:
        InputError: a label is missing, unlabelled (-1), of the wrong type, outside the classes or not
            finite, or there is only one class.
    """
    for split, column in columns.items():
        _refuse_missing(task, split, column)
    if task.regression:
        return Labels({split: _numbers(task, split, column) for split, column in columns.items()}, None, 1)
    training = next(iter(columns.values()))
    by_name = task.labels is not None and (_is_text(training) or all(_is_whole(name) for name in task.labels))
    by_name = by_name or (training.class_names is None and _is_text(training))
    named = {split: _named(task, split, column, by_name) for split, column in columns.items()}
    numbers, own_names = next(iter(named.values()))
    names = task.labels or own_names
    if names is None:
        least = 2 if pa.types.is_boolean(training.values.type) else 0
        count = max(least, int(numbers.max()) + 1)
        if count > max(MOST_UNNAMED, len(numbers)):
            raise InputError(
                f"{task.key('label')}: the largest label is {count - 1}, but there are {len(numbers)} rows; "
                f"classes count from 0, or are listed in {task.key('labels')}"
            )
    else:
        count = len(names)
    values: dict[str, LabelArray] = {}
    for split, (numbers, own) in named.items():
        if own is None:
            _refuse_outside(task, split, numbers, count)
            values[split] = numbers
        else:
            values[split] = _mapped(task, split, numbers, own, names or tuple(str(n) for n in range(count)))
    if count < 2:
        raise InputError(f"{task.key('label')}: column {task.label!r} holds one class only; allowed are two or more")
    return Labels(values, names, count)


def _named(
    task: ResolvedTask, split: str, column: LabelColumn, by_name: bool
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """A column as numbers, with the names that these numbers stand for in this column, if any."""
    kind = column.values.type
    if column.class_names is not None:
        numbers = column.values.to_numpy().astype(np.int64)
        _refuse_outside(task, split, numbers, len(column.class_names))
        return numbers, column.class_names
    if _is_text(column) or (by_name and pa.types.is_integer(kind)):
        names, inverse = np.unique(np.array(column.values.to_pylist(), dtype=str), return_inverse=True)
        return inverse.astype(np.int64), tuple(names.tolist())
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return column.values.to_numpy(zero_copy_only=False).astype(np.int64), None
    raise InputError(
        f"{task.key('label')}: column {task.label!r} of the {split} split holds {kind}; allowed are "
        "whole numbers, true/false and names (metric: pearson makes a regression of real numbers)"
    )


def _mapped(
    task: ResolvedTask,
    split: str,
    numbers: NDArray[np.int64],
    own: tuple[str, ...],
    names: tuple[str, ...],
) -> NDArray[np.int64]:
    """Numbers in the order of ``own`` as numbers in the order of ``names``."""
    index = {name: number for number, name in enumerate(names)}
    table = np.array([index.get(name, -1) for name in own], dtype=np.int64)
    mapped: NDArray[np.int64] = table[numbers] if len(numbers) else numbers
    bad = np.flatnonzero(mapped < 0)
    if len(bad):
        row = int(bad[0])
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise InputError(f"{task.key('label')}: {split} row {row} has label {own[numbers[row]]!r}; allowed are {shown}")
    return mapped


def _numbers(task: ResolvedTask, split: str, column: LabelColumn) -> NDArray[np.float32]:
    kind = column.values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(
            f"{task.key('label')}: column {task.label!r} of the {split} split holds {kind}; "
            "metric pearson needs numbers"
        )
    values: NDArray[np.float32] = column.values.to_numpy().astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        row = int(bad[0])
        raise InputError(
            f"{task.key('label')}: {split} row {row} has label {column.values[row].as_py()}; allowed are finite numbers"
        )
    return values


def _refuse_missing(task: ResolvedTask, split: str, column: LabelColumn) -> None:
    if column.values.null_count:
        row = int(np.flatnonzero(column.values.is_null().to_numpy())[0])
        raise InputError(f"{task.key('label')}: {split} row {row} has no label in column {task.label!r}")


def _refuse_outside(task: ResolvedTask, split: str, numbers: NDArray[np.int64], count: int) -> None:
    bad = np.flatnonzero((numbers < 0) | (numbers >= count))
    if len(bad):
        row, highest = int(bad[0]), max(count - 1, 0)
        hint = " (-1 marks rows without a label)" if numbers[row] == -1 else ""
        raise InputError(
            f"{task.key('label')}: {split} row {row} has label {numbers[row]}{hint}; allowed are 0 to {highest}"
        )


def _is_text(column: LabelColumn) -> bool:
    return bool(pa.types.is_string(column.values.type) or pa.types.is_large_string(column.values.type))


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdigit()
