"""Reads local data: parquet, csv, tsv, jsonl and json files, folders of them by split, and image folders."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image
from datasets.utils import logging as datasets_logging

from fltac.errors import InputError
from fltac.paths import cache_folder

Loader = Callable[[], Dataset]

PART = r"-\d+(-of-\d+(-\w+)?)?$"
"""What the hub appends to the name of a split that lies in several files."""

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars and no log lines of ``datasets`` inside; its errors still come as exceptions."""
    bars, level = datasets.are_progress_bars_disabled(), datasets_logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def local_splits(path: Path, key: str, file_split: str, text_columns: Sequence[str]) -> dict[str, Loader]:
    """Finds the splits that lie at a path.

    Args:
        path: A data file, a folder with ``<split>.parquet`` (or ``<split>-00000-of-00002.parquet`` and so
            on), or an image folder ``<split>/<class>/<image>`` or ``<class>/<image>``.
        key: The config key that names it.
        file_split: What to call the only split of a data file or of ``<class>/<image>``.
        text_columns: Columns that csv and tsv files hold as text, whatever they look like.

    Returns:
        Split name to a function that reads it.

    Raises:
        InputError: nothing is there, or nothing that can be read.
    """
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"{key}: {str(path)!r} ends in {path.suffix!r}; allowed are {', '.join(READERS)}")
        return {file_split: lambda: read_files([path], key, text_columns)}
    if not path.is_dir():
        raise InputError(f"{key}: {str(path)!r}: no such file or folder")
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix.lower() in READERS and not file.name.startswith("."):
            splits.setdefault(re.sub(PART, "", file.stem), []).append(file)
    if splits:
        return {name: _loader(files, key, text_columns) for name, files in splits.items()}
    return _image_splits(path, key, file_split)


def read_files(files: Sequence[Path], key: str, text_columns: Sequence[str]) -> Dataset:
    """Reads one split's files, all of the same kind.

    Raises:
        InputError: naming a file that is empty or not what its ending says.
    """
    endings = sorted({file.suffix.lower() for file in files})
    if len(endings) > 1:
        raise InputError(f"{key}: {files[0].parent} holds one split as {' and '.join(endings)}; keep one kind")
    parts = []
    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"{key}: {str(file)!r} is empty")
        try:
            with quiet_datasets():
                parts.append(READERS[endings[0]](file, text_columns))
        except Exception as error:  # readers raise whatever their parser raises, StopIteration and KeyError included
            reason = str(error.__cause__ or error).split("\n")[0][:200] or type(error).__name__
            raise InputError(f"{key}: {str(file)!r} is not a readable {endings[0][1:]} file: {reason}") from error
    if any(part.column_names != parts[0].column_names for part in parts):
        raise InputError(f"{key}: the files of one split in {files[0].parent} have different columns")
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _loader(files: list[Path], key: str, text_columns: Sequence[str]) -> Loader:
    return lambda: read_files(files, key, text_columns)


def _parquet(file: Path, _: Sequence[str]) -> Dataset:
    if pyarrow.parquet.read_metadata(file).num_rows == 0:  # which datasets cannot read
        return Dataset(pyarrow.parquet.read_table(file))
    return _cached("parquet", file)


def _json(file: Path, _: Sequence[str]) -> Dataset:
    return _cached("json", file)


def _cached(builder: str, file: Path) -> Dataset:
    """Through an Arrow copy in this package's cache, memory-mapped, so that nothing is written beside it."""
    return datasets.load_dataset(
        builder, data_files={"rows": str(file)}, split="rows", cache_dir=str(cache_folder() / "datasets")
    )


def _csv(file: Path, text_columns: Sequence[str]) -> Dataset:
    return _delimited(file, text_columns, ",")


def _tsv(file: Path, text_columns: Sequence[str]) -> Dataset:
    return _delimited(file, text_columns, "\t")


def _delimited(file: Path, text_columns: Sequence[str], delimiter: str) -> Dataset:
    """An empty cell is missing; ``NA``, ``null`` and numbers in a text column are text."""
    table = pyarrow.csv.read_csv(
        file,
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in text_columns},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    return Dataset(table)


READERS: Mapping[str, Callable[[Path, Sequence[str]], Dataset]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json,
    ".json": _json,
}


def _image_splits(path: Path, key: str, file_split: str) -> dict[str, Loader]:
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if (path / file_split).is_dir():
        return {folder.name: _image_loader(folder, key) for folder in folders}
    if not folders:
        raise InputError(
            f"{key}: {str(path)!r} holds neither <split>.parquet (or csv, jsonl) files nor folders of images"
        )
    return {file_split: _image_loader(path, key)}


def _image_loader(folder: Path, key: str) -> Loader:
    return lambda: read_image_folder(folder, key)


def read_image_folder(folder: Path, key: str) -> Dataset:
    """Reads ``<class>/<image>``: columns ``image`` (paths) and ``label``, classes sorted by name.

    Raises:
        InputError: there are no images.
    """
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    files = [
        (file, number)
        for number, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in IMAGE_ENDINGS
    ]
    if not files:
        raise InputError(f"{key}: {str(folder)!r} holds no images in folders named after their classes")
    return Dataset.from_dict(
        {
            "image": [{"bytes": None, "path": str(file.absolute())} for file, _ in files],
            "label": [number for _, number in files],
        },
        features=Features({"image": Image(decode=False), "label": ClassLabel(names=classes)}),
    )
