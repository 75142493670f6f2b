"""The rules by which a round's slots are grouped from uploads, one function each; ``server.rules`` has all rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from fltac.config import ServerSettings
from fltac.records import Adapter, ServerState, SlotKey, Update
from fltac.seeding import derive, generator
from fltac.server.agreement import ENOUGH, FEWEST, agreement
from fltac.server.changes import Changes
from fltac.server.choosing import Choice, choose_k, confidence
from fltac.server.clustering import Points, group, keep_or_move, sample, silhouette
from fltac.server.gradients import First, compared
from fltac.server.pairing import Matrix
from fltac.server.similarity import WHOLE, distance_sketches, views
from fltac.server.spectrum import embedding, leading

CHOOSING_STARTS = 5
"""Of K-means, for each K that is tried."""
EXTRA_OF_A = 2
"""Eigenvectors beyond K where changes or gradients of A are compared."""
FROM_ROUND_OF_A = 2
"""The first round after which slots are grouped, where changes of A are compared; at the latest, with ``auto``."""
SHARPNESS_OF_A = 1.5
"""Of the dual softmax, where changes or gradients of A are compared and a client's slots are of different tasks."""
HARM = 0.1
"""Profiles count unless what adapters say is predicted worse by more than this share in the groups found with them."""


@dataclass(frozen=True)
class Grouping:
    """Which slots belong together.

    Attributes:
        labels: A group number for each slot that the rule says something about; other slots stay where they are.
        identities: True where the numbers are cluster ids already; False where groups are to be matched with the
            clusters of the round before.
        clustered: False where the rule compares nothing and there is nothing to report.
        silhouette: In the space that was clustered, if one was.
        confidence: How sure each slot's group is (``server.choosing.confidence``), if a space was clustered.
        residuals: For each K that was tried the error of its prediction, where K was chosen.
        profiled: Whether the clients' profiles counted; None where there are none.
        memory: What the rule keeps of each slot for later rounds, where it does so itself.
        agreement: Of groups found in halves of each kind of evidence (``server.agreement``), where that decided by
            which slots are grouped, or whether.
    """

    labels: Mapping[SlotKey, int]
    identities: bool
    clustered: bool
    silhouette: float | None = None
    confidence: Mapping[SlotKey, float] = field(default_factory=dict)
    residuals: Mapping[int, float] | None = None
    profiled: bool | None = None
    memory: Mapping[SlotKey, Adapter] | None = None
    agreement: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at.

    Attributes:
        state: The server before this round.
        round_number: This round.
        updates: Checked, sorted by (client, slot), at least one.
        began: What each of the updates began from.
        changes: What each slot ever seen has learned, this round included, or said at first; None for rules that
            look at neither.
        groups: Opaque group numbers, for the rule ``given`` alone.
    """

    state: ServerState
    round_number: int
    updates: Sequence[Update]
    began: Mapping[SlotKey, Adapter]
    changes: Changes | First | None
    groups: Mapping[SlotKey, int] | None


def _kmeans(evidence: Evidence, settings: ServerSettings) -> Grouping:
    """Algorithm 3 of arXiv 2404.15384: K-means over this round's uploads, flattened; of many, their sketches."""
    adapters = [update.adapter for update in evidence.updates]
    seed = derive(settings.seed, "embedding", evidence.round_number)
    points = distance_sketches(adapters, settings.clustering.head, seed)
    assert settings.k is not None, "the rule 'kmeans' needs K"
    return _grouped([update.key for update in evidence.updates], points, settings.k, evidence, settings)


def _spectral(evidence: Evidence, settings: ServerSettings) -> Grouping:
    """K-means over the leading eigenvectors of the kernel of what each slot has said and learned; all known slots."""
    assert evidence.changes is not None, "the rule 'spectral' accumulates"
    rule = settings.clustering
    first, begun = _first_round(evidence, settings), bool(evidence.state.clusters)
    asked = rule.from_round == "auto" and not begun
    if not asked and (evidence.round_number < first or (first > 1 and not begun)):  # else not all began alike
        return _single(evidence, settings)
    if isinstance(evidence.changes, First):
        kinds = {"gradients": evidence.changes.gradients}
        if settings.aggregation.trains_a:
            kinds["changes"] = evidence.changes.changes
        evidence = replace(evidence, round_number=0)  # What is the same in all rounds is grouped alike in all.
    else:
        kinds = {"changes": evidence.changes}
    if not all(changes.keys for changes in kinds.values()):
        return Grouping({}, identities=True, clustered=False)
    seed = derive(settings.seed, "embedding", evidence.round_number)
    found = {kind: _space(evidence, changes, settings) for kind, changes in kinds.items()}
    agreed = {kind: space.agreement(settings) for kind, space in found.items()} if asked or len(found) > 1 else {}
    kind = max(found, key=lambda kind: (agreed.get(kind, 0.0), kind == "changes"))
    space, changes = found[kind], found[kind].changes
    if asked and (agreed[kind] < ENOUGH or (rule.cannot_link and len({client for client, _ in changes.keys}) < FEWEST)):
        grouping = _single(evidence, settings)
    else:
        points = embedding(changes, rule.head, space.k + space.extra, seed, rule.profile_weight, space.sharpness)
        grouping = _grouped(changes.keys, points, space.k, evidence, settings)
    return replace(grouping, residuals=space.residuals, profiled=space.profiled, agreement=agreed or None)


