"""Server optimizers: a cluster steps from what it held towards the mean of its members, the pseudo-gradient.

FedAvgM (Hsu, Qi, Brown, arXiv 1909.06335): ``v = momentum v + (mean - held)``, ``held + server_lr v``.
FedAdam (Reddi et al., arXiv 2003.00295, Algorithm 2), with ``d = mean - held``: ``m = beta1 m + (1 - beta1) d``,
``v = beta2 v + (1 - beta2) d^2``, ``held + server_lr m / (sqrt(v) + tau)``; m begins at 0, v at tau^2, and there is no
bias correction.

All in float64 from float32 moments, tensor by tensor, heads included. Tensors that nobody trained in the round (a
frozen factor, another head) and what is not averaged stay as the rule left them, and so do their moments.
"""

from collections.abc import Collection

import numpy as np

from fltac.config import AggregationConfig
from fltac.records import Adapter, FloatArray

FIRST, SECOND = "first/", "second/"
"""Before a tensor's name in a cluster's moments."""
RATES = {"fedavgm": 1.0, "fedadam": 0.01}


def optimized(
    mean: Adapter, held: Adapter, moments: Adapter, trained: Collection[str], config: AggregationConfig
) -> tuple[Adapter, Adapter]:
    """One step of a cluster.

    Args:
        mean: What the rule of aggregation made.
        held: What the cluster held before; of a new one, the mean of what its members began from.
        moments: Of the cluster, from its last step; empty at first.
        trained: Names of the tensors that members trained in this round.
        config: Names the optimizer.

    Returns:
        The cluster's adapter and its moments.
    """
    if config.optimizer == "none":
        return mean, {}
    rate = RATES[config.optimizer] if config.server_lr is None else config.server_lr
    after, kept = dict(mean), dict(moments)
    for name in mean:
        if name not in trained or name not in held:
            continue
        change = mean[name].astype(np.float64) - held[name]
        first = moments.get(FIRST + name, np.zeros_like(mean[name])).astype(np.float64)
        if config.optimizer == "fedavgm":
            first = config.momentum * first + change
            step = first
        else:
            start = np.full_like(mean[name], config.tau**2)
            second = moments.get(SECOND + name, start).astype(np.float64)
            first = config.beta1 * first + (1.0 - config.beta1) * change
            second = config.beta2 * second + (1.0 - config.beta2) * change**2
            step = first / (np.sqrt(second) + config.tau)
            kept[SECOND + name] = _single(second)
        kept[FIRST + name] = _single(first)
        after[name] = _single(held[name] + rate * step)
    return after, kept


def _single(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> FloatArray:
    return values.astype(np.float32)
