"""Fields of a JSON record that came from somebody else: each is checked and named in one line where it is wrong.

All functions raise WireError and return what they were given, typed; ``where`` or ``what`` begins the error.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from fltac.records import CLIENT_ID, MOST_SLOTS
from fltac.wire.blob import WireError

LARGEST_RECORD: Final = 2**24
"""Bytes of a JSON record: names and shapes of all adapted tensors, a few thousand at most."""
LARGEST_COUNT: Final = 2**53
"""Counts are below this, so that each is a float, too."""

HASH = re.compile(r"[0-9a-f]{64}")
TENSOR = re.compile(r"[^\x00-\x1f\x7f]{1,512}")


def to_json(value: object) -> bytes:
    """The shortest JSON of a value; raises ValueError for a number that is not finite."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def from_json(data: bytes, what: str) -> Any:
    """Any JSON value."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what}: {len(data)} bytes that are not JSON") from error


def read_record(body: bytes, what: str) -> Mapping[str, Any]:
    """A JSON object."""
    if len(body) > LARGEST_RECORD:
        raise WireError(f"{what} of {len(body)} bytes; allowed are {LARGEST_RECORD}")
    record = from_json(body, what)
    if not isinstance(record, dict):
        raise WireError(f"{what} is {str(record)[:80]!r}; expected a record")
    return record


def read_client(record: Mapping[str, Any], what: str) -> str:
    """The id of a data owner."""
    client = record.get("client")
    if not isinstance(client, str) or not CLIENT_ID.fullmatch(client):
        raise WireError(f"{what}: client is {str(client)[:80]!r}; expected a client's id")
    return client


def read_entries(record: Mapping[str, Any], where: str, width: int) -> list[list[Any]]:
    """The list ``slots``, each entry of so many values."""
    entries = record.get("slots")
    if not isinstance(entries, list) or len(entries) > MOST_SLOTS:
        raise WireError(f"{where}: slots is {str(entries)[:80]!r}; expected a list of at most {MOST_SLOTS}")
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != width:
            raise WireError(f"{where}: slots holds {str(entry)[:80]!r}; expected {width} values")
    return entries


def read_slot(value: Any, where: str, seen: Mapping[int, object]) -> int:
    """A slot number that is not among those seen."""
    slot = read_count(value, f"{where}: slot", 0)
    if slot >= MOST_SLOTS or slot in seen:
        raise WireError(f"{where}: slot {slot}; each may occur once, below {MOST_SLOTS}")
    return slot


def read_count(value: Any, what: str, least: int) -> int:
    """A whole number from ``least``."""
    if type(value) is not int or not least <= value < LARGEST_COUNT:
        raise WireError(f"{what} is {str(value)[:80]!r}; expected a whole number from {least}")
    return value


def read_hash(record: Mapping[str, Any], what: str, where: str) -> str:
    """A SHA-256."""
    value = record.get(what)
    if not isinstance(value, str) or not HASH.fullmatch(value):
        raise WireError(f"{where}: {what} is {str(value)[:80]!r}; expected 64 hexadecimal digits")
    return value


def read_tensor(name: str, where: str) -> str:
    """The name of a tensor."""
    if not TENSOR.fullmatch(name):
        raise WireError(f"{where}: tensor {name[:80]!r}; expected up to 512 printable characters")
    return name


def read_shape(value: Any, where: str) -> tuple[int, ...]:
    """The shape of a tensor."""
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise WireError(f"{where}: shape is {str(value)[:80]!r}; expected 1 to 8 numbers")
    return tuple(read_count(size, f"{where}: shape", 1) for size in value)
