"""What travels between server and clients, as bytes; without a word about tasks."""

from fltac.wire.blob import WireError
from fltac.wire.codec import (
    decode_adapter,
    decode_reply,
    decode_request,
    encode_adapter,
    encode_reply,
    encode_request,
)

__all__ = [
    "WireError",
    "decode_adapter",
    "decode_reply",
    "decode_request",
    "encode_adapter",
    "encode_reply",
    "encode_request",
]
