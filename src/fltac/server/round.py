"""A round from the server's side: state in, requests out; state and replies in, state and report out.

No function here keeps anything, and no type here has room for a task's name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from fltac.config import ServerSettings
from fltac.records import (
    LORA_A,
    Adapter,
    Cluster,
    FloatArray,
    LateReply,
    Presence,
    Rejection,
    Reply,
    Request,
    RoundReport,
    ServerState,
    SlotKey,
    Update,
)
from fltac.seeding import generator
from fltac.server.aggregation import mean_adapter, weights_of
from fltac.server.changes import received_by, remember
from fltac.server.cohort import draw_cohort, first_head
from fltac.server.grouping import ACCUMULATING, Evidence, Grouping, group_slots
from fltac.server.matching import match_clusters
from fltac.server.validation import accept_late, accept_updates


def init_server(
    settings: ServerSettings,
    body_shapes: Mapping[str, tuple[int, ...]],
    head_shapes: Mapping[str, tuple[int, int]],
    clients: Iterable[str],
) -> ServerState:
    """The state before the first round, with the first adapter v0.

    Args:
        settings: Gives the seed.
        body_shapes: Name to shape of all adapter tensors that are not heads.
        head_shapes: Head key to (outputs, hidden).
        clients: Ids of all clients.

    Returns:
        A is drawn from U(-1/sqrt(in), 1/sqrt(in)) as PEFT draws it, everything else of the body is zero, so that v0
        changes nothing; head weights are drawn from N(0, 0.02^2), biases are zero.
    """
    initial: dict[str, FloatArray] = {}
    draw = generator(settings.seed, "initial-adapter")
    for name, shape in body_shapes.items():
        bound = shape[-1] ** -0.5
        value = draw.uniform(-bound, bound, shape) if name.endswith(LORA_A) else np.zeros(shape)
        initial[name] = value.astype(np.float32)
    for key, (outputs, hidden) in head_shapes.items():
        initial |= first_head(key, (outputs, hidden), draw)
    return ServerState(round_number=0, initial=initial, clients=tuple(sorted(clients)))


def plan_round(
    state: ServerState, settings: ServerSettings, present: Sequence[Presence] | None = None
) -> list[Request]:
    """The requests of the next round, one for each client of the cohort, sorted by client.

    Args:
        state: With everybody who is there admitted.
        settings: The server's settings.
        present: The clients that are there, at least one; default: all that are known, with the slots that are.
    """
    number = state.round_number + 1
    there = _presences(state) if present is None else {item.client: item for item in present}
    cohort = draw_cohort(sorted(there), settings.participation, settings.seed, number, settings.quorum)
    return _requests(state, number, [there[client] for client in cohort])


def plan_delivery(state: ServerState, present: Sequence[Presence] | None = None) -> list[Request]:
    """What every client that is there (default: that is known) is sent after a round."""
    there = _presences(state) if present is None else {item.client: item for item in present}
    return _requests(state, state.round_number, [there[client] for client in sorted(there)])


def _presences(state: ServerState) -> dict[str, Presence]:
    heads: dict[str, dict[int, Mapping[str, tuple[int, int]]]] = {client: {} for client in state.clients}
    for client, slot in state.assignment():
        heads[client][slot] = {}
    return {client: Presence(client, own) for client, own in heads.items()}


def _requests(state: ServerState, number: int, clients: Sequence[Presence]) -> list[Request]:
    assignment, adapters = state.assignment(), {cluster.id: cluster.adapter for cluster in state.clusters}
    requests = []
    for item in clients:
        slots = {
            slot: assignment[item.client, slot] for slot in sorted(item.heads) if (item.client, slot) in assignment
        }
        requests.append(
            Request(
                round_number=number,
                client=item.client,
                slots=slots,
                adapters={cluster: adapters[cluster] for cluster in sorted(set(slots.values()))},
                initial=state.initial if _lacks(item, slots, adapters) else None,
            )
        )
    return requests


def _lacks(item: Presence, slots: Mapping[int, int], adapters: Mapping[int, Adapter]) -> bool:
    """Whether a slot has no cluster yet, or uses a head that its cluster's adapter has not; clients keep nothing."""
    return not slots or any(
        slot not in slots or any(f"head.{key}.weight" not in adapters[slots[slot]] for key in heads)
        for slot, heads in item.heads.items()
    )


