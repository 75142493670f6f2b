"""Adapters, requests and replies as bytes: one message per client and round, holding all its slots.

A message is one safetensors blob. Its tensors are ``<slot>/<tensor>``, ``<slot>.gradients/<tensor>`` and
``profile/<slot>`` in a reply; ``initial/<tensor>`` and ``<cluster>/<tensor>`` in a request. Its header's record says
the rest. Whether the values make sense to the server is for ``fltac.server`` to judge; here only the form is checked.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fltac.records import Adapter, FloatArray, Reply, Request, Update
from fltac.wire.blob import Dtype, WireError, pack, unpack

REQUEST = "request-1"
REPLY = "reply-1"
INITIAL = "initial"
PROFILES = "profile"
GRADIENTS = ".gradients"

T = TypeVar("T")


def encode_adapter(adapter: Adapter, dtype: Dtype) -> bytes:
    """An adapter as bytes.

    Raises:
        WireError: a finite value of a tensor is too large for ``dtype``.
    """
    return pack(adapter, None, dtype)


def decode_adapter(data: bytes) -> Adapter:
    """The adapter that :func:`encode_adapter` wrote: float32, sorted by name.

    Raises:
        WireError: the bytes are no adapter.
    """
    return unpack(data)[0]


def encode_request(request: Request, dtype: Dtype) -> bytes:
    """What the server sends one client, as bytes.

    Raises:
        WireError: a slot refers to a cluster that is not sent, or a value is too large for ``dtype``.
    """
    _check_references(request)
    groups = {str(cluster): adapter for cluster, adapter in request.adapters.items()}
    if request.initial is not None:
        groups[INITIAL] = request.initial
    record = {
        "format": REQUEST,
        "round": request.round_number,
        "client": request.client,
        "slots": list(request.slots.items()),
        "clusters": list(request.adapters),
        "initial": request.initial is not None,
    }
    if request.candidates:
        record["candidates"] = list(request.candidates)
    if request.profile:
        record["profile"] = True
    if request.gradients:
        record["gradients"] = True
    return pack(_joined(groups), record, dtype)


def decode_request(data: bytes) -> Request:
    """The request that :func:`encode_request` wrote; adapters as :func:`decode_adapter` gives them.

    Raises:
        WireError: the bytes are no request.
    """
    tensors, record = _message(data, REQUEST)
    clusters = [_integer(cluster, "clusters") for cluster in _list(record, "clusters")]
    has_initial = record.get("initial")
    if not isinstance(has_initial, bool):
        raise WireError(f"request: initial is {has_initial!r}; expected true or false")
    groups = _split(tensors, [*map(str, clusters), *([INITIAL] if has_initial else [])])
    request = Request(
        round_number=_integer(record.get("round"), "round"),
        client=_client(record),
        slots=dict(_pairs(record, "slots")),
        adapters={cluster: groups[str(cluster)] for cluster in clusters},
        initial=groups.get(INITIAL),
        candidates=tuple(_candidates(record)),
        profile=record.get("profile") is True,
        gradients=record.get("gradients") is True,
    )
    _check_references(request)
    return request


def encode_reply(reply: Reply, dtype: Dtype) -> bytes:
    """All uploads of one client in one round, as bytes.

    Raises:
        WireError: a slot occurs twice, an update is another client's, or a value is too large for ``dtype``.
    """
    for update in reply.updates:
        if update.client != reply.client:
            raise WireError(f"reply of client {reply.client!r}: holds an update of client {update.client!r}")
    groups = _unique([(str(update.slot), update.adapter) for update in reply.updates])
    record: dict[str, Any] = {
        "format": REPLY,
        "client": reply.client,
        "slots": [(update.slot, update.examples) for update in reply.updates],
        "error": reply.error,
    }
    chosen = [(update.slot, update.cluster) for update in reply.updates if update.cluster is not None]
    if chosen:
        record["chosen"] = chosen
    gradients = {update.slot: update.gradients for update in reply.updates if update.gradients is not None}
    if gradients:
        groups |= {f"{slot}{GRADIENTS}": own for slot, own in gradients.items()}
        record["gradients"] = list(gradients)
    profiles = {str(update.slot): update.profile for update in reply.updates if update.profile is not None}
    if profiles:
        groups[PROFILES] = profiles
        record["profiles"] = True
    return pack(_joined(groups), record, dtype)


def decode_reply(data: bytes) -> Reply:
    """The reply that :func:`encode_reply` wrote; adapters as :func:`decode_adapter` gives them.

    Raises:
        WireError: the bytes are no reply.
    """
    tensors, record = _message(data, REPLY)
    client = _client(record)
    error = record.get("error")
    if error is not None and not isinstance(error, str):
        raise WireError(f"reply of client {client!r}: error is {error!r}; expected text or null")
    slots = _pairs(record, "slots")
    declared = [PROFILES] if record.get("profiles") is True else []
    seen = [_integer(slot, "gradients") for slot in _list(record, "gradients")] if "gradients" in record else []
    if without := sorted(set(seen) - dict(slots).keys()):
        raise WireError(f"reply of client {client!r}: gradients of slot {without[0]}, of which there is no update")
    groups = _split(tensors, [*(str(slot) for slot, _ in slots), *declared, *(f"{slot}{GRADIENTS}" for slot in seen)])
    profiles = groups.get(PROFILES, {})
    chosen = dict(_pairs(record, "chosen")) if "chosen" in record else {}
    unknown = sorted(chosen.keys() - dict(slots).keys())
    if unknown:
        raise WireError(f"reply of client {client!r}: chosen names slot {unknown[0]}, of which there is no update")
    if foreign := sorted(profiles.keys() - {str(slot) for slot, _ in slots}):
        raise WireError(f"reply of client {client!r}: a profile of slot {foreign[0]}, of which there is no update")
    updates = (
        Update(
            client,
            slot,
            groups[str(slot)],
            examples,
            chosen.get(slot),
            profiles.get(str(slot)),
            groups.get(f"{slot}{GRADIENTS}"),
        )
        for slot, examples in slots
    )
    return Reply(client, tuple(updates), error)


def _joined(groups: Mapping[str, Adapter]) -> dict[str, FloatArray]:
    return {f"{group}/{name}": tensor for group, adapter in groups.items() for name, tensor in adapter.items()}


def _split(tensors: Mapping[str, FloatArray], names: Sequence[str]) -> dict[str, dict[str, FloatArray]]:
    """The tensors of each declared group, which may be empty; raises WireError for any other tensor."""
    groups: dict[str, dict[str, FloatArray]] = _unique([(name, {}) for name in names])
    for full_name, tensor in tensors.items():
        group, slash, name = full_name.partition("/")
        if not slash or group not in groups:
            raise WireError(
                f"tensor {full_name!r}: belongs to none of the declared groups {', '.join(names) or '(none)'}"
            )
        groups[group][name] = tensor
    return groups


def _unique(pairs: Sequence[tuple[str, T]]) -> dict[str, T]:
    groups = dict(pairs)
    if len(groups) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise WireError(f"slot or cluster {twice} occurs twice")
    return groups


def _candidates(record: Mapping[str, Any]) -> list[int]:
    """Where the client is to choose, the clusters; each once, or the choice would mean nothing."""
    if "candidates" not in record:
        return []
    clusters = [_integer(cluster, "candidates") for cluster in _list(record, "candidates")]
    if len(set(clusters)) < len(clusters):
        raise WireError("candidates names a cluster twice")
    return clusters


def _check_references(request: Request) -> None:
    for cluster in request.candidates:
        if cluster not in request.adapters:
            raise WireError(f"request to client {request.client!r}: cluster {cluster} is a candidate, not sent")
    for slot, cluster in request.slots.items():
        if cluster not in request.adapters:
            raise WireError(f"request to client {request.client!r}: slot {slot} refers to cluster {cluster}, not sent")


def _message(data: bytes, expected: str) -> tuple[dict[str, FloatArray], Mapping[str, Any]]:
    tensors, record = unpack(data)
    if not isinstance(record, dict) or record.get("format") != expected:
        found = record.get("format") if isinstance(record, dict) else record
        raise WireError(f"message format is {found!r}; expected {expected!r}")
    return tensors, record


def _client(record: Mapping[str, Any]) -> str:
    client = record.get("client")
    if not isinstance(client, str):
        raise WireError(f"client is {client!r}; expected text")
    return client


def _integer(value: Any, what: str) -> int:
    if type(value) is not int:
        raise WireError(f"{what} holds {value!r}; expected an integer")
    return value


def _list(record: Mapping[str, Any], what: str) -> list[Any]:
    value = record.get(what)
    if not isinstance(value, list):
        raise WireError(f"{what} is {value!r}; expected a list")
    return value


def _pairs(record: Mapping[str, Any], what: str) -> list[tuple[int, int]]:
    pairs = []
    for pair in _list(record, what):
        if not isinstance(pair, list) or len(pair) != 2:
            raise WireError(f"{what} holds {pair!r}; expected pairs of integers")
        pairs.append((_integer(pair[0], what), _integer(pair[1], what)))
    if len(dict(pairs)) < len(pairs):
        raise WireError(f"{what} names a slot twice")
    return pairs
