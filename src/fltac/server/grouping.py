"""The rules by which a round's slots are grouped from uploads, one function each; ``server.rules`` has all rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fltac.config import ServerSettings
from fltac.records import Adapter, ServerState, SlotKey, Update
from fltac.seeding import derive, generator
from fltac.server.changes import Changes
from fltac.server.clustering import Points, group, silhouette
from fltac.server.similarity import distance_sketches, embedding


@dataclass(frozen=True)
class Grouping:
    """Which slots belong together.

    Attributes:
        labels: A group number for each slot that the rule says something about; other slots stay where they are.
        identities: True where the numbers are cluster ids already; False where groups are to be matched with the
            clusters of the round before.
        clustered: False where the rule compares nothing and there is nothing to report.
        silhouette: In the space that was clustered, if one was.
        memory: What the rule keeps of each slot for later rounds, where it does so itself.
    """

    labels: Mapping[SlotKey, int]
    identities: bool
    clustered: bool
    silhouette: float | None = None
    memory: Mapping[SlotKey, Adapter] | None = None


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at.

    Attributes:
        state: The server before this round.
        round_number: This round.
        updates: Checked, sorted by (client, slot), at least one.
        began: What each of the updates began from.
        changes: What each slot ever seen has learned, this round included; None for rules that do not accumulate.
        groups: Opaque group numbers, for the rule ``given`` alone.
    """

    state: ServerState
    round_number: int
    updates: Sequence[Update]
    began: Mapping[SlotKey, Adapter]
    changes: Changes | None
    groups: Mapping[SlotKey, int] | None


def _kmeans(evidence: Evidence, settings: ServerSettings) -> Grouping:
    """Algorithm 3 of arXiv 2404.15384: K-means over this round's uploads, flattened; of many, their sketches."""
    adapters = [update.adapter for update in evidence.updates]
    seed = derive(settings.seed, "embedding", evidence.round_number)
    points = distance_sketches(adapters, settings.clustering.head, seed)
    return _grouped([update.key for update in evidence.updates], points, evidence, settings)


def _spectral(evidence: Evidence, settings: ServerSettings) -> Grouping:
    """K-means over the top-K eigenvectors of the kernel of all that each slot has learned; all known slots."""
    assert evidence.changes is not None, "the rule 'spectral' accumulates"
    seed = derive(settings.seed, "embedding", evidence.round_number)
    points = embedding(evidence.changes, settings.clustering.head, settings.k, seed)
    return _grouped(evidence.changes.keys, points, evidence, settings)


def _grouped(keys: Sequence[SlotKey], points: Points, evidence: Evidence, settings: ServerSettings) -> Grouping:
    rule = settings.clustering
    owners = [client for client, _ in keys] if rule.cannot_link else None
    seed = derive(settings.seed, "clustering", evidence.round_number)
    labels = group(points, settings.k, owners, rule.starts, seed)
    found = {key: int(label) for key, label in zip(keys, labels, strict=True)}
    return Grouping(found, identities=False, clustered=True, silhouette=silhouette(points, labels, seed))


def _single(evidence: Evidence, _: ServerSettings) -> Grouping:
    """Everybody together (FedIT, arXiv 2305.05644)."""
    return Grouping({update.key: 0 for update in evidence.updates}, identities=True, clustered=False)


def _none(evidence: Evidence, _: ServerSettings) -> Grouping:
    """Every slot alone; it keeps its cluster."""
    labels, next_id = evidence.state.assignment(), evidence.state.next_cluster_id
    for update in evidence.updates:
        if update.key not in labels:
            labels[update.key], next_id = next_id, next_id + 1
    return Grouping(labels, identities=True, clustered=False)


def _given(evidence: Evidence, _: ServerSettings) -> Grouping:
    """Groups from outside: the oracle's."""
    assert evidence.groups is not None, "the rule 'given' needs group numbers"
    labels = {update.key: evidence.groups[update.key] for update in evidence.updates}
    return Grouping(labels, identities=True, clustered=True)


def _random(evidence: Evidence, settings: ServerSettings) -> Grouping:
    """A seeded random group for each slot, the same in all rounds."""

    def draw(key: SlotKey) -> int:
        return int(generator(settings.seed, "random-groups", client=key[0], slot=key[1]).integers(settings.k))

    labels = {update.key: draw(update.key) for update in evidence.updates}
    return Grouping(labels, identities=True, clustered=True)


Rule = Callable[[Evidence, ServerSettings], Grouping]

RULES: dict[str, Rule] = {
    "kmeans": _kmeans,
    "spectral": _spectral,
    "single": _single,
    "none": _none,
    "given": _given,
    "random": _random,
}

ACCUMULATING = frozenset({"spectral"})
"""Rules that need what each slot has learned over the rounds."""