def finish_round(
    state: ServerState,
    requests: Sequence[Request],
    replies: Sequence[Reply],
    settings: ServerSettings,
    groups: Mapping[SlotKey, int] | None = None,
    late: Sequence[LateReply] = (),
) -> tuple[ServerState, RoundReport]:
    """Checks, groups, keeps identities, averages.

    Args:
        state: Before the round.
        requests: What was sent.
        replies: What came back, in any order; missing clients are reported.
        settings: The server's settings.
        groups: Opaque group numbers for the rule ``given``.
        late: Replies to earlier rounds that came only now. Where stale ones are used, an update counts as it is, and
            what it learned counts from the adapter that it began from; this round's update of a slot goes first.

    Returns:
        The state after the round and the report. Without a single update to use, or with replies of fewer clients
        than the quorum, only the round number changes.
    """
    number = state.round_number + 1
    cohort = tuple(sorted(request.client for request in requests))
    updates, rejections = accept_updates(replies, cohort, state.initial)
    received = received_by(state)
    began = {update.key: received.get(update.key, state.initial) for update in updates}
    stale = 0
    replied = sorted({update.client for update in updates})
    if len(replied) < settings.quorum:
        few = f"{len(replied)} clients replied, fewer than the quorum of {settings.quorum}; the round changes nothing"
        rejections += [Rejection(client, None, few) for client in replied]
        rejections += [Rejection(item.request.client, None, f"came late, and {few}") for item in late]
        updates = []
    else:
        for item in late:
            used, refused = accept_late(item, began, state.initial, settings.stale)
            began |= {update.key: item.request.sent(update.slot) or state.initial for update in used}
            updates, rejections, stale = [*updates, *used], [*rejections, *refused], stale + len(used)
        updates.sort(key=lambda update: update.key)
    if not updates:
        nothing = RoundReport(number, cohort, 0, tuple(rejections), None, None)
        return replace(state, round_number=number), nothing
    rule = settings.clustering
    changes = remember(state, updates, began, rule.memory, settings.seed) if rule.rule in ACCUMULATING else None
    # Its products are small: more threads would wait for each other, and their number would change rounding.
    with threadpool_limits(1):
        grouping = group_slots(Evidence(state, number, updates, changes, groups), settings)
        clusters = _clusters(state, updates, grouping, settings)
    after = ServerState(
        round_number=number,
        initial=state.initial,
        clients=state.clients,
        clusters=clusters,
        memory=state.memory if changes is None else changes.memory(),
        next_cluster_id=max([state.next_cluster_id, *(cluster.id + 1 for cluster in clusters)]),
    )
    k = sum(bool(cluster.members) for cluster in clusters) if grouping.clustered else None
    report = RoundReport(
        number,
        cohort,
        len(updates),
        tuple(rejections),
        k,
        grouping.silhouette,
        stale,
        grouping.confidence,
        grouping.residuals,
    )
    return after, report


@dataclass(frozen=True)
class _Member:
    """A slot of a group: what it holds now, and its update if it sent one."""

    key: SlotKey
    adapter: Adapter
    update: Update | None


def _clusters(
    state: ServerState, updates: Sequence[Update], grouping: Grouping, settings: ServerSettings
) -> tuple[Cluster, ...]:
    """The clusters after the round: members, means, identities; clusters without members keep their adapter."""
    by_key = {update.key: update for update in updates}
    received = received_by(state)
    groups: dict[int, list[_Member]] = {}
    for key, label in sorted(grouping.labels.items()):
        update = by_key.get(key)
        adapter = update.adapter if update else received.get(key, state.initial)
        groups.setdefault(label, []).append(_Member(key, adapter, update))
    means = [_mean(members, settings) for members in groups.values()]
    ids = list(groups) if grouping.identities else match_clusters(means, state.clusters, state.next_cluster_id)
    members_of = {cluster.id: set(cluster.members) - set(grouping.labels) for cluster in state.clusters}
    adapters = {cluster.id: cluster.adapter for cluster in state.clusters}
    for number, members, mean in zip(ids, groups.values(), means, strict=True):
        members_of.setdefault(number, set()).update(member.key for member in members)
        adapters[number] = _with_old_heads(mean, adapters.get(number))
    return tuple(Cluster(number, adapters[number], tuple(sorted(members_of[number]))) for number in sorted(adapters))


def _mean(members: Sequence[_Member], settings: ServerSettings) -> Adapter:
    """Over this round's updates; what none of them has (a head, or everything) is the mean of what slots hold."""
    updates = [member.update for member in members if member.update is not None]
    mean: Adapter = {}
    if updates:
        weights = weights_of(updates, settings.aggregation.weighting)
        mean = mean_adapter([update.adapter for update in updates], weights)
    rest = [{name: tensor for name, tensor in member.adapter.items() if name not in mean} for member in members]
    return {**mean, **mean_adapter(rest, [1.0] * len(rest))}


def _with_old_heads(mean: Adapter, before: Adapter | None) -> Adapter:
    """A head that no update of this round had stays as it was, for members that were not asked."""
    missing = {name: tensor for name, tensor in (before or {}).items() if name not in mean}
    return {**mean, **missing}
