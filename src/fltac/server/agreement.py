"""Whether what slots have said tells them apart: do the groups found in one half of it agree with the other's?

How many slots a grouping has wrong the server cannot see. But where the groups found in two halves of the adapted
matrices are alike, they are mostly right as well (``docs/clustering.md``). So of two kinds of evidence, gradients and
the first trainings' changes, that is grouped by whose halves agree more; and where they hardly agree, slots may be
left together for one more round (``server.clustering.from_round: auto``). Heads, and profiles that count, belong to
both halves.
"""

from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from fltac.seeding import derive
from fltac.server.changes import Changes
from fltac.server.clustering import group, sample
from fltac.server.pairing import paired
from fltac.server.similarity import WHOLE, kernel
from fltac.server.spectrum import leading

ENOUGH = 0.7
"""Of agreement with ``auto``, so that slots are grouped: in the lab's first rounds below it many groupings are poor."""
DRAWS = 8
"""Of halves."""
MOST, OF_EACH = 128, 8
"""So many slots are looked at, or so many for each group if that is more; with cannot-link of whole clients."""
FEWEST = 8
"""Clients with ``auto``: the slots of fewer agree by chance, as cannot-link leaves little to choose."""
STARTS = 5
"""Of K-means, for each half."""
KNOWN, REMEMBERED = dict[bytes, float](), 64
"""Answers by a digest of all they depend on: what slots said first is asked again in each round of a run."""


def agreement(
    changes: Changes,
    head: bool,
    k: int,
    extra: int,
    seed: int,
    profile_weight: float,
    sharpness: float,
    apart: bool,
) -> float | None:
    """The adjusted Rand index of groups found in two halves of the adapted matrices, in the mean of several draws.

    Args:
        changes: What each slot has learned; heads and profiles are part of both halves.
        head: Compare heads, too.
        k: Number of groups.
        extra: Eigenvectors beyond.
        seed: Of the draws, the sample and K-means.
        profile_weight: Of profiles.
        sharpness: Of the dual softmax.
        apart: Whether slots of one client fall into different groups.

    Returns:
        1 for the same groups, about 0 for chance; None where there is nothing to compare: no change of any matrix,
        fewer than two of them, fewer than two groups or slots for each group.
    """
    owners = [client for client, _ in changes.keys]
    if len(changes.modules) < 2 or k < 2 or len(owners) < 2 * k or not changes.body.any():
        return None
    most = min(WHOLE, max(MOST, OF_EACH * k))
    few = changes.only(sample(len(owners), owners if apart else None, derive(seed, "sample"), most))
    how = (head, k, extra, seed, profile_weight, sharpness, apart)
    digest = _digest(few, repr((how, DRAWS, STARTS)))
    found = KNOWN.get(digest)
    if found is None:
        found = _halves(few, *how)
        if len(KNOWN) >= REMEMBERED:
            KNOWN.clear()
        KNOWN[digest] = found
    return found


def _digest(few: Changes, how: str) -> bytes:
    others = {**{f"head {key}": own for key, own in few.heads.items()}, "profiles": few.profiles}
    arrays: dict[str, NDArray[Any]] = {"body": few.body}
    for name, own in others.items():
        if own is not None:
            arrays |= {f"{name} rows": own.rows, f"{name} values": own.values}
    shapes = {name: array.shape for name, array in arrays.items()}
    out = blake2b(repr((how, few.keys, few.modules, few.of_a, shapes)).encode(), digest_size=16)
    for array in arrays.values():
        out.update(np.ascontiguousarray(array).data)
    return out.digest()


def _halves(
    few: Changes, head: bool, k: int, extra: int, seed: int, profile_weight: float, sharpness: float, apart: bool
) -> float:
    own = [client for client, _ in few.keys] if apart else None
    bare = replace(few, heads={}, profiles=None)
    each = np.stack([kernel(replace(bare, modules=(part,)), False) for part in few.modules])
    common = kernel(replace(few, modules=(), profiles=None), head)
    said = kernel(replace(few, modules=(), heads={}), False, profile_weight)
    draw, found = np.random.default_rng(seed), []
    for number in range(DRAWS):
        order, labels = draw.permutation(len(each)), []
        for half in np.split(order, [len(order) // 2]):
            similarity = paired(each[half].mean(axis=0) + common, [client for client, _ in few.keys], sharpness) + said
            labels.append(group(leading(similarity, k + extra), k, own, STARTS, derive(seed, "half", number)))
        found.append(float(adjusted_rand_score(*labels)))
    return float(np.mean(found))
