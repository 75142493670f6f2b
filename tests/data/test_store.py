"""The store of encoded rows: written once, atomic, mapped."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fltac.data.store import FILE, Stored, open_or_encode
from fltac.errors import InputError


class Source:
    """Batches with a counter of how often they were made."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.made = sizes, 0

    def __call__(self) -> Iterator[pa.RecordBatch]:
        self.made += 1
        start = 0
        for size in self.sizes:
            batch = pa.RecordBatch.from_arrays([pa.array(np.arange(start, start + size))], names=["label"])
            yield batch.replace_schema_metadata({"truncated": "3"})
            start += size


def numbers(stored: Stored) -> list[int]:
    return [number for batch in stored.batches for number in batch.column("label").to_pylist()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLTAC_CACHE", str(tmp_path))
    return tmp_path / "encoded" / "abc"


def test_rows_are_encoded_once(folder: Path) -> None:
    source = Source([4, 4, 1])
    for _ in range(3):
        stored = open_or_encode("abc", 9, source)
        assert numbers(stored) == list(range(9))
        assert (stored.rows, stored.facts) == (9, {"truncated": "3"})
    assert source.made == 1
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_reading_allocates_nothing(folder: Path) -> None:
    source = Source([200_000])
    open_or_encode("abc", 200_000, source)
    before = pa.total_allocated_bytes()
    stored = open_or_encode("abc", 200_000, source)
    view = stored.batches[0].column("label").to_numpy(zero_copy_only=True)
    assert pa.total_allocated_bytes() - before < 10_000, "1.6 MB were copied instead of mapped"
    assert view[-1] == 199_999
    assert not view.flags.owndata
    assert not view.flags.writeable


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "other rows"])
def test_a_damaged_file_is_made_again(folder: Path, damage: str) -> None:
    source = Source([5])
    open_or_encode("abc", 5, source)
    file = folder / FILE
    content = file.read_bytes()
    if damage == "other rows":
        open_or_encode("other", 3, Source([3]))
        content = (folder.parent / "other" / FILE).read_bytes()
    kept = {"cut": content[:-30], "garbage": b"x" * len(content), "empty": b"", "other rows": content}
    file.write_bytes(kept[damage])
    assert numbers(open_or_encode("abc", 5, source)) == list(range(5))
    assert source.made == 2
    assert numbers(open_or_encode("abc", 5, source)) == list(range(5))
    assert source.made == 2


def test_two_at_a_time(folder: Path) -> None:
    inner = Source([5])

    def outer() -> Iterator[pa.RecordBatch]:
        yield from Source([2])()
        assert numbers(open_or_encode("abc", 5, inner)) == list(range(5))
        yield next(iter(Source([3])()))

    assert open_or_encode("abc", 5, outer).rows == 5
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_an_encoder_that_fails_leaves_nothing(folder: Path) -> None:
    def failing() -> Iterator[pa.RecordBatch]:
        yield from Source([2])()
        raise InputError("row 3 is wrong")

    with pytest.raises(InputError, match="row 3 is wrong"):
        open_or_encode("abc", 5, failing)
    assert not list(folder.iterdir())


def test_a_cache_that_cannot_be_written(folder: Path) -> None:
    folder.parent.write_text("a file where the folder should be")
    with pytest.raises(InputError) as error:
        open_or_encode("abc", 5, Source([5]))
    assert str(error.value).startswith(f"FLTAC_CACHE: cannot write {folder}: ")
    assert "\n" not in str(error.value)
