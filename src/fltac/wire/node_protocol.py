"""What a coordinator asks a data owner, and what that answers: three questions, three answers, as bytes.

A message is one line of JSON that says the protocol's version and the kind, then the payload: a request or a reply
as ``fltac.wire.codec`` encodes it, or one JSON record. A task is known by its slot number alone; there is no field
for its name, its labels or a place on the owner's machine. Everything is checked when it is decoded.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from fltac.config.metrics import HIGHEST_LOSS
from fltac.records import CLIENT_ID, MOST_SLOTS, Reply, Request
from fltac.wire.blob import Dtype, WireError
from fltac.wire.codec import decode_reply, decode_request, encode_reply, encode_request
from fltac.wire.fields import (
    from_json,
    read_client,
    read_count,
    read_entries,
    read_hash,
    read_record,
    read_shape,
    read_slot,
    read_tensor,
    to_json,
)

PROTOCOL_VERSION: Final = 1
NAME: Final = "fltac-node"
"""The key of the version in a message's first line."""

LARGEST_MESSAGE = 2**30
"""Bytes of a message that are read by default."""
LARGEST_LINE = 1024
LONGEST_ERROR = 500
"""Characters of a reply's error that are kept."""


@dataclass(frozen=True)
class HelloQuestion:
    """Who are you, and what do you bring?"""


@dataclass(frozen=True)
class TrainQuestion:
    """Train one round from these adapters."""

    request: Request


@dataclass(frozen=True)
class ScoreQuestion:
    """Score these adapters on your own validation rows: all, or at most ``max_rows`` of each task."""

    request: Request
    max_rows: int | None = None


Question = HelloQuestion | TrainQuestion | ScoreQuestion


@dataclass(frozen=True)
class NodeHello:
    """What a data owner says about itself.

    Attributes:
        client: Its id.
        examples: Training rows of each slot.
        heads: For each slot the key of each head that it trains, with (outputs, hidden).
        backbone: SHA-256 of the frozen weights.
        tokenizer: SHA-256 of the tokenizer, or of the image settings.
        body_shapes: Name and shape of every adapter tensor that is not a head.
        protocol: Version that it speaks.
    """

    client: str
    examples: Mapping[int, int]
    heads: Mapping[int, Mapping[str, tuple[int, int]]]
    backbone: str
    tokenizer: str
    body_shapes: Mapping[str, tuple[int, ...]]
    protocol: int = PROTOCOL_VERSION

    @property
    def slots(self) -> tuple[int, ...]:
        """Its slot numbers, ascending."""
        return tuple(sorted(self.examples))


@dataclass(frozen=True)
class SlotScore:
    """One slot's score, and the number of validation rows it was taken on."""

    score: float
    rows: int


@dataclass(frozen=True)
class Scores:
    """A data owner's scores by slot."""

    client: str
    slots: Mapping[int, SlotScore]


Answer = NodeHello | Reply | Scores
"""A reply with an error is the answer to any question that cannot be answered; its client is ``""`` where the
owner's file could not be read."""


def encode_hello_question() -> bytes:
    """Asks a data owner who it is."""
    return _message("hello")


def encode_train_question(request: Request, dtype: Dtype) -> bytes:
    """Asks for a round's training.

    Raises:
        WireError: as ``encode_request``.
    """
    return _message("train", encode_request(request, dtype))


def encode_score_question(request: Request, dtype: Dtype, max_rows: int | None = None) -> bytes:
    """Asks for scores of the request's adapters.

    Args:
        request: As for training; its round number does not matter.
        dtype: Of the adapters.
        max_rows: Validation rows of each task; None for all.

    Raises:
        WireError: as ``encode_request``.
    """
    return _message("score", encode_request(request, dtype), max_rows=max_rows)


def decode_question(payload: bytes, limit: int = LARGEST_MESSAGE) -> Question:
    """The question in a message.

    Raises:
        WireError: too many bytes, another version of the protocol, or no question.
    """
    line, body = _opened(payload, limit)
    kind = line["kind"]
    if kind == "hello":
        return HelloQuestion()
    if kind == "train":
        return TrainQuestion(decode_request(body))
    if kind == "score":
        max_rows = line.get("max_rows")
        return ScoreQuestion(
            decode_request(body), None if max_rows is None else read_count(max_rows, "question: max_rows", 1)
        )
    raise WireError(f"question: kind is {kind!r}; allowed are hello, train, score")


def encode_answer(answer: Answer, dtype: Dtype = "float32") -> bytes:
    """An answer as bytes; ``dtype`` concerns the adapters in a reply.

    Raises:
        WireError: as ``encode_reply``.
    """
    if isinstance(answer, Reply):
        return _message("reply", encode_reply(answer, dtype))
    if isinstance(answer, NodeHello):
        record: dict[str, object] = {
            "client": answer.client,
            "slots": [
                [slot, answer.examples[slot], [[key, *shape] for key, shape in sorted(answer.heads[slot].items())]]
                for slot in answer.slots
            ],
            "backbone": answer.backbone,
            "tokenizer": answer.tokenizer,
            "body": {name: list(shape) for name, shape in answer.body_shapes.items()},
        }
        return _message("node", to_json(record))
    scores = [[slot, score.score, score.rows] for slot, score in sorted(answer.slots.items())]
    return _message("scores", to_json({"client": answer.client, "slots": scores}))


