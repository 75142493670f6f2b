"""Ways to put the rounds of a film together, replayed: what changes of A would have grouped after each round.

After the first round exact for the rule that was played alone, an indication for the others, since later uploads
depend on what was sent. Films that keep what A learned are put together as changes of A are compared, without their
sign; others as products are.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from kernels import agreeing, cosine
from recording import Gram, Recording
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from fltac.server.clustering import Points, group, keep_or_move
from fltac.server.directions import DIRECTIONS
from fltac.server.grouping import EXTRA_OF_A, SHARPNESS_OF_A
from fltac.server.pairing import paired
from fltac.server.similarity import HEAD_OF_A
from fltac.server.spectrum import leading

DRAWS = 4
HYSTERESES = (0.0, 0.02, 0.05, 0.1, 0.2)
Joined = Callable[[Gram], Gram]
"""From inner products of some rounds ``[rounds, n, rounds, n]`` to the similarity of slots ``[n, n]``."""


def summed(parts: Gram) -> Gram:
    """The cosine of the sums of all changes."""
    return cosine(parts.sum(axis=(0, 2)))


def scaled(parts: Gram) -> Gram:
    """The same of changes that are scaled to length 1 first."""
    lengths = np.sqrt(np.einsum("titi->ti", parts))
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return cosine(np.einsum("ti,tisj,sj->ij", scale, parts, scale))


def mean(parts: Gram, unsigned: bool = False) -> Gram:
    """The mean of the rounds' cosines."""
    each = [cosine(parts[number, :, number, :]) for number in range(len(parts))]
    return np.asarray(np.mean(np.abs(each) if unsigned else each, axis=0))


def last(parts: Gram) -> Gram:
    """Of the last round's changes alone."""
    return cosine(parts[-1, :, -1, :])


def moments(parts: Gram, kept: int | None = None) -> Gram:
    """The cosine of second moments, rooted; of so many leading directions, added round by round, or of all."""
    inner = _between(parts, _turns(parts, kept or len(parts)))
    return np.asarray(np.sqrt(cosine(np.einsum("irjz,irjz->ij", inner, inner))))


def by_first(parts: Gram, kept: int | None = None) -> Gram:
    """The first round's change with the second moment of all rounds, both ways: what was learned from v0 alone counts.

    Args:
        parts: Of the rounds' changes.
        kept: So many directions: the first round's, and the leading ones of the later rounds; None: all.
    """
    rounds, n = parts.shape[:2]
    turns = np.zeros((n, min(kept or rounds, rounds), rounds))
    turns[:, 0, 0] = 1
    if rounds > 1:
        turns[:, 1:, 1:] = _turns(parts[1:, :, 1:], turns.shape[1] - 1)
    inner = _between(parts, turns)
    alone = np.einsum("ii->i", inner[:, 0, :, 0])
    whole = np.sqrt(np.einsum("iriz,iriz->i", inner, inner))
    lengths = np.outer(alone, whole)
    agreement = np.einsum("ijz,ijz->ij", inner[:, 0], inner[:, 0])
    there = np.sqrt(np.divide(agreement, lengths, out=np.zeros_like(lengths), where=lengths > 0))
    return np.asarray((there + there.T) / 2)


def _turns(parts: Gram, kept: int) -> Gram:
    """Each slot's leading directions, added round by round, in terms of its rounds' changes: [n, kept, rounds]."""
    rounds, n = parts.shape[:2]
    turns = np.zeros((n, kept, rounds))
    for slot, own in enumerate(np.einsum("tisi->its", parts)):
        held = np.zeros((0, rounds))
        for number in range(rounds):
            held = np.concatenate([held, np.eye(rounds)[number, None]])
            if len(held) > kept:
                held = np.linalg.eigh(held @ own @ held.T)[1].T[:0:-1] @ held
        turns[slot, : len(held)] = held
    return turns


def _between(parts: Gram, turns: Gram) -> Gram:
    """The inner products of all directions: ``[n, kept, n, kept]``."""
    return np.asarray(np.einsum("irt,tisj,jzs->irjz", turns, parts, turns, optimize=True))


