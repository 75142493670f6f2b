"""Ways to put the rounds of a film together, replayed: what the default rule would have grouped after each round.

Exact for the rule that was played (the sum), an indication for the others, since later uploads depend on what was sent.
"""

from pathlib import Path

import numpy as np
from recording import Gram, Recording
from rules import agreeing, cosine
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from fltac.server.clustering import Points, group, keep_or_move
from fltac.server.similarity import leading

WAYS = ("sum", "scaled", "mean", "last", "agreeing")
"""Changes summed; each scaled to length 1 first; the mean of the rounds' kernels; the last round's alone; summed, with
matrices weighted by how well they agree."""
DRAWS = 4
HYSTERESES = (0.0, 0.02, 0.05, 0.1, 0.2)


def kernel_of(gram: Gram, rounds: int, upto: int, way: str) -> Gram:
    """Cosines of slots ``[n, n]`` after some rounds, from inner products ``[rounds * n, rounds * n]``."""
    n = len(gram) // rounds
    parts = gram.reshape(rounds, n, rounds, n)[:upto, :, :upto, :]
    own = np.arange(upto)
    if way == "last":
        return cosine(parts[-1, :, -1, :])
    if way == "mean":
        return np.asarray(np.mean([cosine(parts[t, :, t, :]) for t in own], axis=0))
    if way == "scaled":
        lengths = np.sqrt(np.einsum("titi->ti", parts))
        scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        return cosine(np.einsum("ti,tisj,sj->ij", scale, parts, scale))
    return cosine(parts.sum(axis=(0, 2)))


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
    for way in WAYS:
        for upto in range(1, rounds + 1):
            points = points_of(film, rounds, upto, way, k)
            aris = [adjusted_rand_score(truth, group(points, k, owners, 20, draw)) for draw in range(DRAWS)]
            out.setdefault(way, []).append(float(np.mean(aris)))
    return out


def points_of(film: Recording, rounds: int, upto: int, way: str, k: int) -> Points:
    """What is clustered after some rounds: ``[n, k]``."""
    return leading(kernel_after(film, rounds, upto, way), k)


def kernel_after(film: Recording, rounds: int, upto: int, way: str) -> Gram:
    """The default kernel after some rounds, ``[n, n]``."""
    each = np.stack([kernel_of(gram, rounds, upto, way) for gram in film.grams["product"]])
    head = kernel_of(film.grams["head"].sum(0), rounds, upto, way)
    return (agreeing(each, head) if way == "agreeing" else np.asarray(each.mean(axis=0))) + head


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
        points = points_of(film, rounds, upto, "sum", k)
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
