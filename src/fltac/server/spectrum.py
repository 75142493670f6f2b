"""The leading eigenvectors of the kernel of what slots have learned, in which their groups are found.

Of up to ``WHOLE`` slots from all pairs; of more without a matrix of all pairs.
"""

from collections.abc import Iterator

import numpy as np
from scipy.linalg import eigh

from fltac.seeding import generator
from fltac.server.changes import Changes
from fltac.server.clustering import sample
from fltac.server.pairing import Matrix, Pairing, Rows, paired
from fltac.server.similarity import WHOLE, Features

OVERSAMPLING = 10
"""Vectors iterated beyond those wanted."""
ITERATIONS = 50
TOLERANCE = 1e-3
"""Largest residual of a singular vector, relative to its squared singular value."""


def embedding(
    changes: Changes, head: bool, dimensions: int, seed: int, profile_weight: float = 1.0, sharpness: float = 0.0
) -> Matrix:
    """Rows whose inner products approximate the kernel: its top eigenvectors, scaled by the roots of the values.

    Args:
        changes: What each of n slots has learned.
        head: Add the cosine of the heads' change.
        dimensions: How many eigenvectors; at most n are used.
        seed: Of the vectors that the iteration for many slots begins with, or of the sample that stands for all.
        profile_weight: With which the cosine of the profiles is added, if there are any.
        sharpness: Of the dual softmax (``server.pairing``) by which what was learned is compared; 0 for none.

    Returns:
        ``[n, dimensions]``. Truncation matters: the small eigenvalues hold each slot's own noise.
    """
    features, owners = Features(changes, head, profile_weight), [client for client, _ in changes.keys]
    if len(owners) <= WHOLE:
        every = np.arange(len(owners))
        learned = paired(features.learned(every, every), owners, sharpness)
        return leading(learned + features.profiled(every, every), dimensions)
    if changes.of_a or sharpness:
        return by_landmarks(features, owners, dimensions, seed, sharpness)
    return principal(features, dimensions, seed)


def leading(similarity: Matrix, dimensions: int) -> Matrix:
    """The same for a given kernel ``[n, n]``."""
    values, vectors = _top(similarity, dimensions)
    return np.asarray(vectors * np.sqrt(np.clip(values, 0.0, None)))


def _top(similarity: Matrix, dimensions: int) -> tuple[Matrix, Matrix]:
    """The largest eigenvalues, descending, and their vectors: ``[some]`` and ``[n, some]``; no others are sought."""
    n = len(similarity)
    if dimensions >= n:
        values, vectors = np.linalg.eigh(similarity)
    else:
        values, vectors = eigh(similarity, subset_by_index=[n - dimensions, n - 1], check_finite=False)
    return np.asarray(values[::-1]), np.asarray(vectors[:, ::-1])


def by_landmarks(features: Features, owners: list[str], dimensions: int, seed: int, sharpness: float = 0.0) -> Matrix:
    """The same for a kernel that is no inner product of rows: from that of about ``WHOLE`` slots (Nystroem's method).

    The eigenvectors of a seeded sample's kernel, carried over to all slots by their similarity to the sample. With a
    dual softmax it is a sample of whole clients, whose slots compete.
    """
    few = sample(len(owners), owners if sharpness else None, seed, WHOLE)
    learned = np.concatenate([features.learned(rows, few) for rows in _parts(owners)])
    pairing = Pairing(learned[few], [owners[row] for row in few], sharpness) if sharpness else None
    for rows in _parts(owners):
        if pairing is not None and pairing.works:
            learned[rows] = pairing(learned[rows], [owners[row] for row in rows], few - rows[0])
        learned[rows] += features.profiled(rows, few)
    values, vectors = _top(learned[few], dimensions)
    roots = np.sqrt(np.clip(values, 0.0, None))
    turn = vectors * np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 1e-6)
    return np.asarray(learned @ turn)


def _parts(owners: list[str]) -> Iterator[Rows]:
    """All rows in order, about ``WHOLE`` at a time, no owner's apart."""
    start = 0
    for row in range(1, len(owners) + 1):
        if row == len(owners) or (row - start >= WHOLE and owners[row] != owners[row - 1]):
            yield np.arange(start, row)
            start = row


def principal(features: Features, dimensions: int, seed: int) -> Matrix:
    """The same without an ``[n, n]`` matrix: the rows' projections on their leading right singular vectors.

    Subspace iteration with Rayleigh-Ritz, one pass over the rows for each step.
    """
    n, width = features.shape
    size = min(n, width, dimensions + OVERSAMPLING)
    basis = generator(seed, "subspace").standard_normal((width, size), dtype=np.float32)
    points = np.empty((n, size), dtype=np.float32)
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(basis)[0]
        image = np.zeros_like(basis)
        for rows, block in features.blocks():
            points[rows] = block @ basis
            image += block.T @ points[rows]
        small = basis.T.astype(np.float64) @ image
        values, turn = np.linalg.eigh((small + small.T) / 2)
        values, turn = values[::-1][:dimensions], turn[:, ::-1][:, :dimensions]
        residuals = np.linalg.norm(image @ turn - (basis @ turn) * values, axis=0)
        if (residuals <= TOLERANCE * values).all():
            break
        basis = image
    return np.asarray(points @ turn)
