"""Encoded rows on disk: one Arrow IPC file per split, named by a fingerprint, written once, memory-mapped."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from fltac.errors import InputError
from fltac.paths import cache_folder

FILE = "rows.arrow"

BATCH = 512
"""Rows in every record batch but the last, where a split has several."""


@dataclass(frozen=True)
class Stored:
    """A split's encoded rows; the arrays point into the mapped file.

    Attributes:
        batches: Record batches of ``BATCH`` rows, or a single one.
        facts: What the encoder wrote into the schema's metadata.
    """

    batches: tuple[pa.RecordBatch, ...]
    facts: dict[str, str]

    @property
    def rows(self) -> int:
        return sum(batch.num_rows for batch in self.batches)


def open_or_encode(fingerprint: str, rows: int, encode: Callable[[], Iterator[pa.RecordBatch]]) -> Stored:
    """Opens a split's encoded rows; encodes them first where they are missing or the file is damaged.

    Two processes may do so at the same time: each writes a file of its own, and renaming is atomic.

    Args:
        fingerprint: Of everything that the encoded rows depend on.
        rows: How many there are.
        encode: Yields record batches with the same schema.

    Raises:
        InputError: the cache folder cannot be written.
    """
    path = cache_folder() / "encoded" / fingerprint / FILE
    found = _open(path, rows)
    if found is not None:
        return found
    batches = encode()
    try:
        _write(path, batches)
    except OSError as error:
        raise InputError(f"FLTAC_CACHE: cannot write {path.parent}: {error.strerror or error}") from error
    written = _open(path, rows)
    assert written is not None, f"{path} holds other than {rows} rows"
    return written


def _open(path: Path, rows: int) -> Stored | None:
    """None where there is no such file, or a part of one."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = tuple(reader.get_batch(number) for number in range(reader.num_record_batches))
        for batch in batches:
            batch.validate(full=True)
    except (OSError, pa.ArrowException):
        return None
    facts = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
    stored = Stored(batches, facts)
    return stored if stored.rows == rows else None


def _write(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    first = next(batches)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            with pa.ipc.new_file(file, first.schema) as writer:
                writer.write_batch(first)
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
