"""What goes into an aggregation, and sums of its low-rank products as one pair of stacked factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fltac.records import BASE_A, BASE_B, LORA_A, LORA_B, Adapter, FloatArray

Matrix = NDArray[np.float64]

NEGLIGIBLE = 1e-7
"""Singular values below this share of the terms' norms are rounding of float32 and are left out of a base."""


@dataclass(frozen=True)
class Part:
    """One member's contribution.

    Attributes:
        adapter: Factors, filled up to the common rank, and heads; without a base.
        base: ``base_A`` and ``base_B`` of what it was trained on; empty where the frozen weights were the backbone's.
        weight: Positive.
    """

    adapter: Adapter
    base: Adapter
    weight: float


def shares(parts: Sequence[Part]) -> Matrix:
    """The weights, adding up to 1: ``[n]``."""
    weights = np.array([part.weight for part in parts])
    return np.asarray(weights / weights.sum())


def columns(parts: Sequence[Part], module: str) -> tuple[list[FloatArray], list[FloatArray], Matrix]:
    """The weighted mean of one matrix's products, bases included, as a sum of products of a column and a row.

    Returns:
        The columns ``[some, out]`` and the rows ``[some, in]``, in blocks of equal lengths, and the share of each one.
        A base that several members have is there once.
    """
    name_a, name_b, base_a, base_b = (module + part for part in (LORA_A, LORA_B, BASE_A, BASE_B))
    lefts, rights = [part.adapter[name_b].T for part in parts], [part.adapter[name_a] for part in parts]
    each, bases = shares(parts).tolist(), dict[int, tuple[Adapter, float]]()
    for part, share in zip(parts, each, strict=True):
        if base_a in part.base:
            bases[id(part.base)] = part.base, share + bases.get(id(part.base), (part.base, 0.0))[1]
    for base, share in bases.values():
        lefts.append(base[base_b].T)
        rights.append(base[base_a])
        each.append(share)
    return lefts, rights, np.repeat(each, [len(block) for block in rights])


def stacked(parts: Sequence[Part], module: str) -> tuple[Matrix, Matrix]:
    """The same as one product: B ``[out, R]`` and A ``[R, in]``, where R is the sum of all ranks."""
    lefts, rights, each = columns(parts, module)
    b = np.concatenate(lefts, dtype=np.float64) * each[:, None]
    return b.T, np.concatenate(rights, dtype=np.float64)


def decomposed(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """The singular value decomposition of a product.

    Args:
        b: ``[out, R]``.
        a: ``[R, in]``.

    Returns:
        U ``[out, n]``, the values ``[n]``, descending, and V ``[n, in]`` with ``n = min(out, R, in)``. With fewer
        columns than the matrix has rows, the product is not formed.
    """
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        u, values, v = np.linalg.svd(b @ a, full_matrices=False)
        return u, values, v
    basis_b, inner_b = np.linalg.qr(b)
    basis_a, inner_a = np.linalg.qr(a.T)
    u, values, v = np.linalg.svd(inner_b @ inner_a.T)
    return basis_b @ u, values, v @ basis_a.T


def as_base(b: Matrix, a: Matrix, module: str) -> Adapter:
    """A sum of products as a base of the least rank; nothing where it is zero."""
    u, values, v = decomposed(b, a)
    # Terms may cancel, so that all that is left is their rounding.
    terms = np.sqrt(np.sum(np.square(b).sum(axis=0) * np.square(a).sum(axis=1)))
    rank = int((values > NEGLIGIBLE * terms).sum())
    if not rank:
        return {}
    return {
        module + BASE_A: v[:rank].astype(np.float32),
        module + BASE_B: (u[:, :rank] * values[:rank]).astype(np.float32),
    }
