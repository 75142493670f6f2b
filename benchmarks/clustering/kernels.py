"""What the lab's rules compare: kernels of recorded slots, written down once more here from exact products."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from recording import Gram, Recording

Kernel = Callable[[Recording], Gram]


def cosine(gram: Gram) -> Gram:
    """``[n, n]`` inner products to cosines; 0 for a slot that is zero."""
    norms = np.sqrt(np.clip(np.diag(gram), 0, None))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 1e-12)
    return np.asarray(gram * np.outer(scale, scale))


def by_matrix(grams: Gram, weights: NDArray[np.float64] | None = None) -> Gram:
    """The mean of the cosines of each adapted matrix."""
    each = np.stack([cosine(gram) for gram in grams])
    return np.asarray(np.average(each, axis=0, weights=weights))


def centred(kernel: Gram) -> Gram:
    """Without what all slots share."""
    n = len(kernel)
    h = np.eye(n) - 1 / n
    return np.asarray(h @ kernel @ h)


def deflated(gram: Gram) -> Gram:
    """Cosines without the leading direction, which all slots may share with either sign."""
    values, vectors = np.linalg.eigh(cosine(gram))
    return cosine(cosine(gram) - values[-1] * np.outer(vectors[:, -1], vectors[:, -1]))


def without_clients(kernel: Gram, clients: tuple[str, ...], share: float = 1.0) -> Gram:
    """Without (a share of) what the slots of each client have in common: their mean, less that of all slots."""
    names, of = np.unique(np.asarray(clients), return_inverse=True)
    member = np.eye(len(names))[of]
    mean = member @ (member / member.sum(axis=0)).T
    h = np.eye(len(of)) - share * (mean - 1 / len(of))
    return np.asarray(h @ kernel @ h.T)


def agreeing(each: Gram, head: Gram) -> Gram:
    """The mean of the matrices' kernels ``[parts, n, n]``, each weighted by how well it agrees with all others.

    Agreement: the correlation of its cosines with the mean of the other matrices' and the head's, none below 0.
    """
    pairs = np.triu_indices(each.shape[1], 1)
    rows = np.stack([kernel[pairs] for kernel in (*each, head)])
    weights = np.zeros(len(each))
    for number in range(len(each)):
        others = np.delete(rows, number, axis=0).mean(axis=0)
        if rows[number].std() > 0 and others.std() > 0:
            weights[number] = max(0.0, float(np.corrcoef(rows[number], others)[0, 1]))
    return np.asarray(np.average(each, axis=0, weights=weights if weights.any() else None))


def agreeing_matrices(recording: Recording) -> Gram:
    """With the head's cosine."""
    each = np.stack([cosine(gram) for gram in recording.grams["product"]])
    head = cosine(recording.grams["head"].sum(0))
    return agreeing(each, head) + head


def unsigned(grams: Gram, head: Gram, weight: float) -> Gram:
    """The mean of each matrix's absolute cosines, and so much of the head's."""
    each = np.stack([np.abs(cosine(gram)) for gram in grams])
    return np.asarray(each.mean(axis=0) + weight * np.abs(cosine(head.sum(0))))


KERNELS: dict[str, Kernel] = {
    "a+head": lambda r: unsigned(r.grams["a"], r.grams["head"], 0.5),
    "a+1head": lambda r: unsigned(r.grams["a"], r.grams["head"], 1.0),
    # Of rank 1 a factor is its only row.
    "a rows+head": lambda r: unsigned(r.grams["a" if r.facts["rank"] == 1 else "a_row"], r.grams["head"], 0.5),
    "a": lambda r: unsigned(r.grams["a"], r.grams["head"], 0.0),
    "b+1head unsigned": lambda r: unsigned(r.grams["b"], r.grams["head"], 1.0),
    "product+1head unsigned": lambda r: unsigned(r.grams["product"], r.grams["head"], 1.0),
    "product+head unsigned": lambda r: unsigned(r.grams["product"], r.grams["head"], 0.5),
    "head unsigned": lambda r: np.abs(cosine(r.grams["head"].sum(0))),
    "a signed+1head": lambda r: by_matrix(r.grams["a"]) + cosine(r.grams["head"].sum(0)),
    "factors": lambda r: r.grams["a"].sum(0) + r.grams["b"].sum(0),
    "factors+head": lambda r: r.grams["a"].sum(0) + r.grams["b"].sum(0) + r.grams["head"].sum(0),
    "factors-cosine": lambda r: cosine(r.grams["a"].sum(0) + r.grams["b"].sum(0)),
    "product": lambda r: cosine(r.grams["product"].sum(0)),
    "product-by-matrix": lambda r: by_matrix(r.grams["product"]),
    "seen-by-matrix": lambda r: by_matrix(r.grams["product_seen"]),
    "b-by-matrix": lambda r: by_matrix(r.grams["b"]),
    "head": lambda r: cosine(r.grams["head"].sum(0)),
    "product+head": lambda r: cosine(r.grams["product"].sum(0)) + cosine(r.grams["head"].sum(0)),
    "by-matrix+head": lambda r: by_matrix(r.grams["product"]) + cosine(r.grams["head"].sum(0)),
    "by-matrix+2head": lambda r: by_matrix(r.grams["product"]) + 2 * cosine(r.grams["head"].sum(0)),
    "2by-matrix+head": lambda r: 2 * by_matrix(r.grams["product"]) + cosine(r.grams["head"].sum(0)),
    "seen+head": lambda r: by_matrix(r.grams["product_seen"]) + cosine(r.grams["head"].sum(0)),
    "deflated+head": lambda r: (
        np.mean([deflated(gram) for gram in r.grams["product"]], axis=0) + deflated(r.grams["head"].sum(0))
    ),
    "squared+head": lambda r: (
        np.mean([cosine(gram) ** 2 for gram in r.grams["product"]], axis=0) + cosine(r.grams["head"].sum(0)) ** 2
    ),
    "b+head": lambda r: by_matrix(r.grams["b"]) + cosine(r.grams["head"].sum(0)),
    "agreeing+head": agreeing_matrices,
    # What a product of rank 1 was cut to is itself.
    "top+head": lambda r: (
        by_matrix(r.grams["product" if r.facts["rank"] == 1 else "product_top"]) + cosine(r.grams["head"].sum(0))
    ),
}