def decode_answer(payload: bytes, limit: int = LARGEST_MESSAGE) -> Answer:
    """The answer in a message, its form checked; whose it is and what it is worth is for the server to judge.

    Raises:
        WireError: too many bytes, another version of the protocol, or no answer.
    """
    line, body = _opened(payload, limit)
    readers: Mapping[str, Callable[[bytes], Answer]] = {"reply": _reply, "node": _hello, "scores": _scores}
    if line["kind"] not in readers:
        raise WireError(f"answer: kind is {line['kind']!r}; allowed are {', '.join(readers)}")
    return readers[line["kind"]](body)


def _message(kind: str, body: bytes = b"", **more: object) -> bytes:
    return to_json({NAME: PROTOCOL_VERSION, "kind": kind, **more}) + b"\n" + body


def _opened(payload: bytes, limit: int) -> tuple[Mapping[str, Any], bytes]:
    if len(payload) > limit:
        raise WireError(f"message of {len(payload)} bytes; allowed are {limit}")
    end = payload.find(b"\n", 0, LARGEST_LINE)
    line = from_json(payload[:end], "first line") if end >= 0 else None
    version = line.get(NAME) if isinstance(line, dict) else None
    if not isinstance(line, dict) or type(version) is not int:
        raise WireError(f"{len(payload)} bytes that are no {NAME} message")
    if version != PROTOCOL_VERSION:
        raise WireError(f"protocol version is {version}; this side speaks {PROTOCOL_VERSION}")
    if not isinstance(line.get("kind"), str):
        raise WireError(f"message: kind is {line.get('kind')!r}; expected text")
    return line, payload[end + 1 :]


def _reply(body: bytes) -> Reply:
    reply = decode_reply(body)
    if reply.client and not CLIENT_ID.fullmatch(reply.client):
        raise WireError(f"reply: client is {reply.client[:80]!r}; expected a client's id")
    seen: dict[int, object] = {}
    for update in reply.updates:
        seen[read_slot(update.slot, f"reply of client {reply.client!r}", seen)] = None
        # Fewer than 1 is for the server to reject, as one update among others.
        read_count(max(1, update.examples), f"reply of client {reply.client!r}: slot {update.slot}: examples", 1)
    if reply.error is None:
        return reply
    return replace(reply, error=one_line(reply.error))


def one_line(text: str) -> str:
    """Somebody else's text, made fit for a log: one line, no control characters, not too long."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * LONGEST_ERROR])
    return " ".join(plain.split())[:LONGEST_ERROR]


def _hello(body: bytes) -> NodeHello:
    record = read_record(body, "hello")
    client = read_client(record, "hello")
    where = f"hello of client {client!r}"
    examples: dict[int, int] = {}
    heads: dict[int, dict[str, tuple[int, int]]] = {}
    for entry in read_entries(record, where, 3):
        slot = read_slot(entry[0], where, examples)
        examples[slot] = read_count(entry[1], f"{where}: slot {slot}: examples", 1)
        heads[slot] = _heads(entry[2], f"{where}: slot {slot}")
    body_shapes = record.get("body")
    if not isinstance(body_shapes, dict):
        raise WireError(f"{where}: body is {body_shapes!r}; expected names and shapes")
    return NodeHello(
        client=client,
        examples=examples,
        heads=heads,
        backbone=read_hash(record, "backbone", where),
        tokenizer=read_hash(record, "tokenizer", where),
        body_shapes={
            read_tensor(name, where): read_shape(shape, f"{where}: {name!r}") for name, shape in body_shapes.items()
        },
    )


def _scores(body: bytes) -> Scores:
    record = read_record(body, "scores")
    client = read_client(record, "scores")
    where = f"scores of client {client!r}"
    slots: dict[int, SlotScore] = {}
    for entry in read_entries(record, where, 3):
        slot = read_slot(entry[0], where, slots)
        score = entry[1]
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise WireError(f"{where}: slot {slot}: score is {score!r}; expected a finite number")
        if not -1.0 <= score <= HIGHEST_LOSS:
            raise WireError(f"{where}: slot {slot}: score is {score!r}; allowed are -1 to {HIGHEST_LOSS:g}")
        slots[slot] = SlotScore(float(score), read_count(entry[2], f"{where}: slot {slot}: rows", 1))
    return Scores(client, slots)


def _heads(value: Any, where: str) -> dict[str, tuple[int, int]]:
    heads: dict[str, tuple[int, int]] = {}
    if not isinstance(value, list) or len(value) > MOST_SLOTS:
        raise WireError(f"{where}: heads are {str(value)[:80]!r}; expected a list")
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
            raise WireError(f"{where}: head is {str(entry)[:80]!r}; expected a key, outputs and hidden")
        key, outputs = entry[0], read_count(entry[1], f"{where}: outputs", 1)
        # The key names the number of outputs, so that two nodes cannot mean different heads by one key.
        if key != str(outputs) or key in heads:
            raise WireError(f"{where}: head {key[:80]!r} has {outputs} outputs; a key is that number, once")
        heads[key] = (outputs, read_count(entry[2], f"{where}: hidden", 1))
    return heads
