"""Checks of what an upload says beside its adapter: a profile, and the cluster that its client chose."""

from collections.abc import Sequence

import numpy as np

from fltac.records import Update

FLOAT32 = np.dtype(np.float32)


def profile_fault(update: Update, asked: bool, hidden: int, noise: float) -> str | None:
    """Says in one line what is wrong with an update's profile; None if it can be used.

    Args:
        update: As decoded.
        asked: Whether its client was asked for profiles.
        hidden: Numbers that one has, as many as a head reads.
        noise: Standard deviation of what the client adds to each of them.
    """
    profile = update.profile
    if profile is None:  # An owner need not send one.
        return None
    if not asked:
        return "has a profile that was not asked for"
    if profile.shape != (hidden,) or profile.dtype != FLOAT32:
        return f"profile has shape {list(profile.shape)} and dtype {profile.dtype}; expected {[hidden]} of float32"
    norm, allowed = float(np.linalg.norm(profile.astype(np.float64))), 1.01 + 10 * noise * hidden**0.5
    if not norm <= allowed:  # also where it is not a number
        return f"profile has norm {norm:.3g}; allowed are up to {allowed:.3g}, for it is a mean of vectors of length 1"
    return None


def choice_fault(update: Update, candidates: Sequence[int]) -> str | None:
    """Says in one line why the cluster that an update names cannot be; None if it can.

    Args:
        update: As decoded.
        candidates: What its client was to choose from; empty where it was not asked to.
    """
    if update.cluster is None:
        return "has chosen no cluster" if candidates else None
    if not candidates:
        return f"names cluster {update.cluster}, but was not asked to choose"
    if update.cluster not in candidates:
        return f"has chosen cluster {update.cluster}; it was sent {', '.join(map(str, candidates))}"
    return None
