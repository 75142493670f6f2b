"""Clustering rules of the lab: a kernel of what is compared, and how it is grouped. Each is a few settings with a name.

All work on a recording's inner products. Where fltac has the rule, its own functions group
(``fltac.server.clustering``); the kernels are written down once more here, from exact products instead of sketches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from recording import Gram, Recording

from fltac.server.choosing import held_out_residual
from fltac.server.clustering import group
from fltac.server.grouping import EXTRA_OF_A
from fltac.server.similarity import leading

Kernel = Callable[[Recording], Gram]
Labels = NDArray[np.int64]


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


@dataclass(frozen=True)
class Rule:
    """How slots are grouped.

    Attributes:
        kernel: Name of what is compared.
        dimensions: Eigenvectors kept: ``all``, or K plus this number.
        cannot_link: Slots of a client fall into different groups.
        centre: Take away what all slots share.
        client: Share of what the slots of a client have in common that is taken away.
        rows: Scale each slot's eigenvector coordinates to length 1.
        starts: Of K-means.
    """

    kernel: str
    dimensions: int | str = 0
    cannot_link: bool = True
    centre: bool = False
    client: float = 0.0
    rows: bool = False
    starts: int = 20

    def points(self, recording: Recording, k: int) -> NDArray[np.float64]:
        """``[n, d]``."""
        kernel = KERNELS[self.kernel](recording)
        if self.client:
            kernel = without_clients(kernel, recording.clients, self.client)
        if self.centre:
            kernel = centred(kernel)
        values, vectors = np.linalg.eigh(kernel)
        if self.dimensions != "all":
            count = max(1, k + int(self.dimensions))
            values, vectors = values[-count:], vectors[:, -count:]
        points = vectors * np.sqrt(np.clip(values, 0, None))
        if self.rows:
            norms = np.linalg.norm(points, axis=1, keepdims=True)
            points = np.divide(points, norms, out=np.zeros_like(points), where=norms > 1e-9)
        return np.asarray(points)

    def __call__(self, recording: Recording, k: int, seed: int) -> Labels:
        """Group numbers ``[n]``."""
        owners = list(recording.clients) if self.cannot_link else None
        return group(self.points(recording, k), k, owners, self.starts, seed)


@dataclass(frozen=True)
class Consensus:
    """Groups by how often slots fall together when the matrices, the head's weight and the dimensions are drawn.

    Attributes:
        extra: Up to so many eigenvectors more than K.
        draws: Of a random half of the adapted matrices.
    """

    extra: int
    draws: int = 40

    def __call__(self, recording: Recording, k: int, seed: int) -> Labels:
        """Group numbers ``[n]``."""
        draw, own = np.random.default_rng(seed), list(recording.clients)
        each = np.stack([cosine(gram) for gram in recording.grams["product"]])
        head = cosine(recording.grams["head"].sum(0))
        together = np.zeros_like(head)
        for _ in range(self.draws):
            half = draw.permutation(len(each))[: max(1, len(each) // 2)]
            kernel = each[half].mean(axis=0) + draw.choice([0.5, 1.0, 2.0]) * head
            points = leading(kernel, k + int(draw.integers(0, self.extra + 1)))
            labels = group(points, k, own, 1, int(draw.integers(2**31)))
            together += labels[:, None] == labels
        return group(leading(together / self.draws, k), k, own, 20, seed)


@dataclass(frozen=True)
class Merged:
    """Groups finely, and merges groups that predict their members better together than apart.

    The prediction is that of ``k: auto``: each slot by the mean of the others in its group. Of all pairs of groups the
    one whose union lowers the error most is merged, until none does.

    Attributes:
        extra: Groups more than K at the start.
        cannot_link: Groups in which a client has a slot each are not merged.
        down_to_k: Merge down to K, and no further, whether the error falls or not.
    """

    extra: int
    cannot_link: bool
    down_to_k: bool = False
    kernel: str = "by-matrix+head"

    def __call__(self, recording: Recording, k: int, seed: int) -> Labels:
        """Group numbers ``[n]``."""
        kernel, clients = KERNELS[self.kernel](recording), np.asarray(recording.clients)
        dimensions = EXTRA_OF_A if self.kernel == "a+head" else 0
        labels = Rule(self.kernel, dimensions, cannot_link=self.cannot_link)(recording, k + self.extra, seed)
        error = held_out_residual(kernel, labels)
        while True:
            found = np.unique(labels)
            ways = [
                np.where(labels == second, first, labels)
                for first, second in combinations(found.tolist(), 2)
                if not self.cannot_link or not set(clients[labels == first]) & set(clients[labels == second])
            ]
            if not ways or (self.down_to_k and len(found) <= k):
                return labels
            errors = [held_out_residual(kernel, way) for way in ways]
            best = int(np.argmin(errors))
            if errors[best] >= error and not self.down_to_k:
                return labels
            labels, error = ways[best], errors[best]


RULES: dict[str, Rule | Consensus | Merged] = {
    "paper": Rule("factors", "all", cannot_link=False, starts=10),
    "paper+head": Rule("factors+head", "all", cannot_link=False, starts=10),
    "factors cosine": Rule("factors-cosine", "all", cannot_link=False),
    "product of all": Rule("product", cannot_link=False),
    "product of all link": Rule("product"),
    "by-matrix link": Rule("product-by-matrix"),
    "seen link": Rule("seen-by-matrix"),
    "head link": Rule("head"),
    "product of all+head link": Rule("product+head"),
    "default": Rule("a+head", EXTRA_OF_A),
    "default, no link": Rule("a+head", EXTRA_OF_A, cannot_link=False),
    "default, no link, K eigenvectors": Rule("a+head", cannot_link=False),
    "default, K eigenvectors": Rule("a+head"),
    "default, K+1": Rule("a+head", 1),
    "default, K+3": Rule("a+head", 3),
    "default, all dims": Rule("a+head", "all"),
    "default, centred K-1": Rule("a+head", -1, centre=True),
    "default, centred": Rule("a+head", EXTRA_OF_A - 1, centre=True),
    "default, rows": Rule("a+head", EXTRA_OF_A, rows=True),
    "default, client": Rule("a+head", EXTRA_OF_A, client=1.0),
    "default, rows of A": Rule("a rows+head", EXTRA_OF_A),
    "default, twice the head": Rule("a+1head", EXTRA_OF_A),
    "default, no head": Rule("a", EXTRA_OF_A),
    "default, with sign": Rule("a signed+1head", EXTRA_OF_A),
    "default, merged if it helps": Merged(0, cannot_link=False, kernel="a+head"),
    "default, 3 more, merged to K": Merged(3, cannot_link=True, down_to_k=True, kernel="a+head"),
    "unsigned B+head": Rule("b+1head unsigned"),
    "unsigned products+head": Rule("product+1head unsigned"),
    "unsigned products+half head": Rule("product+head unsigned"),
    "unsigned head": Rule("head unsigned"),
    "products": Rule("by-matrix+head"),
    "products, no link": Rule("by-matrix+head", cannot_link=False),
    "products, all dims": Rule("by-matrix+head", "all"),
    "products, centred K-1": Rule("by-matrix+head", -1, centre=True),
    "products, centred K": Rule("by-matrix+head", 0, centre=True),
    "products, rows": Rule("by-matrix+head", rows=True),
    "products, centred K-1, rows": Rule("by-matrix+head", -1, centre=True, rows=True),
    "products, K+1": Rule("by-matrix+head", 1),
    "products, K+2": Rule("by-matrix+head", 2),
    "products, K+3": Rule("by-matrix+head", 3),
    "products, client": Rule("by-matrix+head", client=1.0),
    "products, client, K-1": Rule("by-matrix+head", -1, client=1.0, centre=True),
    "products, half client": Rule("by-matrix+head", client=0.5),
    "products, client, rows": Rule("by-matrix+head", -1, client=1.0, centre=True, rows=True),
    "products, 2 head": Rule("by-matrix+2head"),
    "products, half head": Rule("2by-matrix+head"),
    "products, cut to rank 1": Rule("top+head"),
    "products, 3 more, merged to K": Merged(3, cannot_link=True, down_to_k=True),
    "products, 3 more, merged if it helps": Merged(3, cannot_link=True),
    "products, no link, 3 more, merged to K": Merged(3, cannot_link=False, down_to_k=True),
    "products, no link, merged if it helps": Merged(0, cannot_link=False),
    "products, agreeing matrices": Rule("agreeing+head"),
    "products, consensus": Consensus(0),
    "products, consensus, up to K+4": Consensus(4),
    "seen+head": Rule("seen+head"),
    "b+head": Rule("b+head"),
    "deflated+head": Rule("deflated+head"),
    "squared+head": Rule("squared+head"),
}
"""By name; ``default`` is what the rule ``spectral`` compares, ``products`` the same with ``features: products``."""
