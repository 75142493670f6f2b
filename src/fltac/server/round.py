"""A round from the server's side: state in, requests out; state and replies in, state and report out.

No function here keeps anything, and no type here has room for a task's name.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

from threadpoolctl import threadpool_limits

from fltac.config import ServerSettings
from fltac.records import (
    Adapter,
    LateReply,
    Presence,
    Rejection,
    Reply,
    Request,
    RoundReport,
    ServerState,
    SlotKey,
)
from fltac.seeding import generator
from fltac.server.changes import PROFILE, Changes, remember
from fltac.server.clusters import regrouped
from fltac.server.cohort import draw_cohort
from fltac.server.first import first_adapter, first_clusters
from fltac.server.gradients import First, compared, gathered
from fltac.server.grouping import Evidence, Grouping
from fltac.server.rules import group_slots
from fltac.server.sending import Completion, Outbox, own_part, without_constant
from fltac.server.validation import Expectations, accept_late, accept_updates


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
        changes nothing; head weights are drawn from N(0, 0.02^2), biases are zero. With the rule ``ifca``, the first
        clusters, too.
    """
    initial = first_adapter(body_shapes, head_shapes, generator(settings.seed, "initial-adapter"))
    clusters = first_clusters(settings, body_shapes, head_shapes) if settings.clustering.rule == "ifca" else ()
    return ServerState(
        round_number=0,
        initial=initial,
        clients=tuple(sorted(clients)),
        clusters=clusters,
        next_cluster_id=len(clusters),
    )


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
    clients, rule = [there[client] for client in cohort], settings.clustering
    # Among one there is nothing to choose, and choosing makes no more of them; IFCA's are there from the start.
    choose = rule.by_loss(number) and (rule.rule == "ifca" or len(state.clusters) > 1)
    requests = _requests(state, settings, number, clients, choose)
    profiled: dict[str, set[int]] = {item.client: set() for item in clients}
    for (client, slot), held in state.memory.items():
        if PROFILE in held and client in profiled:
            profiled[client].add(slot)
    by_gradients = compared(state.initial, settings) == "gradients" and not choose
    return [
        replace(
            request,
            profile=rule.profile_rows > 0 and _has_new(item, profiled[item.client]),
            gradients=by_gradients and _has_new(item, request.slots),
        )
        for request, item in zip(requests, clients, strict=True)
    ]


def _has_new(item: Presence, known: Container[int]) -> bool:
    """Whether a client has slots that are not known, or may have some."""
    return not item.heads or any(slot not in known for slot in item.heads)


def plan_delivery(
    state: ServerState, settings: ServerSettings, present: Sequence[Presence] | None = None
) -> list[Request]:
    """What every client that is there (default: that is known) is sent after a round."""
    there = _presences(state) if present is None else {item.client: item for item in present}
    return _requests(state, settings, state.round_number, [there[client] for client in sorted(there)])


def _presences(state: ServerState) -> dict[str, Presence]:
    heads: dict[str, dict[int, Mapping[str, tuple[int, int]]]] = {client: {} for client in state.clients}
    for client, slot in state.assignment():
        heads[client][slot] = {}
    return {client: Presence(client, own) for client, own in heads.items()}


def _requests(
    state: ServerState,
    settings: ServerSettings,
    number: int,
    clients: Sequence[Presence],
    choose: bool = False,
) -> list[Request]:
    """What each client is sent; to ``choose`` from, all clusters, those without members included."""
    outbox = Outbox(state, settings)
    adapters = {cluster.id: cluster.adapter for cluster in state.clusters}
    candidates = tuple(sorted(adapters)) if choose else ()
    requests = []
    for item in clients:
        assigned = {slot: outbox.cluster((item.client, slot)) for slot in sorted(item.heads)}
        slots = {slot: cluster for slot, cluster in assigned.items() if cluster is not None}
        lacks = _lacks(item, slots, adapters, candidates)
        sent = {slot: outbox.of((item.client, slot)) for slot in slots}
        # A slot that has something of its own has an adapter of its own, under a number that is no cluster's.
        slots = {
            slot: state.next_cluster_id + slot if (item.client, slot) in state.own else cluster
            for slot, cluster in slots.items()
        }
        own = {number: sent[slot] for slot, number in sorted(slots.items(), key=lambda pair: pair[1])}
        if candidates:
            own = {cluster: outbox.shared(cluster, item.client) for cluster in candidates}
        if lacks or item.keeps_initial:
            own = {number: without_constant(adapter, settings) for number, adapter in own.items()}
        requests.append(
            Request(
                round_number=number,
                client=item.client,
                slots=slots,
                adapters=own,
                initial=outbox.shared(None, item.client) if lacks else None,
                candidates=candidates,
            )
        )
    return requests