@dataclass(frozen=True)
class _Space:
    """What is clustered, and into how many."""

    changes: Changes
    k: int
    extra: int
    sharpness: float
    residuals: Mapping[int, float] | None
    profiled: bool | None

    def agreement(self, settings: ServerSettings) -> float:
        """Of groups found in halves of it (``server.agreement``); 0 where there is nothing to compare."""
        rule = settings.clustering
        halves, weight = derive(settings.seed, "halves"), rule.profile_weight
        apart, sharpness = rule.cannot_link, self.sharpness
        return agreement(self.changes, rule.head, self.k, self.extra, halves, weight, sharpness, apart) or 0.0


def _space(evidence: Evidence, changes: Changes, settings: ServerSettings) -> _Space:
    rule, k = settings.clustering, settings.k
    extra, sharpness = rule.extra_eigenvectors, rule.dual_softmax
    if extra is None:
        extra = EXTRA_OF_A if changes.of_a else 0
    if sharpness is None:
        sharpness = SHARPNESS_OF_A if changes.of_a and rule.cannot_link else 0.0
    residuals, profiled = None, None
    if k is None or changes.profiles is not None:
        choice, profiled = _choice(evidence, changes, settings, extra, sharpness)
        if k is None:
            k, residuals = choice.k, choice.residuals
        if not profiled:
            changes = replace(changes, profiles=None)
    return _Space(changes, k, extra, sharpness, residuals, profiled)


def _first_round(evidence: Evidence, settings: ServerSettings) -> int:
    """After which slots are grouped first; with ``auto`` at the latest."""
    configured = settings.clustering.from_round
    if isinstance(configured, int):
        return configured
    late = configured == "auto" or compared(evidence.state.initial, settings) == "a"
    return FROM_ROUND_OF_A if late else 1


def _leading(similarity: Matrix, extra: int, k: int) -> Matrix:
    return leading(similarity, k + extra)


def _choice(
    evidence: Evidence, changes: Changes, settings: ServerSettings, extra: int, sharpness: float
) -> tuple[Choice, bool | None]:
    """K, where it is not given, and whether profiles help: of many slots, from a seeded sample of whole clients.

    Profiles that say nothing of the tasks (several questions about the same rows) would hide what adapters say. So
    they do not count where the groups that are found with them predict what was learned much worse than those without.
    A little worse is no reason: where labels are skewed by client, what is learned is predicted well by the skew.

    Returns:
        The choice, and whether profiles count; None where there are none.
    """
    rule = settings.clustering
    seed = derive(settings.seed, "choose-k", evidence.round_number)
    owners = [client for client, _ in changes.keys]
    few = changes.only(sample(len(owners), owners if rule.cannot_link else None, seed, WHOLE))
    own = [client for client, _ in few.keys] if rule.cannot_link else None
    before = sum(bool(cluster.members) for cluster in evidence.state.clusters) or None
    if len(evidence.state.clusters) == 1 and _first_round(evidence, settings) > 1:
        before = None  # nobody chose to put all together
    choices = []
    for part in [few] if few.profiles is None else [few, replace(few, profiles=None)]:
        parts = views(part, rule.head, rule.profile_weight, sharpness)
        pairs = [(partial(_leading, by, extra), within) for by, within in parts]
        starts = min(rule.starts, CHOOSING_STARTS)
        choices.append(choose_k(pairs, own, starts, seed, before, rule.hysteresis, settings.k))
    if few.profiles is None:
        return choices[0], None
    counted = choices[0].residual <= (1 + HARM) * choices[1].residual
    return choices[0 if counted else 1], counted


def _grouped(keys: Sequence[SlotKey], points: Points, k: int, evidence: Evidence, settings: ServerSettings) -> Grouping:
    rule = settings.clustering
    owners = [client for client, _ in keys] if rule.cannot_link else None
    seed = derive(settings.seed, "clustering", evidence.round_number)
    labels = group(points, k, owners, rule.starts, seed)
    if rule.hysteresis and rule.rule in ACCUMULATING:
        assignment = evidence.state.assignment()
        before = np.array([assignment.get(key, -1) for key in keys])
        if len(np.unique(before[before >= 0])) == len(np.unique(labels)):
            labels = keep_or_move(points, before, labels, owners, rule.hysteresis)
    found = {key: int(label) for key, label in zip(keys, labels, strict=True)}
    sure = {key: float(value) for key, value in zip(keys, confidence(points, labels), strict=True)}
    return Grouping(found, False, clustered=True, silhouette=silhouette(points, labels, seed), confidence=sure)


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

    k = settings.k
    assert k is not None, "the rule 'random' needs K"

    def draw(key: SlotKey) -> int:
        return int(generator(settings.seed, "random-groups", client=key[0], slot=key[1]).integers(k))

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
