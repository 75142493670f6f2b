"""What slots learned while all were one cluster and what went into no mean: given back when the cluster divides.

As long as all are one cluster (``server.clustering.from_round``) each slot goes on from the mean of all, so that what
it learned apart from the others is lost. Once it is known which slots belong together, the members of a group get back
what they learned then: with a share of 1 the group goes on from where it would be, to first order, if it had been
grouped from the first round on.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fltac.config import ServerSettings
from fltac.records import Adapter, ServerState, SlotKey, Update

SHARE = 1.0
"""Given back where it is not configured."""


def share_of(settings: ServerSettings) -> float:
    """How much is given back; nothing where the rule of aggregation is not a mean of factors."""
    if settings.clustering.rule != "spectral" or settings.aggregation.rule != "mean":
        return 0.0
    share = settings.clustering.give_back
    return SHARE if share is None else share


def apart(state: ServerState, updates: Sequence[Update], mean: Adapter) -> dict[SlotKey, Adapter]:
    """How far each slot's uploads were from what all went on from, summed over the rounds so far.

    Args:
        state: Before the round.
        updates: Of the round, whole, at the common rank.
        mean: The adapter of the cluster that all are in after it.

    Returns:
        float32 tensors, those of ``mean`` that an update has; slots without an update keep what they have.
    """
    out = dict(state.apart)
    for update in updates:
        held = state.apart.get(update.key, {})
        out[update.key] = {
            name: tensor - mean[name] + held.get(name, np.float32(0))
            for name, tensor in update.adapter.items()
            if name in mean
        }
    return out


def given_back(state: ServerState, updates: Sequence[Update], share: float) -> list[Update]:
    """The updates as they count when the one cluster divides: with a share of what their slots learned apart."""
    factor, out = np.float32(share), []
    for update in updates:
        held = state.apart.get(update.key, {})
        moved = {name: update.adapter[name] + factor * held[name] for name in update.adapter if name in held}
        out.append(replace(update, adapter={**update.adapter, **moved}) if moved else update)
    return out
