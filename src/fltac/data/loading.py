"""A task's training and validation rows, from the hub, from local files or built in, checked and chosen."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, Value
from numpy.typing import NDArray
from PIL import Image as PillowImage

from fltac.data.derived import grouped, quarter_turns, turn_labels
from fltac.data.files import Loader, local_splits, quiet_datasets
from fltac.data.labels import LabelArray, LabelColumn, Labels, read_labels
from fltac.data.tasks import ResolvedTask
from fltac.errors import InputError
from fltac.seeding import generator

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
DEFAULT_VALIDATION = 0.1


@dataclass(frozen=True)
class RawSplit:
    """Chosen rows of one split.

    Attributes:
        task: The task.
        name: The split that the rows were read from.
        data: The task's columns.
        labels: ``[n]`` int64 class numbers, or float32.
        rows: ``[n]`` the rows' numbers in that split, from 0.
        folder: What paths inside the data are relative to.
        turns: ``[n]`` int64, by how many quarter turns against the clock each image is to be turned; None: by none.
    """

    task: ResolvedTask
    name: str
    data: Dataset
    labels: LabelArray
    rows: NDArray[np.int64]
    folder: Path
    turns: NDArray[np.int64] | None = None

    def where(self, row: int) -> str:
        """Names a row of ``data`` as the user can find it."""
        return f"task {self.task.name}: {self.name} row {self.rows[row]}"


@dataclass(frozen=True)
class RawTask:
    """A task's rows before encoding; ``outputs`` is the number of classes, or 1 for a regression."""

    task: ResolvedTask
    train: RawSplit
    validation: RawSplit
    label_names: tuple[str, ...] | None
    outputs: int


def load_rows(task: ResolvedTask, seed: int) -> RawTask:
    """Loads a task.

    Where there is no validation split, a seeded share of the training rows is held out; ``max_rows`` then
    takes the next rows of the same seeded order for training. ``max_validation_rows`` takes rows of a seeded order of
    the validation rows. Errors count rows from 0.

    Raises:
        InputError: the data cannot be read, a split or column is missing, a split is empty, a text is
            missing, or a label is not allowed.
    """
    splits = open_splits(task)
    training = _split(task, splits, task.train_split, "train_split")
    name, validation = _validation(task, splits)
    found = {task.train_split: training}
    if validation is not None:
        found[name] = validation
    places = {split: _matching(task, split, data) for split, data in found.items()}
    # A fixed function of split and row, whatever is filtered.
    turns = {split: quarter_turns(split, len(data))[places[split]] for split, data in found.items()}
    found = {
        split: data if len(places[split]) == len(data) else data.select(places[split]) for split, data in found.items()
    }
    for split, data in found.items():
        _check_columns(task, split, data, places[split])
    labels = turn_labels(turns) if task.transform else _labels(task, found)
    if task.classes is not None:
        labels = grouped(task, labels)
    training = found[task.train_split]
    validation = None if validation is None else found[name]
    train_rows, held_out = choose_rows(task, len(training), validation is None, seed)
    validation_rows = held_out if validation is None else np.arange(len(validation))
    if task.max_validation_rows is not None:
        order = generator(seed, "validation-rows", client=task.name).permutation(len(validation_rows))
        validation_rows = np.sort(validation_rows[order[: task.max_validation_rows]])

    def raw(split: str, rows: NDArray[np.int64]) -> RawSplit:
        data = found[split].select_columns(list(task.columns))
        whole = len(rows) == len(data)
        chosen = data if whole else data.select(rows)
        path = task.validation_path if split != task.train_split and task.validation_path else task.path
        own = turns[split][rows] if task.transform else None
        return RawSplit(task, split, chosen, labels.values[split][rows], places[split][rows], _folder(path), own)

    return RawTask(task, raw(task.train_split, train_rows), raw(name, validation_rows), labels.names, labels.outputs)


