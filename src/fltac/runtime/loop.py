"""The one loop: plan a round, exchange, finish the round, score, keep."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fltac.config import Config
from fltac.errors import RunError
from fltac.records import Adapter, LateReply, Presence, Reply, Request, RoundReport, ServerState, SlotKey
from fltac.server.cohort import admit
from fltac.server.round import finish_round, plan_delivery, plan_round
from fltac.wire.blob import WireError
from fltac.wire.codec import decode_adapter, encode_adapter

Record = dict[str, Any]
"""A line of ``rounds.jsonl``."""
Watch = Callable[[ServerState, Sequence[Reply]], None]
"""Looks at a finished round's replies from outside; nothing of it comes back."""


@dataclass(frozen=True)
class Exchange:
    """The replies of a round and what they cost.

    Attributes:
        replies: Of this round.
        up_bytes: Payload of the replies that arrived.
        down_bytes: Payload of the requests.
        train_seconds: From the first request to the last reply.
        loss: The mean training loss over all slots; None if nothing was trained, or nobody says.
        late: Replies to earlier rounds that arrived during this one.
    """

    replies: tuple[Reply, ...]
    up_bytes: int
    down_bytes: int
    train_seconds: float
    loss: float | None
    late: tuple[LateReply, ...] = ()


def as_sent(state: ServerState, config: Config) -> ServerState:
    """The state with its adapters rounded as the wire rounds them, so that all sides hold the same numbers.

    Raises:
        RunError: a number has grown beyond what the wire can carry.
    """
    if config.wire_dtype == "float32":
        return state

    def rounded(adapter: Adapter) -> Adapter:
        try:
            return decode_adapter(encode_adapter(adapter, config.wire_dtype))
        except WireError as error:
            raise RunError(f"round {state.round_number}: {error}") from error

    clusters = tuple(replace(cluster, adapter=rounded(cluster.adapter)) for cluster in state.clusters)
    own = {key: rounded(tensors) for key, tensors in state.own.items()}
    return replace(state, initial=rounded(state.initial), clusters=clusters, own=own)


class Runtime(Protocol):
    """What differs between a simulation and a federation over the network."""

    def notes(self) -> Record:
        """What else a round's record should say, since the last call."""
        ...

    def present(self) -> Sequence[Presence]:
        """The clients that can be asked now, sorted; waits until there are as many as the quorum."""
        ...

    def exchange(self, requests: Sequence[Request]) -> Exchange:
        """Sends the requests of a round and collects the replies."""
        ...

    def deliver(self, requests: Sequence[Request]) -> tuple[list[Request], int]:
        """Sends adapters without asking for training; returns them as received and the bytes sent."""
        ...


class Judge(Protocol):
    """Scores the server's state from outside."""

    def __call__(self, state: ServerState, report: RoundReport, last: bool) -> Record:
        """Returns the keys ``tasks``, ``mean_score`` and ``clustering`` of a round's record."""
        ...


def federate(
    state: ServerState,
    rounds: int,
    config: Config,
    runtime: Runtime,
    judge: Judge,
    keep: Callable[[ServerState, Record], None],
    on_round: Callable[[int, Sequence[Request]], None] = lambda _number, _requests: None,
    groups: Mapping[SlotKey, int] | None = None,
    watch: Watch | None = None,
) -> ServerState:
    """Runs the rounds that are left.

    Args:
        state: The server's state after ``state.round_number`` rounds.
        rounds: The last round's number.
        config: The run's configuration.
        runtime: Simulation or network.
        judge: The evaluator.
        keep: Called with the state and the record after each round; it makes them last.
        on_round: Called with a round's number and requests before they are sent.
        groups: Opaque group numbers for the clustering rule ``given``.
        watch: Told of each round before it is kept, so that what it writes is there for all rounds that are.

    Returns:
        The state after the last round.
    """
    settings = config.server_settings
    for number in range(state.round_number + 1, rounds + 1):
        last = number == rounds
        present = runtime.present()
        admitted = admit(state, present, settings)
        state = state if admitted is state else as_sent(admitted, config)
        requests = plan_round(state, settings, present)
        on_round(number, requests)
        exchange = runtime.exchange(requests)
        start = time.perf_counter()
        state, report = finish_round(state, requests, exchange.replies, settings, groups, exchange.late)
        state = as_sent(state, config)
        served = time.perf_counter()
        delivered = runtime.deliver(plan_delivery(state, settings, present))[1] if last else 0
        judged = judge(state, report, last)
        sent = config.communicates
        record = {
            "round": number,
            "clients": len(report.cohort),
            "updates": report.updates,
            "rejected": len(report.rejections),
            **({"stale": report.stale} if exchange.late else {}),
            **judged,
            **({} if report.agreement is None else {"agreement": report.agreement}),
            "aggregation": {"product_error": report.product_error},
            "bytes": {
                "up": exchange.up_bytes if sent else 0,
                "down": exchange.down_bytes + delivered if sent else 0,
            },
            "loss": exchange.loss,
            "seconds": {
                "train": exchange.train_seconds,
                "server": served - start,
                "evaluate": time.perf_counter() - served,
            },
        }
        if report.rejections:
            record["rejections"] = [
                {"client": item.client, "slot": item.slot, "reason": item.reason} for item in report.rejections
            ]
        if watch is not None:
            watch(state, exchange.replies)
        keep(state, record | runtime.notes())
    return state
