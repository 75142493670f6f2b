"""Adapters compared by what they compute: rules after which factors alone no longer tell one cluster from another."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fltac.records import BASE_A, BASE_B, LORA_A, LORA_B, Adapter, Cluster, lora_modules
from fltac.seeding import generator

RENEWING = frozenset({"flora", "flexlora"})
"""Rules of aggregation whose factors say little: new ones, the same for all clusters, or singular vectors, whose signs
and order are anybody's choice."""
PROBES = 64
"""Vectors that stand for all inputs of a matrix that has more."""


def images(adapters: Sequence[Adapter], seed: int) -> NDArray[np.float64]:
    """Points as far apart as the adapters' products, bases included, without forming any.

    A point is what the products make of seeded normal vectors; of all unit vectors, and so exact, where a matrix has
    no more inputs than there would be vectors.

    Args:
        adapters: n of them, with the same modules.
        seed: Of the vectors.

    Returns:
        ``[n, d]``.
    """
    points = []
    for module in lora_modules(adapters[0]):
        inputs = adapters[0][module + LORA_A].shape[1]
        probes = np.eye(inputs)
        if inputs > PROBES:
            probes = generator(seed, f"images {module}").standard_normal((inputs, PROBES)) / PROBES**0.5
        made = [adapter[module + LORA_B] @ (adapter[module + LORA_A] @ probes) for adapter in adapters]
        for image, adapter in zip(made, adapters, strict=True):
            if module + BASE_A in adapter:
                image += adapter[module + BASE_B] @ (adapter[module + BASE_A] @ probes)
        points.append(np.stack(made).reshape(len(made), -1))
    return np.concatenate(points, axis=1)


def most_similar(adapter: Adapter, clusters: Sequence[Cluster], seed: int) -> int:
    """The id of the cluster whose product has the largest cosine with an adapter's; the first of equal ones."""
    own, *others = images([adapter, *(cluster.adapter for cluster in clusters)], seed)
    norms = [float(np.linalg.norm(own) * np.linalg.norm(other)) for other in others]
    found = [float(own @ other) / norm if norm > 0 else 0.0 for other, norm in zip(others, norms, strict=True)]
    return clusters[int(np.argmax(found))].id
