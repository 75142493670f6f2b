"""Named tensors and a JSON record as one safetensors blob: nothing in it is ever executed when it is read."""

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fltac.records import FloatArray

Dtype = Literal["float32", "float16"]

METADATA: Final = "fltac"
"""The one key in the safetensors header's metadata; a single one, so that equal records give equal bytes."""

_STORED: Final[dict[str, type[np.floating[Any]]]] = {"F32": np.float32, "F16": np.float16}


class WireError(ValueError):
    """Bytes that are not what they should be, or a record that cannot be encoded; one line naming what."""


def pack(tensors: Mapping[str, FloatArray], record: Mapping[str, object] | None, dtype: Dtype) -> bytes:
    """Encodes float tensors, and a record of JSON values if there is one.

    Raises:
        WireError: a finite value of a tensor is too large for ``dtype``.
    """
    metadata = None if record is None else {METADATA: json.dumps(record, separators=(",", ":"))}
    return bytes(save({name: _stored(name, tensor, dtype) for name, tensor in tensors.items()}, metadata))


def unpack(data: bytes) -> tuple[dict[str, FloatArray], Any]:
    """Decodes what :func:`pack` wrote.

    Returns:
        The tensors, float32, sorted by name, owning their memory; the JSON value, None where there is none.

    Raises:
        WireError: the bytes are no safetensors blob of float32 or float16 tensors with a JSON record.
    """
    try:
        entries: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise WireError(f"{len(data)} bytes that are not safetensors: {reason}") from error
    tensors = {name: _decoded(name, entry) for name, entry in sorted(entries, key=lambda item: item[0])}
    return tensors, _record(data)


def _stored(name: str, tensor: FloatArray, dtype: Dtype) -> FloatArray:
    source = np.asarray(tensor)
    with np.errstate(over="ignore"):
        stored = np.asarray(source, dtype=dtype, order="C")
    overflow = np.isfinite(source) & ~np.isfinite(stored)
    if overflow.any():
        largest = float(np.abs(source[overflow]).max())
        raise WireError(
            f"tensor {name!r}: the value {largest:g} is beyond {dtype}, whose largest is "
            f"{np.finfo(dtype).max:g}; set wire.dtype=float32"
        )
    return stored


def _decoded(name: str, entry: Mapping[str, Any]) -> FloatArray:
    dtype = _STORED.get(entry["dtype"])
    if dtype is None:
        raise WireError(f"tensor {name!r}: dtype {entry['dtype']}; allowed are {', '.join(_STORED)}")
    return np.frombuffer(entry["data"], np.dtype(dtype).newbyteorder("<")).reshape(entry["shape"]).astype(np.float32)


def _record(data: bytes) -> Any:
    """The JSON value in the header of a blob that ``deserialize`` accepted: 8 bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    try:
        text = (json.loads(data[8 : 8 + length]).get("__metadata__") or {}).get(METADATA)
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header's {METADATA!r} entry is not JSON") from error
