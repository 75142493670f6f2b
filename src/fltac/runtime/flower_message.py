"""Payloads in Flower's messages: one array of bytes, which Flower cuts into chunks. Nothing is unpickled."""

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

RECORD = "fltac"
STYPE = "fltac.bytes"
"""Says that the array's bytes are no NumPy file: they are taken as they are."""


class NoPayload(ValueError):
    """A message that carries something else."""


def content_of(payload: bytes) -> RecordDict:
    """A message's content."""
    array = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
    return RecordDict({RECORD: ArrayRecord({"payload": array})})


def payload_of(message: Message) -> bytes:
    """The payload of a message without an error.

    Raises:
        NoPayload: it carries something else.
    """
    record = message.content.get(RECORD)
    array = record.get("payload") if isinstance(record, ArrayRecord) else None
    if array is None or array.stype != STYPE or len(message.content) != 1:
        raise NoPayload("the message carries no payload of fltac")
    return bytes(array.data)


def size_of(message: Message) -> int:
    """Bytes of a message's objects as they are sent, without HTTP and TLS around them."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())
