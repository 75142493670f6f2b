"""Files that are either there in full or not at all, whatever kills the process in between."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TEMPORARY = ".tmp-"
"""Prefix of everything that a killed write may leave behind."""


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces ``path`` by a file with ``data``: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; ``path`` is then unchanged.
    """
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk; for files in a folder that is renamed afterwards."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries, such as a rename, are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: object, indent: int | None = None) -> str:
    """``value`` as strict JSON on one line, or indented.

    NumPy scalars become numbers, paths and tuples become strings and lists, and a number that is not finite
    becomes null, since JSON has none. Floats are read back bit by bit.

    Raises:
        TypeError: a value of a type that has no place in JSON.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: object) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")
