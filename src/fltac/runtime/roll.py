"""Who takes part in a federation: what each node said about itself, and why some nodes are refused."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fltac.records import Presence, Reply
from fltac.wire.node_protocol import NodeHello

MOST_SLOTS, MOST_OUTPUTS = 256, 10_000
"""Of one client. v0 holds a head of every kind that any client brings, and is sent to all: nobody may bloat it."""
MOST_HEADS = 64
"""Kinds of heads of all members together."""


@dataclass(frozen=True)
class Reference:
    """What every node has to have in common with the coordinator.

    Attributes:
        backbone: SHA-256 of the frozen weights.
        tokenizer: SHA-256 of the tokenizer, or of the image settings.
        body_shapes: Name and shape of every adapter tensor that is not a head.
        hidden: Width of what a head reads.
        highest_score: That a node may report of its own rows; more than 1 where it is a loss.
    """

    backbone: str
    tokenizer: str
    body_shapes: Mapping[str, tuple[int, ...]]
    hidden: int
    highest_score: float = 1.0

    def fault(self, hello: NodeHello) -> str | None:
        """Says in one line why a node cannot take part; None if it can."""
        if not hello.heads:
            return "it has no slots"
        if len(hello.heads) > MOST_SLOTS:
            return f"it has {len(hello.heads)} slots; allowed are {MOST_SLOTS}"
        if hello.backbone != self.backbone:
            return (
                f"its backbone's weights are others (fingerprint {hello.backbone[:12]}, "
                f"the coordinator's {self.backbone[:12]})"
            )
        if hello.tokenizer != self.tokenizer:
            return (
                f"its tokenizer or image settings are others (fingerprint {hello.tokenizer[:12]}, "
                f"the coordinator's {self.tokenizer[:12]})"
            )
        return self._shape_fault(hello)

    def _shape_fault(self, hello: NodeHello) -> str | None:
        for name in sorted({*self.body_shapes, *hello.body_shapes}):
            ours, theirs = self.body_shapes.get(name), hello.body_shapes.get(name)
            if ours is None or theirs is None or tuple(ours) != tuple(theirs):
                return f"its adapter differs: {name} is {_shape(theirs)}, the coordinator's {_shape(ours)}"
        for slot, heads in sorted(hello.heads.items()):
            for key, (outputs, hidden) in sorted(heads.items()):
                if outputs > MOST_OUTPUTS:
                    return f"the head {key} of its slot {slot} has {outputs} outputs; allowed are {MOST_OUTPUTS}"
                if hidden != self.hidden:
                    return f"the head {key} of its slot {slot} reads {hidden} values, the backbone gives {self.hidden}"
        return None


@dataclass
class Roll:
    """The nodes that are connected: members by what they said, others by why they are refused.

    Attributes:
        reference: What members have in common.
        hellos: Of the members, by address.
        refused: Why a node takes no part, by address.
    """

    reference: Reference
    hellos: dict[str, NodeHello] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def enter(self, node: str, hello: NodeHello) -> str | None:
        """Takes a node in, or anew with what it says now.

        Returns:
            Why it is refused; None where it is a member.
        """
        self.hellos.pop(node, None)
        self.refused.pop(node, None)
        fault = self.reference.fault(hello)
        if fault is None and hello.client in self.clients():
            fault = "another node that is connected has this client id"
        kinds = {key for item in (*self.hellos.values(), hello) for heads in item.heads.values() for key in heads}
        if fault is None and len(kinds) > MOST_HEADS:
            fault = f"with its heads there would be {len(kinds)} kinds; allowed are {MOST_HEADS}"
        if fault is None:
            self.hellos[node] = hello
        else:
            self.refuse(node, f"client {hello.client}: {fault}")
        return self.refused.get(node)

    def refuse(self, node: str, reason: str) -> None:
        """Notes that a node takes no part."""
        self.hellos.pop(node, None)
        self.refused[node] = reason

    def keep(self, nodes: Iterable[str]) -> None:
        """Forgets all nodes but these."""
        for known in (self.hellos, self.refused):
            for node in set(known) - set(nodes):
                del known[node]

    def clients(self) -> dict[str, str]:
        """The members' addresses by client id."""
        return {hello.client: node for node, hello in self.hellos.items()}

    def held_to_hello(self, node: str, reply: Reply) -> tuple[Reply, list[str]]:
        """A reply without slots that its node has not said it has, and with no more examples than it said it holds.

        A mean is weighted by examples, so a client could otherwise outweigh all others.

        Returns:
            The reply, and a line for each slot that is left out.
        """
        hello = self.hellos.get(node)
        if hello is None or reply.error is not None:
            return reply, []
        updates, undeclared = [], []
        for update in reply.updates:
            if update.slot in hello.heads:
                most = max(1, hello.examples[update.slot])
                updates.append(replace(update, examples=min(update.examples, most)))
            else:
                undeclared.append(
                    f"client {reply.client}: slot {update.slot} is not used: its node has not said it has it"
                )
        return replace(reply, updates=tuple(updates)), undeclared

    def presences(self, without: Iterable[str] = ()) -> list[Presence]:
        """The members as the server is told of them, sorted by client id, but for some addresses."""
        left = set(without)
        there = [hello for node, hello in self.hellos.items() if node not in left]
        return [Presence(hello.client, hello.heads) for hello in sorted(there, key=lambda hello: hello.client)]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