def choose_rows(
    task: ResolvedTask, count: int, hold_out: bool, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chooses training and held-out rows from one seeded order of all ``count`` training rows.

    Returns:
        Row numbers of the training rows and of those held out for validation, each ascending.

    Raises:
        InputError: holding out leaves no training row.
    """
    order = generator(seed, "validation-split", client=task.name).permutation(count)
    share = task.validation or DEFAULT_VALIDATION
    held = max(1, round(share * count)) if hold_out else 0
    if held >= count:
        raise InputError(
            f"{task.key('validation')}: holding out {share} of {count} training rows leaves none for training"
        )
    return np.sort(order[held:][: task.max_rows]), np.sort(order[:held])


def open_splits(task: ResolvedTask) -> dict[str, Loader]:
    """The splits of a task's data, each with a function that reads it.

    Raises:
        InputError: the data cannot be found.
    """
    if task.builtin is not None:
        return {"train": lambda: _builtin(task.builtin or "")}
    if task.path is not None:
        return local_splits(Path(task.path), task.path_key, task.train_split, _text_columns(task))
    try:
        with quiet_datasets():
            found = datasets.load_dataset(task.hub, task.subset)
    except Exception as error:  # network, authentication, scripts, unknown subsets: each has its own exception
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise InputError(
            f"{task.key('hub')}: {task.source!r} could not be loaded ({reason}); "
            f"with data_root= (presets) or {task.key('path')}= it is read from local files"
        ) from error
    return {name: _constant(data) for name, data in found.items()}


def _constant(data: Dataset) -> Loader:
    return lambda: data


def _builtin(name: str) -> Dataset:
    """Greyscale digits as PNG images, which is lossless."""
    from fltac.data.digits import task_rows

    images, labels = task_rows(name)
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        PillowImage.fromarray(image).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    return Dataset.from_dict({"image": encoded, "label": labels.tolist()}, features=features)


def _validation(task: ResolvedTask, splits: Mapping[str, Loader]) -> tuple[str, Dataset | None]:
    """The validation split's name and rows; the training split's name and None where rows are held out."""
    if task.validation_path is not None:
        key, name = task.key("validation_path"), "validation" if task.train_split != "validation" else "rest"
        found = local_splits(Path(task.validation_path), key, name, _text_columns(task))
        if name not in found:
            raise InputError(f"{key}: {task.validation_path!r} has the splits {', '.join(found)}, but no {name}")
        return name, _filled(task, name, found[name]())
    if task.validation_split is not None:
        if task.validation_split == task.train_split:
            raise InputError(
                f"{task.key('validation_split')}: {task.validation_split!r} is the training split as well; "
                f"{task.key('validation')}=0.1 holds out a share of it"
            )
        return task.validation_split, _split(task, splits, task.validation_split, "validation_split")
    if task.validation is None:
        for name in VALIDATION_NAMES:
            if name in splits and name != task.train_split:
                return name, _split(task, splits, name, "validation_split")
    return task.train_split, None


def _split(task: ResolvedTask, splits: Mapping[str, Loader], name: str, field: str) -> Dataset:
    if name not in splits:
        raise InputError(f"{task.key(field)}: {task.source!r} has no split {name!r}; it has {', '.join(splits)}")
    return _filled(task, name, splits[name]())


def _filled(task: ResolvedTask, name: str, data: Dataset) -> Dataset:
    if len(data) == 0:
        raise InputError(f"tasks.{task.name}: the split {name!r} of {task.source!r} has no rows")
    return data


def _text_columns(task: ResolvedTask) -> tuple[str, ...]:
    return () if task.kind == "image" else (*task.columns, *task.filter)


def _matching(task: ResolvedTask, split: str, data: Dataset) -> NDArray[np.int64]:
    """Numbers of the rows that the task's filter leaves."""
    chosen = np.ones(len(data), dtype=bool)
    for name, value in task.filter.items():
        if name not in data.column_names:
            raise InputError(
                f"{task.key('filter')}: the {split} split of {task.source!r} has no column {name!r}; "
                f"it has {', '.join(data.column_names)}"
            )
        feature, stored = data.features[name], _column(data, name).to_pylist()
        texts = [feature.int2str(item) for item in stored] if isinstance(feature, ClassLabel) else map(str, stored)
        same = np.array([text == value for text in texts], dtype=bool)
        if not same.any():
            raise InputError(
                f"{task.key('filter')}: no row of the {split} split of {task.source!r} has {value!r} in column {name!r}"
            )
        chosen &= same
    if not chosen.any():
        raise InputError(f"{task.key('filter')}: no row of the {split} split of {task.source!r} has all of its values")
    return np.flatnonzero(chosen)


def _labels(task: ResolvedTask, found: Mapping[str, Dataset]) -> Labels:
    """The label columns as numbers; a causal-lm task has one class and a head without outputs."""
    if task.kind == "causal-lm":
        return Labels({split: np.zeros(len(data), dtype=np.int64) for split, data in found.items()}, None, 0)
    columns = {
        split: LabelColumn.of(_column(data, task.label), data.features[task.label]) for split, data in found.items()
    }
    return read_labels(task, columns)


def _check_columns(task: ResolvedTask, split: str, data: Dataset, places: NDArray[np.int64]) -> None:
    labels = [(task.label, "label")] if task.label and not task.transform else []
    for column, field in [*((column, "columns") for column in task.columns), *labels]:
        if column not in data.column_names:
            raise InputError(
                f"{task.key(field)}: the {split} split of {task.source!r} has no column {column!r}; "
                f"it has {', '.join(data.column_names)}"
            )
    for name in () if task.kind == "image" else task.columns:
        values = _column(data, name)
        if task.kind == "causal-lm" and pa.types.is_null(values.type):
            continue  # a file in which no row has a context
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            kind = "class numbers" if isinstance(data.features[name], ClassLabel) else values.type
            raise InputError(f"{task.key('columns')}: column {name!r} of the {split} split holds {kind}, not text")
        # A row without context is usual, and one without a response is left out and counted when it is encoded.
        if values.null_count and (task.kind == "text" or name == task.columns[0]):
            row = int(places[np.flatnonzero(values.is_null().to_numpy())[0]])
            raise InputError(f"{task.key('columns')}: {split} row {row} has no text in column {name!r}")


def _column(data: Dataset, name: str) -> pa.ChunkedArray:
    """A column as stored; class labels as numbers, images as bytes and path."""
    return data.select_columns([name]).with_format("arrow")[:].column(name)


def _folder(path: str | None) -> Path:
    if path is None:
        return Path()
    return Path(path) if Path(path).is_dir() else Path(path).parent
