"""All clustering rules by name, and which one decides a round."""

from fltac.config import ServerSettings
from fltac.server import grouping
from fltac.server.allocation import allocate
from fltac.server.bisection import bisect_clusters
from fltac.server.grouping import Evidence, Grouping, Rule


def group_slots(evidence: Evidence, settings: ServerSettings) -> Grouping:
    """Applies the configured rule; where clients were asked to choose, what they chose."""
    if any(update.cluster is not None for update in evidence.updates):
        return chosen(evidence, settings)
    return RULES[settings.clustering.rule](evidence, settings)


def chosen(evidence: Evidence, _: ServerSettings) -> Grouping:
    """The clusters that the clients chose by loss: IFCA (arXiv 2006.04088, Algorithm 1 with model averaging).

    The choice is the client's (``client.assignment``); whether it is one that was sent is checked before. Beyond the
    paper: a slot that was not asked stays where it is, and a stale update of a round without choice counts in the
    cluster that its slot is in, or is left out if there is none.

    What it sends that the default does not: all K adapters to every client of the cohort, instead of those of its own
    slots; and back, for each slot, which of them fits its private rows best.
    """
    held = evidence.state.assignment()
    found = {
        update.key: held.get(update.key) if update.cluster is None else update.cluster for update in evidence.updates
    }
    labels = {key: cluster for key, cluster in found.items() if cluster is not None}
    return Grouping(labels, identities=True, clustered=True)


RULES: dict[str, Rule] = {**grouping.RULES, "ifca": chosen, "cfl": bisect_clusters, "fedlease": allocate}
