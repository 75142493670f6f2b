"""What is compared between uploads: flattened factors (the paper), or kernels of what was learned.

The kernel of two low-rank changes is the inner product of the products, taken without forming them:
``<dW_i, dW_j> = sum[(B_i^T B_j) * (A_i A_j^T)]``. It does not change under ``A -> R A, B -> B R^-1`` and
compares different ranks. The common factor alpha / r cancels in a cosine.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fltac.records import LORA_A, LORA_B, Adapter, FloatArray, SlotKey, head_keys, is_head, lora_modules

Matrix = NDArray[np.float64]

RANK_LIMIT = 16
"""A memory whose rank outgrows this is cut to its largest singular values; four rounds of rank 2 stay exact."""
BLOCK = 128
"""Slots compared at a time with all others, so that no [n * rank, n * rank] matrix is formed."""


def flattened(adapters: Sequence[Adapter], head: bool) -> FloatArray:
    """Each adapter's factors one after the other, in the order of their names: float32 ``[n, D]``.

    With ``head``, heads are part of it; a head that another adapter has and this one lacks counts as zeros.
    """
    shapes = {
        name: tensor.shape for adapter in adapters for name, tensor in adapter.items() if head or not is_head(name)
    }
    rows = [
        np.concatenate(
            [np.ravel(adapter[name]) if name in adapter else np.zeros(shapes[name]).ravel() for name in sorted(shapes)]
        )
        for adapter in adapters
    ]
    return np.asarray(rows, dtype=np.float32)


def learned(before: Adapter, after: Adapter) -> dict[str, FloatArray]:
    """What a round added, as one adapter of twice the rank whose product is ``B1 A1 - B0 A0``; heads subtracted.

    Args:
        before: What the slot continued from; heads that it lacks count as zeros.
        after: What the slot uploaded.
    """
    out: dict[str, FloatArray] = {}
    for module in lora_modules(after):
        out[module + LORA_A] = np.concatenate([after[module + LORA_A], before[module + LORA_A]], axis=0)
        out[module + LORA_B] = np.concatenate([after[module + LORA_B], -before[module + LORA_B]], axis=1)
    for name, tensor in after.items():
        if is_head(name):
            out[name] = tensor - before[name] if name in before else np.asarray(tensor)
    return out


def accumulated(memory: Adapter | None, change: Adapter, decay: float) -> dict[str, FloatArray]:
    """``decay * memory + change``, products and heads alike; ranks add up to ``RANK_LIMIT``."""
    if memory is None:
        memory = {}
    out: dict[str, FloatArray] = {}
    for module in lora_modules(change):
        a, b = change[module + LORA_A], change[module + LORA_B]
        if module + LORA_A in memory:
            a = np.concatenate([memory[module + LORA_A], a], axis=0)
            b = np.concatenate([decay * memory[module + LORA_B], b], axis=1)
        out[module + LORA_A], out[module + LORA_B] = truncated(a, b, RANK_LIMIT)
    for name in sorted({name for adapter in (memory, change) for name in adapter if is_head(name)}):
        parts = [scale * held[name] for scale, held in ((decay, memory), (1.0, change)) if name in held]
        out[name] = np.asarray(sum(parts), dtype=np.float32)
    return out


def truncated(a: FloatArray, b: FloatArray, rank: int) -> tuple[FloatArray, FloatArray]:
    """The best approximation of ``b @ a`` of at most a rank, as factors.

    Args:
        a: ``[R, in]``.
        b: ``[out, R]``.
        rank: The largest rank to return.

    Returns:
        Factors ``[r, in]`` and ``[out, r]``, unchanged where R is small enough.
    """
    if len(a) <= rank:
        return a, np.asarray(b, dtype=np.float32)
    qb, rb = np.linalg.qr(b.astype(np.float64))
    qa, ra = np.linalg.qr(a.T.astype(np.float64))
    u, singular, vt = np.linalg.svd(rb @ ra.T)
    keep = min(rank, len(singular))
    left = (qb @ u[:, :keep]) * singular[:keep]
    return (vt[:keep] @ qa.T).astype(np.float32), left.astype(np.float32)


def product_gram(factors: Sequence[tuple[FloatArray, FloatArray]]) -> Matrix:
    """``<B_i A_i, B_j A_j>`` for all pairs: float64 ``[n, n]``.

    Args:
        factors: For each of n slots A ``[r, in]`` and B ``[out, r]``; the ranks may differ.
    """
    n, rank = len(factors), max(len(a) for a, _ in factors)
    # In float64: a change is the small difference of large products.
    a_all = np.zeros((n, rank, factors[0][0].shape[1]))
    b_all = np.zeros((n, rank, factors[0][1].shape[0]))
    for index, (a, b) in enumerate(factors):
        a_all[index, : len(a)], b_all[index, : len(a)] = a, b.T
    a_rows, b_rows = a_all.reshape(n * rank, -1), b_all.reshape(n * rank, -1)
    out = np.empty((n, n))
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        part = slice(start * rank, stop * rank)
        products = (b_rows[part] @ b_rows.T) * (a_rows[part] @ a_rows.T)  # [block * rank, n * rank]
        out[start:stop] = products.reshape(stop - start, rank, n, rank).sum(axis=(1, 3))
    return (out + out.T) / 2


def cosine(gram: Matrix) -> Matrix:
    """A Gram matrix with its diagonal scaled to 1; rows of a slot that learned nothing are 0."""
    norm = np.sqrt(np.clip(np.diag(gram), 0.0, None))
    inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 1e-12)
    return np.asarray(gram * inverse[:, None] * inverse[None, :])


def kernel(memory: Mapping[SlotKey, Adapter], keys: Sequence[SlotKey], head: bool) -> Matrix:
    """Similarity of slots: the cosine of the products, averaged over the adapted matrices, plus that of the heads.

    Each matrix is normalised before it is added, so that no loud layer decides alone.

    Args:
        memory: What each slot has learned.
        keys: Which slots, in the order of the rows.
        head: Add the cosine of the heads' change; heads of different keys have cosine 0.

    Returns:
        float64 ``[n, n]``, symmetric, positive semi-definite.
    """
    held = [memory[key] for key in keys]
    modules = lora_modules(held[0])
    total = np.zeros((len(keys), len(keys)))
    for module in modules:
        factors = [(adapter[module + LORA_A], adapter[module + LORA_B]) for adapter in held]
        total += cosine(product_gram(factors)) / len(modules)
    if head and any(head_keys(adapter) for adapter in held):
        flat = flattened([{n: t for n, t in adapter.items() if is_head(n)} for adapter in held], head=True)
        rows = flat.astype(np.float64)
        total += cosine(rows @ rows.T)
    return total


def embedding(similarity: Matrix, dimensions: int) -> Matrix:
    """Rows whose inner products approximate the kernel: its top eigenvectors, scaled by the roots of the values.

    Args:
        similarity: ``[n, n]`` symmetric.
        dimensions: How many eigenvectors; at most n are used.

    Returns:
        ``[n, dimensions]``. Truncation matters: the small eigenvalues hold each slot's own noise.
    """
    values, vectors = np.linalg.eigh(similarity)
    top = slice(max(0, len(values) - dimensions), None)
    scaled = vectors[:, top] * np.sqrt(np.clip(values[top], 0.0, None))
    return np.asarray(scaled[:, ::-1])
