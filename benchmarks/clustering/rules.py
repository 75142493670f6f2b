"""Clustering rules of the lab: a kernel of what is compared, and how it is grouped. Each is a few settings with a name.

All work on a recording's inner products (``kernels.py``). Where fltac has the rule, its own functions group
(``fltac.server.clustering``, ``fltac.server.pairing``).
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from kernels import KERNELS, centred, cosine, without_clients
from numpy.typing import NDArray
from recording import Gram, Recording

from fltac.server.choosing import held_out_residual
from fltac.server.clustering import group
from fltac.server.grouping import EXTRA_OF_A, SHARPNESS_OF_A
from fltac.server.pairing import paired
from fltac.server.spectrum import leading

Labels = NDArray[np.int64]


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

    def compared(self, recording: Recording) -> Gram:
        """``[n, n]``."""
        return KERNELS[self.kernel](recording)

    def points(self, recording: Recording, k: int) -> NDArray[np.float64]:
        """``[n, d]``."""
        kernel = self.compared(recording)
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
class Paired(Rule):
    """The same after a dual softmax between the slots of each two clients.

    Attributes:
        sharpness: Of it.
    """

    sharpness: float = SHARPNESS_OF_A

    def compared(self, recording: Recording) -> Gram:
        """``[n, n]``."""
        return paired(super().compared(recording), recording.clients, self.sharpness)


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
        plain = Rule if dimensions == 0 or not self.cannot_link else Paired
        labels = plain(self.kernel, dimensions, cannot_link=self.cannot_link)(recording, k + self.extra, seed)
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
    "changes of A": Paired("a+head", EXTRA_OF_A),
    "changes of A, no link": Rule("a+head", EXTRA_OF_A, cannot_link=False),
    "changes of A, no link, K eigenvectors": Rule("a+head", cannot_link=False),
    "changes of A, no softmax": Rule("a+head", EXTRA_OF_A),
    "changes of A, no softmax, K eigenvectors": Rule("a+head"),
    "changes of A, sharpness 1": Paired("a+head", EXTRA_OF_A, sharpness=1.0),
    "changes of A, sharpness 2": Paired("a+head", EXTRA_OF_A, sharpness=2.0),
    "changes of A, sharpness 3": Paired("a+head", EXTRA_OF_A, sharpness=3.0),
    "changes of A, K eigenvectors": Paired("a+head"),
    "changes of A, K+1": Paired("a+head", 1),
    "changes of A, K+3": Paired("a+head", 3),
    "changes of A, all dims": Paired("a+head", "all"),
    "changes of A, centred": Paired("a+head", EXTRA_OF_A - 1, centre=True),
    "changes of A, rows": Paired("a+head", EXTRA_OF_A, rows=True),
    "changes of A, client": Paired("a+head", EXTRA_OF_A, client=1.0),
    "changes of A, rows of A": Paired("a rows+head", EXTRA_OF_A),
    "changes of A, twice the head": Paired("a+1head", EXTRA_OF_A),
    "changes of A, no head": Paired("a", EXTRA_OF_A),
    "changes of A, with sign": Paired("a signed+1head", EXTRA_OF_A),
    "changes of A, merged if it helps": Merged(0, cannot_link=False, kernel="a+head"),
    "changes of A, 3 more, merged to K": Merged(3, cannot_link=True, down_to_k=True, kernel="a+head"),
    "unsigned B+head": Rule("b+1head unsigned"),
    "unsigned products+head": Rule("product+1head unsigned"),
    "unsigned products+half head": Rule("product+head unsigned"),
    "unsigned head": Rule("head unsigned"),
    "products": Rule("by-matrix+head"),
    "products, softmax": Paired("by-matrix+head"),
    "products, K+2, softmax": Paired("by-matrix+head", 2),
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
"""By name; ``changes of A`` is what ``features: a`` compares, ``products`` the same with ``features: products``."""
