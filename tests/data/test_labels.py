"""Label columns as numbers."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Value

from fltac.config import TaskConfig
from fltac.data.labels import LabelColumn, Labels, read_labels
from fltac.data.tasks import resolve_task
from fltac.errors import InputError


def column(values: list[Any], names: list[str] | None = None, kind: pa.DataType | None = None) -> LabelColumn:
    feature = ClassLabel(names=names) if names else Value("int64")
    return LabelColumn.of(pa.chunked_array([pa.array(values, kind)]), feature)


def read(*columns: LabelColumn, **settings: Any) -> Labels:
    task = resolve_task("t", TaskConfig(kind="text", path="a", columns=["x"], label="y", **settings), None)
    return read_labels(task, dict(zip(("train", "validation"), columns, strict=False)))


def values(labels: Labels) -> list[list[float]]:
    return [array.tolist() for array in labels.values.values()]


def test_whole_numbers() -> None:
    labels = read(column([0, 2, 1]), column([2, 0]))
    assert values(labels) == [[0, 2, 1], [2, 0]]
    assert (labels.names, labels.outputs) == (None, 3)
    assert all(array.dtype == np.int64 for array in labels.values.values())


def test_booleans_are_two_classes_even_where_one_is_absent() -> None:
    labels = read(column([False, False]), column([True]))
    assert (values(labels), labels.outputs) == ([[0, 0], [1]], 2)


def test_class_labels_keep_the_hubs_order() -> None:
    labels = read(column([1, 0], ["zebra", "ape"]), column([1], ["zebra", "ape"]))
    assert (values(labels), labels.names, labels.outputs) == ([[1, 0], [1]], ("zebra", "ape"), 2)


def test_class_labels_in_another_order_in_validation_are_matched_by_name() -> None:
    labels = read(column([1, 0], ["zebra", "ape"]), column([1, 0], ["ape", "zebra"]))
    assert values(labels) == [[1, 0], [0, 1]]


def test_names_are_sorted() -> None:
    labels = read(column(["pos", "neg", "pos"]), column(["neg"]))
    assert (values(labels), labels.names, labels.outputs) == ([[1, 0, 1], [0]], ("neg", "pos"), 2)


def test_names_in_the_configs_order() -> None:
    assert values(read(column(["pos", "neg"]), labels=["pos", "neg"])) == [[0, 1]]
    assert values(read(column([0, 1], ["neg", "pos"]), labels=["pos", "neg"])) == [[1, 0]]


def test_names_in_the_config_for_numbers() -> None:
    labels = read(column([0, 1]), labels=["no", "yes", "maybe"])
    assert (values(labels), labels.names, labels.outputs) == ([[0, 1]], ("no", "yes", "maybe"), 3)


def test_numbers_that_do_not_start_at_0_are_classes_where_the_config_lists_them() -> None:
    assert values(read(column([-1, 1, 1]), labels=["-1", "1"])) == [[0, 1, 1]]
    assert values(read(column([5, 1]), column([3]), labels=["1", "3", "5"])) == [[2, 0], [1]]


def test_a_validation_file_whose_names_all_look_like_numbers() -> None:
    assert values(read(column(["1", "one"]), column([1]))) == [[0, 1], [0]]


def test_regression() -> None:
    labels = read(column([1.5, 2]), column([4, 0]), metric="pearson")
    assert (values(labels), labels.names, labels.outputs) == ([[1.5, 2.0], [4.0, 0.0]], None, 1)
    assert all(array.dtype == np.float32 for array in labels.values.values())


@pytest.mark.parametrize(
    ("columns", "settings", "expected"),
    [
        ([column([0, -1, 1])], {}, "tasks.t.label: train row 1 has label -1 (-1 marks rows without a label); "
         "allowed are 0 to 1"),
        ([column([0, -1], ["a", "b"])], {}, "train row 1 has label -1 (-1 marks rows without a label); "
         "allowed are 0 to 1"),
        ([column([0, 1]), column([0, 1, 2])], {}, "validation row 2 has label 2; allowed are 0 to 1"),
        ([column([0, 2])], {"labels": ["no", "yes"]}, "train row 1 has label 2; allowed are 0 to 1"),
        ([column(["a", "b"]), column(["a", "c"])], {}, "validation row 1 has label 'c'; allowed are a, b"),
        ([column(["a", "b"])], {"labels": ["a", "x"]}, "train row 1 has label 'b'; allowed are a, x"),
        ([column([1, 7])], {"labels": ["1", "2"]}, "train row 1 has label '7'; allowed are 1, 2"),
        ([column([0, 10**9])], {}, "tasks.t.label: the largest label is 1000000000, but there are 2 rows"),
        ([column([0, None, 1])], {}, "tasks.t.label: train row 1 has no label in column 'y'"),
        ([column([None, "a"])], {}, "train row 0 has no label in column 'y'"),
        ([column([0.0, 1.0])], {}, "column 'y' of the train split holds double; allowed are whole numbers"),
        ([column([1, 1, 1], kind=pa.int64()), column([1])], {"labels": ["1"]}, "holds one class only"),
        ([column(["a", "a"])], {}, "tasks.t.label: column 'y' holds one class only; allowed are two or more"),
        ([column([0, 0])], {}, "holds one class only"),
        ([column([0.5, float("nan")])], {"metric": "pearson"}, "train row 1 has label nan; allowed"),
        ([column([0.5]), column([float("inf")])], {"metric": "pearson"}, "validation row 0 has label inf"),
        ([column(["a"])], {"metric": "pearson"}, "column 'y' of the train split holds string; metric"),
    ],
)  # fmt: skip
def test_wrong_labels(columns: list[LabelColumn], settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as error:
        read(*columns, **settings)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
