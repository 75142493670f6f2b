"""Messages that wait for their answers, and what an answer comes to."""

from dataclasses import dataclass

from fltac.records import Reply, Request
from fltac.runtime.post import Kind
from fltac.wire.node_protocol import Answer, Scores


@dataclass(frozen=True)
class Letter:
    """A message without an answer yet.

    Attributes:
        node: The address.
        kind: What was asked.
        client: The client's id; the node's name in the question who it is.
        request: What was sent, if it was one.
        sent: When, in the clock's seconds.
    """

    node: str
    kind: Kind
    client: str
    request: Request | None = None
    sent: float = 0.0


def reply_to(letter: Letter, answer: Answer | str) -> Reply:
    """An answer to a request as the client's reply, an error where it is none."""
    if isinstance(answer, str):
        return Reply(letter.client, error=answer)
    if answer.client != letter.client:
        error = answer.error if isinstance(answer, Reply) and not answer.client else None
        return Reply(letter.client, error=error or f"its node answers as client {answer.client!r}")
    if not isinstance(answer, Reply):
        return Reply(letter.client, error=f"answers with {type(answer).__name__}, not with adapters")
    return answer


def why_no_hello(letter: Letter, answer: Reply | Scores | str) -> str:
    """Why a node that was asked who it is takes no part."""
    if isinstance(answer, str):
        return f"{letter.client}: {answer}"
    name = f"client {answer.client}" if answer.client else letter.client
    error = answer.error if isinstance(answer, Reply) else None
    return f"{name}: {error or 'does not say who it is'}"
