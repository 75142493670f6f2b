"""Who takes part: the clients known so far grow, slots that a client gave up are forgotten, cohorts are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fltac.config import ServerSettings
from fltac.records import Presence, ServerState, SlotKey
from fltac.seeding import generator
from fltac.server.first import first_head


def admit(state: ServerState, present: Sequence[Presence], settings: ServerSettings) -> ServerState:
    """The state in which everybody who is there is known.

    Args:
        state: After the last round.
        present: The clients that are there now; others that are known stay known, with all that was learned.
        settings: Gives the seed.

    Returns:
        With the new clients, v0 with a head for each new head key (each from its own generator, so that it does not
        depend on when its first client joins), and without the slots that a client that is there no longer has.
        The same object where nothing is new.
    """
    clients = tuple(sorted({*state.clients, *(item.client for item in present)}))
    gone = _gone(state, present)
    new = _new_heads(state, present)
    if clients == state.clients and not gone and not new:
        return state
    initial = dict(state.initial)
    for key, shape in sorted(new.items()):
        initial |= first_head(key, shape, generator(settings.seed, f"initial-head-{key}"))
    return replace(
        state,
        initial=initial,
        clients=clients,
        clusters=tuple(
            replace(cluster, members=tuple(member for member in cluster.members if member not in gone))
            for cluster in state.clusters
        ),
        memory={key: learned for key, learned in state.memory.items() if key not in gone},
        own={key: tensors for key, tensors in state.own.items() if key not in gone},
    )


def _gone(state: ServerState, present: Sequence[Presence]) -> set[SlotKey]:
    slots = {item.client: item.heads.keys() for item in present}
    known = {*state.assignment(), *state.memory}
    return {(client, slot) for client, slot in known if client in slots and slot not in slots[client]}


def _new_heads(state: ServerState, present: Sequence[Presence]) -> Mapping[str, tuple[int, int]]:
    shapes = {key: shape for item in present for heads in item.heads.values() for key, shape in heads.items()}
    return {key: shape for key, shape in shapes.items() if f"head.{key}.weight" not in state.initial}


def draw_cohort(
    clients: Sequence[str], participation: float, seed: int, round_number: int, least: int = 1
) -> tuple[str, ...]:
    """The clients asked in a round: a seeded share of those that are there, sorted.

    Args:
        clients: Ids of those that are there, sorted.
        participation: The share.
        seed: Of the server's choices.
        round_number: The round.
        least: So many are asked at least, as far as there are so many.
    """
    count = min(len(clients), max(least, 1, round(participation * len(clients))))
    chosen = generator(seed, "cohort", round_number).choice(len(clients), count, replace=False)
    return tuple(clients[index] for index in sorted(chosen))
