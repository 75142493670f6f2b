"""A federation over a network: the runtime's side of a round, whatever carries the messages.

A node is asked once who it is, and again when it was refused, has answered with an error, or with other slots than it
had said. A client that has not answered by a round's deadline is left out until it does.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from fltac.config import Config
from fltac.records import LateReply, Presence, Reply, Request
from fltac.runtime.letters import Letter, reply_to, why_no_hello
from fltac.runtime.loop import Exchange, Record
from fltac.runtime.post import Arrival, Kind, Post, PostError
from fltac.runtime.roll import Reference, Roll
from fltac.wire.blob import WireError
from fltac.wire.node_protocol import (
    Answer,
    NodeHello,
    Scores,
    decode_answer,
    encode_hello_question,
    encode_score_question,
    encode_train_question,
    one_line,
)

POLL_SECONDS = 0.5
"""Between two looks at what has arrived."""

HELLO_SECONDS = 120.0
"""How long a round waits for new nodes to say who they are; they may still do so later."""

LEFT = "its node has left"

REMINDER_SECONDS = 60.0
"""Between two lines that say for whom a round waits."""


class Federation:
    """Sends the requests of a round to the nodes and collects what they answer; a ``loop.Runtime``."""

    def __init__(
        self,
        post: Post,
        config: Config,
        reference: Reference,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Begins with nobody.

        Args:
            post: What carries the messages.
            config: The coordinator's.
            reference: What every node has to have.
            say: Told in one line what happens.
            clock: Seconds.
            sleep: Waits for so many of them.
        """
        self._post, self._config, self._say, self._clock, self._sleep = post, config, say, clock, sleep
        self._limit = config.wire.message_mb * 2**20
        self.roll = Roll(reference)
        self.scores: dict[str, Scores] = {}
        """By client, the last that were asked for."""
        self._present: list[Presence] = []
        self._letters: dict[str, Letter] = {}
        self._ask_again: set[str] = set()
        self._late: list[LateReply] = []
        self._answered_twice = 0
        self._undeclared: list[str] = []
        self._unscored: dict[str, str] = {}
        self._payload, self._wire = {"up": 0, "down": 0}, {"up": 0, "down": 0}

    def present(self) -> list[Presence]:
        """Waits until everybody who is new has said who he is, and for the quorum; then says who can be asked."""
        quorum, begin = self._config.federation.quorum, self._clock()
        reminded = begin
        refused = set(self.roll.refused)  # Asked again, since their owners may have mended them, but not waited for.
        self._say_hello(self._nodes(), refused | self._ask_again)
        while True:
            self._receive()
            nodes = self._nodes()
            self._say_hello(nodes, set(nodes) - {*self.roll.hellos, *self.roll.refused})
            now = self._clock()
            new = {
                letter.node
                for letter in self._letters.values()
                if letter.kind == "query" and now - letter.sent < HELLO_SECONDS
            }
            there = self.roll.presences(without=self._busy())
            if len(there) >= quorum and not new - refused:
                self._present = there
                return there
            if self._clock() - reminded >= REMINDER_SECONDS:
                reminded = self._clock()
                names = ", ".join(item.client for item in there) or "nobody"
                self._say(f"waiting for {quorum} clients; there are {len(there)}: {names}")
                self._say_hello(nodes, set(self.roll.refused))
            self._sleep(POLL_SECONDS)

    def exchange(self, requests: Sequence[Request]) -> Exchange:
        """Sends the requests; waits for the replies until the deadline, or until nobody is left who could reply."""
        begin, before, dtype = self._clock(), dict(self._payload), self._config.wire_dtype
        letters, replies = self._send_all("train", requests, lambda request: encode_train_question(request, dtype))
        down = self._payload["down"] - before["down"]
        for letter, answer in self._answers(letters, begin):
            reply = reply_to(letter, answer)
            self._note_change(letter, reply)
            replies.append(self._held_to_hello(letter, reply))
        late, self._late = tuple(self._late), []
        up = self._payload["up"] - before["up"]
        return Exchange(tuple(replies), up, down, self._clock() - begin, None, late)

    def deliver(self, requests: Sequence[Request]) -> tuple[list[Request], int]:
        """Sends what each client would go on with; each scores it on its own validation rows (``self.scores``).

        Args:
            requests: From ``plan_delivery``; clients that are still busy get nothing. Each task is scored on at most
                ``evaluation.max_rows`` rows, after the last round too: the time is the owners'.

        Returns:
            The requests that were sent, and their bytes.
        """
        begin, before = self._clock(), self._payload["down"]
        dtype, max_rows = self._config.wire_dtype, self._config.evaluation.max_rows
        self._receive()
        busy, clients = self._busy(), self.roll.clients()
        free = [request for request in requests if clients.get(request.client) not in busy]
        letters, failed = self._send_all("evaluate", free, lambda item: encode_score_question(item, dtype, max_rows))
        down = self._payload["down"] - before
        self.scores, self._unscored = {}, {item.client: "is busy" for item in requests if item not in free}
        self._unscored |= {reply.client: reply.error or "" for reply in failed}
        for letter, answer in self._answers(letters, begin):
            if isinstance(answer, Scores) and answer.client == letter.client:
                hello, most = self.roll.hellos.get(letter.node), self.roll.reference.highest_score
                if any(slot.score > most for slot in answer.slots.values()):
                    self._unscored[letter.client] = f"has scores above {most:g}"
                elif hello is None or set(answer.slots) <= set(hello.slots):
                    self.scores[letter.client] = answer
                else:
                    self._unscored[letter.client] = "scores slots that its node has not said it has"
            else:
                self._unscored[letter.client] = (
                    reply_to(letter, answer).error or "answers with adapters, not with scores"
                )
        return [letter.request for letter in letters.values() if letter.request is not None], down

    @property
    def there(self) -> Sequence[Presence]:
        """Who was there when this round began."""
        return self._present

    def notes(self) -> Record:
        """Who was there, who is refused and why, and the bytes of all messages since the last call."""
        record: Record = {"present": len(self._present), "payload": self._payload, "wire": self._wire}
        named = {
            "refused": sorted(self.roll.refused.values()),
            "unscored": [f"client {client}: {reason}" for client, reason in sorted(self._unscored.items())],
            "undeclared": list(self._undeclared),
            "answered_twice": self._answered_twice,
        }
        record |= {name: value for name, value in named.items() if value}
        self._payload, self._wire = {"up": 0, "down": 0}, {"up": 0, "down": 0}
        self._unscored, self._answered_twice, self._undeclared = {}, 0, []
        return {"network": record}

    def _nodes(self) -> Mapping[str, str]:
        """Who is connected; what was known of others is forgotten, and no answer is expected from them."""
        nodes = self._post.nodes()
        self.roll.keep(nodes)
        self._ask_again &= set(nodes)
        self._letters = {item: letter for item, letter in self._letters.items() if letter.node in nodes}
        return nodes

    def _busy(self) -> set[str]:
        """Addresses of nodes that have not answered yet what they were asked to compute."""
        return {letter.node for letter in self._letters.values() if letter.kind != "query"}

    def _say_hello(self, nodes: Mapping[str, str], which: set[str]) -> None:
        """Asks some of the connected nodes who they are, except those that owe an answer already."""
        owing = {letter.node for letter in self._letters.values()}
        for node in sorted(which & set(nodes) - owing):
            self._ask_again.discard(node)
            try:
                self._send(Letter(node, "query", nodes[node], sent=self._clock()), encode_hello_question(), 0)
            except PostError as error:
                self._refuse(node, f"{nodes[node]}: {error}")

    def _send(self, letter: Letter, payload: bytes, round_number: int) -> str:
        sent = self._post.send(letter.node, letter.kind, payload, round_number)
        self._letters[sent.id] = letter
        self._payload["down"] += len(payload)
        self._wire["down"] += sent.size
        return sent.id

    def _send_all(
        self, kind: Kind, requests: Iterable[Request], encode: Callable[[Request], bytes]
    ) -> tuple[dict[str, Letter], list[Reply]]:
        """Sends one message to each client; returns the letters, and an error for each client that gets none."""
        letters: dict[str, Letter] = {}
        failed, clients = [], self.roll.clients()
        for request in requests:
            try:
                if request.client not in clients:
                    raise PostError(LEFT)
                payload = encode(request)
                if len(payload) > self._limit:
                    raise PostError(
                        f"the message to it has {len(payload)} bytes; allowed are {self._limit} (wire.message_mb)"
                    )
                letter = Letter(clients[request.client], kind, request.client, request)
                letters[self._send(letter, payload, request.round_number)] = letter
            except (PostError, WireError) as error:
                failed.append(Reply(request.client, error=str(error)))
                self._say(f"client {request.client}: {error}")
        return letters, failed

    def _answers(self, letters: Mapping[str, Letter], begin: float) -> Iterator[tuple[Letter, Answer | str]]:
        """Gives each letter's answer as it comes, or why there is none by the deadline."""
        deadline, waiting = self._config.federation.deadline_seconds, set(letters)
        while True:
            for item, letter, answer in self._receive(waiting):
                waiting.discard(item)
                yield letter, answer
            self._nodes()
            over = deadline is not None and self._clock() - begin >= deadline
            if over or not waiting & set(self._letters):
                break
            self._sleep(POLL_SECONDS)
        for item in sorted(waiting):
            yield letters[item], f"no reply within {deadline:g} s" if item in self._letters else LEFT

    def _receive(self, wanted: Collection[str] = ()) -> list[tuple[str, Letter, Answer | str]]:
        """Takes what has arrived: the answers that are wanted are returned, others are dealt with here."""
        found = []
        for arrival in self._post.collect(list(self._letters)):
            self._wire["up"] += arrival.size
            self._payload["up"] += len(arrival.payload or b"")
            letter = self._letters.pop(arrival.id, None)
            if letter is None:
                self._answered_twice += 1
                continue
            answer = self._decoded(arrival)
            if arrival.id in wanted:
                found.append((arrival.id, letter, answer))
            elif letter.kind == "query":
                self._enter(letter, answer)
            elif letter.kind == "train" and letter.request is not None:
                self._say(f"client {letter.client}: its reply to round {letter.request.round_number} came late")
                reply = reply_to(letter, answer)
                self._note_change(letter, reply)
                reply = self._held_to_hello(letter, reply)
                self._late.append(LateReply(letter.request, reply))
        return found

    def _decoded(self, arrival: Arrival) -> Answer | str:
        """The answer, or what is wrong with it."""
        if arrival.payload is None:
            return f"no answer from its node: {arrival.error}"
        try:
            return decode_answer(arrival.payload, self._limit)
        except WireError as error:
            return one_line(str(error))

    def _enter(self, letter: Letter, answer: Answer | str) -> None:
        known, before = self.roll.hellos.get(letter.node), self.roll.refused.get(letter.node)
        if not isinstance(answer, NodeHello):
            self._refuse(letter.node, why_no_hello(letter, answer), before)
            return
        reason = self.roll.enter(letter.node, answer)
        if reason is not None:
            self._refuse(letter.node, reason, before)
        elif answer != known:
            counts = ", ".join(f"{slot}: {answer.examples[slot]}" for slot in answer.slots)
            self._say(f"client {answer.client} is there (rows by slot: {counts})")

    def _refuse(self, node: str, reason: str, before: str | None = None) -> None:
        self.roll.refuse(node, reason)
        if reason != before:
            self._say(f"refused: {reason}")

    def _held_to_hello(self, letter: Letter, reply: Reply) -> Reply:
        """What of a reply counts; says what does not."""
        held, undeclared = self.roll.held_to_hello(letter.node, reply)
        for line in undeclared:
            self._undeclared.append(line)
            self._say(line)
        return held

    def _note_change(self, letter: Letter, reply: Reply) -> None:
        """A client whose reply is not what its hello said is asked again who it is."""
        hello = self.roll.hellos.get(letter.node)
        if reply.error is not None:
            self._say(f"client {letter.client}: {reply.error}")
        if hello is not None and (reply.error or {update.slot for update in reply.updates} != set(hello.slots)):
            self._ask_again.add(letter.node)