MORE = f"K + {EXTRA_OF_A}"
UNSHARPENED = f"{DIRECTIONS} directions, {MORE}"
DEFAULT = f"{UNSHARPENED}, dual softmax"
BY_FIRST = f"the first round with all, {MORE}, dual softmax"
WAYS: dict[str, Joined] = {"sum": summed, "scaled": scaled, "mean": mean, "last": last, "agreeing": summed}
"""Of products: changes summed; each scaled to length 1 first; the mean of the rounds' kernels; the last round's alone;
summed, with matrices weighted by how well they agree."""
WAYS_OF_A: dict[str, Joined] = {
    "sum": lambda parts: np.abs(summed(parts)),
    "mean": partial(mean, unsigned=True),
    "last": lambda parts: np.abs(last(parts)),
    "1 direction": partial(moments, kept=1),
    "2 directions": partial(moments, kept=2),
    "3 directions": partial(moments, kept=3),
    "second moments": moments,
    UNSHARPENED: partial(moments, kept=DIRECTIONS),
    DEFAULT: partial(moments, kept=DIRECTIONS),
    BY_FIRST: partial(by_first, kept=DIRECTIONS),
}
"""Of changes of A, without their sign: summed; the mean of the rounds' kernels; the last round's alone; their second
moments, of which so many leading directions are kept, or all; the first round's with those of all."""


def ways_of(film: Recording) -> dict[str, Joined]:
    return WAYS_OF_A if "a" in film.grams else WAYS


def kernel_after(film: Recording, rounds: int, upto: int, way: str | None = None) -> Gram:
    """The kernel after some rounds, by default as the server makes it: ``[n, n]``."""
    way = way or (DEFAULT if "a" in film.grams else "sum")
    joined, n = ways_of(film)[way], len(film.truth) // rounds

    def after(gram: Gram) -> Gram:
        return joined(gram.reshape(rounds, n, rounds, n)[:upto, :, :upto, :])

    head = after(film.grams["head"].sum(0))
    if "a" in film.grams:
        return np.asarray(np.mean([after(gram) for gram in film.grams["a"]], axis=0) + HEAD_OF_A * head)
    each = np.stack([after(gram) for gram in film.grams["product"]])
    return (agreeing(each, head) if way == "agreeing" else np.asarray(each.mean(axis=0))) + head


def compared_after(film: Recording, rounds: int, upto: int, way: str | None = None) -> Gram:
    """The same as the server compares it: changes of A after a dual softmax between the slots of each two clients."""
    kernel = kernel_after(film, rounds, upto, way)
    return paired(kernel, film.clients[: len(kernel)], SHARPNESS_OF_A) if "a" in film.grams else kernel


def points_of(film: Recording, rounds: int, upto: int, k: int, way: str | None = None) -> Points:
    """What is clustered after some rounds: ``[n, k]``, or so many more as the server takes or a way says."""
    more = "a" in film.grams if way is None else MORE in way
    sharpened = way in (None, DEFAULT, BY_FIRST)
    kernel = (compared_after if sharpened else kernel_after)(film, rounds, upto, way)
    return leading(kernel, k + EXTRA_OF_A * more)


def replayed(path: Path, rounds: int) -> dict[str, list[float]]:
    """ARI after each round, by way.

    Args:
        path: A film's ``.safetensors``.
        rounds: That it has.
    """
    film = Recording.load(path)
    n = len(film.truth) // rounds
    truth, owners = film.truth[:n], film.clients[:n]
    k = len(set(truth.tolist()))
    out: dict[str, list[float]] = {}
    for way in ways_of(film):
        for upto in range(1, rounds + 1):
            points = points_of(film, rounds, upto, k, way)
            aris = [adjusted_rand_score(truth, group(points, k, owners, 20, draw)) for draw in range(DRAWS)]
            out.setdefault(way, []).append(float(np.mean(aris)))
    return out


def kept(path: Path, rounds: int, share: float) -> tuple[list[float], int]:
    """ARI after each round with ``server.clustering.hysteresis``, and how many slots changed their group in all.

    Args:
        path: A film's ``.safetensors``.
        rounds: That it has.
        share: The hysteresis.
    """
    film = Recording.load(path)
    n = len(film.truth) // rounds
    truth, owners = film.truth[:n], film.clients[:n]
    k = len(set(truth.tolist()))
    aris, moved, before = [], 0, np.full(n, -1)
    for upto in range(1, rounds + 1):
        points = points_of(film, rounds, upto, k)
        labels = group(points, k, owners, 20, upto)
        if share:
            labels = keep_or_move(points, before, labels, owners, share)
        if upto > 1:
            together = np.array([[(labels == new)[before == old].sum() for new in range(k)] for old in range(k)])
            rows, columns = linear_sum_assignment(-together)
            moved += n - int(together[rows, columns].sum())
        before = labels
        aris.append(float(adjusted_rand_score(truth, labels)))
    return aris, moved
