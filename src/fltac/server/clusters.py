"""A round's groups become clusters: members, adapters, identities, and what the rules of aggregation keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fltac.config import ServerSettings
from fltac.records import (
    Adapter,
    Cluster,
    ServerState,
    SlotKey,
    Update,
    base_of,
    is_head,
    lora_modules,
    without_base,
)
from fltac.seeding import derive, generator
from fltac.server.aggregation import Part, combined, mean_adapter, optimized, product_error, shrunk, weights_of
from fltac.server.changes import received_by
from fltac.server.first import first_factors
from fltac.server.grouping import Grouping
from fltac.server.matching import match_clusters, match_products
from fltac.server.products import RENEWING


@dataclass(frozen=True)
class Clustered:
    """The clusters after a round.

    Attributes:
        clusters: In order of their ids; those without members keep their adapter.
        optimizer: The server optimizer's moments, by cluster id.
        product_error: As in ``RoundReport``.
    """

    clusters: tuple[Cluster, ...]
    optimizer: Mapping[int, Adapter]
    product_error: float | None


@dataclass(frozen=True)
class _Group:
    """A group's slots, what those that sent an update contribute and began from, and what the rule makes of it."""

    keys: tuple[SlotKey, ...]
    parts: tuple[Part, ...]
    starts: tuple[Adapter, ...]
    adapter: Adapter

    def began(self) -> Adapter:
        """The mean of what those with an update began from."""
        return mean_adapter(self.starts, [part.weight for part in self.parts])


def regrouped(
    state: ServerState,
    updates: Sequence[Update],
    began: Mapping[SlotKey, Adapter],
    grouping: Grouping,
    settings: ServerSettings,
) -> Clustered:
    """Averages each group and gives it the id of a cluster.

    Args:
        state: Before the round.
        updates: Whole, at the common rank.
        began: What each of them began from.
        grouping: The rule's groups.
        settings: The server's.
    """
    number = state.round_number + 1
    fresh = _fresh_factors(state, number, settings.seed)
    groups = _groups(state, updates, began, grouping, settings, fresh)
    before = {cluster.id: cluster for cluster in state.clusters}
    if grouping.identities:
        ids = list(groups)
    elif settings.aggregation.rule in RENEWING:
        made = [group.adapter for group in groups.values()]
        ids = match_products(made, state.clusters, state.next_cluster_id, settings.seed)
    else:
        plain = [Cluster(cluster.id, without_base(cluster.adapter), ()) for cluster in state.clusters]
        ids = match_clusters([without_base(group.adapter) for group in groups.values()], plain, state.next_cluster_id)
    # Those of the mean of all are not one cluster's more than another's.
    divided = len(before) == 1 < len(groups) and not grouping.identities
    moments = {} if divided else dict(state.optimizer)
    members = {cluster.id: set(cluster.members) - set(grouping.labels) for cluster in state.clusters}
    adapters = {cluster.id: cluster.adapter for cluster in state.clusters}
    frozen, shrinkage = settings.aggregation.frozen(number) or (), settings.aggregation.shrinkage
    overall = _mean_of_all(groups) if shrinkage else {}
    for cluster, group in zip(ids, groups.values(), strict=True):
        members.setdefault(cluster, set()).update(group.keys)
        old = before[cluster].adapter if cluster in before else {}
        adapter, trained = group.adapter, {name for part in group.parts for name in part.adapter}
        if settings.aggregation.optimizer != "none" and trained:
            trained = {name for name in trained if not name.endswith(frozen)}
            # A new cluster, as a half that was split off, goes on from what its members began from.
            held = {**state.initial, **(old or group.began())}
            adapter, moments[cluster] = optimized(
                adapter, held, moments.get(cluster, {}), trained, settings.aggregation
            )
        if shrinkage and group.parts:
            adapter = shrunk(adapter, overall, shrinkage * _doubt(group, grouping.confidence))
        # A head that no update of this round had stays as it was, for members that were not asked.
        kept = {name: tensor for name, tensor in old.items() if is_head(name) and name not in adapter}
        adapters[cluster] = {**adapter, **kept}
    error = product_error(
        [(group.parts, group.adapter) for group in groups.values() if group.parts],
        derive(settings.seed, "probes", number),
    )
    after = tuple(Cluster(cluster, adapters[cluster], tuple(sorted(members[cluster]))) for cluster in sorted(adapters))
    return Clustered(after, moments, error)


def _mean_of_all(groups: Mapping[int, _Group]) -> Adapter:
    """Of all of the round's updates, by their weights."""
    parts = [part for group in groups.values() for part in group.parts]
    return mean_adapter([part.adapter for part in parts], [part.weight for part in parts])


def _doubt(group: _Group, confidence: Mapping[SlotKey, float]) -> float:
    """1 for a group whose members might as well be elsewhere, 0 for one without doubt."""
    return 1.0 - sum(max(0.0, confidence.get(key, 1.0)) for key in group.keys) / len(group.keys)


def _fresh_factors(state: ServerState, number: int, seed: int) -> Adapter:
    """Factors for a new beginning: drawn as v0's, anew in each round."""
    shapes = {
        name: tensor.shape
        for module in lora_modules(state.initial)
        for name, tensor in state.initial.items()
        if name.startswith(module + ".lora_")
    }
    return first_factors(shapes, generator(seed, "fresh-factors", number))


def _groups(
    state: ServerState,
    updates: Sequence[Update],
    began: Mapping[SlotKey, Adapter],
    grouping: Grouping,
    settings: ServerSettings,
    fresh: Adapter,
) -> dict[int, _Group]:
    """The groups by their labels, in the order of their first slots."""
    weights = weights_of(updates, settings.aggregation.weighting, grouping.confidence)
    by_key = {update.key: (update, weight) for update, weight in zip(updates, weights, strict=True)}
    received = received_by(state)
    slots: dict[int, list[SlotKey]] = {}
    for key, label in sorted(grouping.labels.items()):
        slots.setdefault(label, []).append(key)
    # One object for each base, so that it counts once however many members have it.
    bases: dict[int, Adapter] = {}
    groups = {}
    for label, keys in slots.items():
        asked = [key for key in keys if key in by_key]
        for key in asked:
            if id(began[key]) not in bases:
                bases[id(began[key])] = base_of(began[key])
        parts = tuple(Part(by_key[key][0].adapter, bases[id(began[key])], by_key[key][1]) for key in asked)
        holds = [received.get(key, state.initial) for key in keys if key not in by_key]
        adapter = combined(parts, settings.aggregation, fresh) if parts else _unasked(holds, settings, fresh)
        # A head that none of the updates has: the mean of those that the other slots hold.
        rest = [
            {name: tensor for name, tensor in held.items() if is_head(name) and name not in adapter} for held in holds
        ]
        starts = tuple(began[key] for key in asked)
        groups[label] = _Group(tuple(keys), parts, starts, {**adapter, **mean_adapter(rest, [1.0] * len(rest))})
    return groups


def _unasked(holds: Sequence[Adapter], settings: ServerSettings, fresh: Adapter) -> Adapter:
    """A group without updates: what its slots hold, averaged by the rule where that differs."""
    if all(held is holds[0] for held in holds):
        return holds[0]
    bases: dict[int, Adapter] = {}
    parts = [Part(without_base(held), bases.setdefault(id(held), base_of(held)), 1.0) for held in holds]
    return combined(parts, settings.aggregation, fresh)
