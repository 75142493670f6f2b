"""Messages without a network: nodes that answer when they are told to, on a clock that sleeping moves."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from fltac.records import Adapter, Reply, Update
from fltac.runtime.post import Arrival, Kind, PostError, Sent
from fltac.runtime.roll import Reference
from fltac.wire.node_protocol import (
    HelloQuestion,
    NodeHello,
    Scores,
    SlotScore,
    TrainQuestion,
    decode_question,
    encode_answer,
)
from server.builders import BODY, adapter

REFERENCE = Reference("a" * 64, "b" * 64, BODY, hidden=3)


@dataclass
class FakeNode:
    """A node that says who it is and trains in no time, unless it is told otherwise.

    Attributes:
        hello: What it says about itself.
        seconds: How long each answer takes.
        spoil: Changes the payload of an answer; None for no answer at all.
        value: What its adapters hold.
        asked: The kinds of the messages it got.
    """

    hello: NodeHello
    seconds: float = 0.0
    spoil: Callable[[Kind, bytes], bytes | None] = lambda _kind, payload: payload
    value: float = 1.0
    asked: list[Kind] = field(default_factory=list)

    def answer(self, payload: bytes) -> bytes:
        question = decode_question(payload)
        client = self.hello.client
        if isinstance(question, HelloQuestion):
            return encode_answer(self.hello)
        if isinstance(question, TrainQuestion):
            updates = (Update(client, slot, self.trained(slot), self.hello.examples[slot]) for slot in self.hello.slots)
            return encode_answer(Reply(client, tuple(updates)))
        return encode_answer(Scores(client, {slot: SlotScore(0.5, 10) for slot in self.hello.slots}))

    def trained(self, slot: int) -> Adapter:
        (key,) = self.hello.heads[slot]
        return adapter(self.value, self.value, key=key, outputs=int(key))


class FakePost:
    """Carries messages to fake nodes; what ``happen`` says happens at its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.nodes_by_address: dict[str, FakeNode] = {}
        self.refuse_larger_than = 10**9
        self.repeat = 0
        self._due: list[tuple[float, Arrival]] = []
        self._events: list[tuple[float, Callable[[], None]]] = []
        self._count = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for event in [item for item in self._events if item[0] <= self.now]:
            self._events.remove(event)
            event[1]()

    def happen(self, at: float, what: Callable[[], None]) -> None:
        self._events.append((at, what))

    def join(self, client: str, *keys: str, address: str = "", **settings: object) -> FakeNode:
        """A node with one slot for each head key joins."""
        heads = {slot: {key: (int(key), 3)} for slot, key in enumerate(keys or ("2",))}
        hello = NodeHello(client, dict.fromkeys(heads, 5), heads, REFERENCE.backbone, REFERENCE.tokenizer, BODY)
        node = FakeNode(hello, **settings)  # type: ignore[arg-type]
        self.nodes_by_address[address or f"{client}@1"] = node
        return node

    def leave(self, address: str) -> None:
        del self.nodes_by_address[address]

    def nodes(self) -> dict[str, str]:
        return {address: f"node {address}" for address in self.nodes_by_address}

    def send(self, node: str, kind: Kind, payload: bytes, round_number: int) -> Sent:
        if len(payload) > self.refuse_larger_than:
            raise PostError(f"{len(payload)} bytes are too many")
        self._count += 1
        there = self.nodes_by_address[node]
        there.asked.append(kind)
        answer = there.spoil(kind, there.answer(payload))
        if answer is not None:
            arrival = Arrival(f"m{self._count}", answer, None, len(answer) + 7)
            self._due += [(self.now + there.seconds, arrival)] * (1 + self.repeat)
        return Sent(f"m{self._count}", len(payload) + 7)

    def collect(self, ids: Collection[str]) -> list[Arrival]:
        ready = [item for item in self._due if item[0] <= self.now and item[1].id in set(ids)]
        self._due = [item for item in self._due if item not in ready]
        return [arrival for _, arrival in ready]


def nan_adapter() -> Adapter:
    return {**adapter(1, 1), "m.lora_A": np.full((1, 3), np.nan, np.float32)}
