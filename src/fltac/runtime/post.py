"""What a federation needs of whatever carries its messages: bytes to a node, bytes back, and who is connected."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["query", "train", "evaluate"]


class PostError(RuntimeError):
    """A message could not be handed over; one line."""


@dataclass(frozen=True)
class Sent:
    """A message that is on its way.

    Attributes:
        id: By which its answer is asked for.
        size: Its bytes on the wire.
    """

    id: str
    size: int


@dataclass(frozen=True)
class Arrival:
    """An answer.

    Attributes:
        id: Of the message that it answers.
        payload: What the node answered; None where there is an error.
        error: What the carrier says in its stead.
        size: Its bytes on the wire.
    """

    id: str
    payload: bytes | None
    error: str | None
    size: int


class Post(Protocol):
    """Carries messages. Nodes are known by an address, which is another one after a node was started anew."""

    def nodes(self) -> Mapping[str, str]:
        """The addresses of the nodes that are connected now, each with a name for the log."""
        ...

    def send(self, node: str, kind: Kind, payload: bytes, round_number: int) -> Sent:
        """Hands a message over.

        Raises:
            PostError: it cannot be sent.
        """
        ...

    def collect(self, ids: Collection[str]) -> list[Arrival]:
        """The answers that have arrived, each given once."""
        ...