def _lacks(
    item: Presence, slots: Mapping[int, int], adapters: Mapping[int, Adapter], candidates: Sequence[int]
) -> bool:
    """Whether a slot has no cluster yet, or uses a head that its cluster's adapter has not; clients keep nothing.

    Where the client chooses: whether a slot uses a head that a candidate has not.
    """
    if candidates:
        heads = {key for own in item.heads.values() for key in own}
        return any(f"head.{key}.weight" not in adapters[cluster] for key in heads for cluster in candidates)
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
    updates, rejections = accept_updates(replies, requests, Expectations(state.initial, settings, number))
    outbox, completion = Outbox(state, settings), Completion(state.initial)
    slots = {request.client: request.slots for request in requests}
    began = {update.key: completion.began(outbox.began(update, slots[update.client])) for update in updates}
    stale = 0
    replied = sorted({update.client for update in updates})
    if len(replied) < settings.quorum:
        few = f"{len(replied)} clients replied, fewer than the quorum of {settings.quorum}; the round changes nothing"
        rejections += [Rejection(client, None, few) for client in replied]
        rejections += [Rejection(item.request.client, None, f"came late, and {few}") for item in late]
        updates = []
    else:
        for item in late:
            used, refused = accept_late(item, began, state.initial, settings)
            first = outbox.shared(None, item.request.client)
            sent = {update.key: item.request.began(update) or first for update in used}
            began |= {key: completion.began(adapter) for key, adapter in sent.items()}
            updates, rejections, stale = [*updates, *used], [*rejections, *refused], stale + len(used)
        updates.sort(key=lambda update: update.key)
    if not updates:
        nothing = RoundReport(number, cohort, 0, tuple(rejections), None, None)
        return replace(state, round_number=number), nothing
    updates = [completion.whole(update, began) for update in updates]
    rule = settings.clustering
    changes: Changes | First | None = None
    what = compared(state.initial, settings)
    if what == "gradients":
        changes = gathered(state, updates, began, settings.seed)
    elif what is not None:
        changes = remember(state, updates, began, rule.memory, settings.seed, what == "a")
    # Its products are small: more threads would wait for each other, and their number would change rounding.
    with threadpool_limits(1):
        grouping = group_slots(Evidence(state, number, updates, began, changes, groups), settings)
        clustered = regrouped(state, updates, began, grouping, settings)
    clusters, own = clustered.clusters, {update.key: own_part(update, settings, number) for update in updates}
    if not 1 < settings.aggregation.from_round <= number:  # then means take the place of what slots had alone
        own = {**state.own, **own}
    after = ServerState(
        round_number=number,
        initial=state.initial,
        clients=state.clients,
        clusters=clusters,
        memory=_memory(state, changes, grouping),
        next_cluster_id=max([state.next_cluster_id, *(cluster.id + 1 for cluster in clusters)]),
        own={key: tensors for key, tensors in own.items() if tensors},
        optimizer=clustered.optimizer,
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
        clustered.product_error,
        grouping.confidence,
        grouping.residuals,
        grouping.profiled,
        grouping.agreement,
    )
    return after, report


def _memory(state: ServerState, changes: Changes | First | None, grouping: Grouping) -> Mapping[SlotKey, Adapter]:
    """What is kept of each slot: by the rule itself, or what it has learned, or what was kept before."""
    if grouping.memory is not None:
        return grouping.memory
    return state.memory if changes is None else changes.memory()
