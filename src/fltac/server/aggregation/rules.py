"""The published rules by which a cluster's members become one adapter, one function each, in one table.

| rule | sent up | sent down | exact | ranks may differ |
|---|---|---|---|---|
| mean | A, B, head | the same | no | no |
| ffa | B, head | B, head, once A | yes | no |
| rolora | in turn B or A, head | A, B, head | where the members had the same other factor | no |
| fedsa | A, B, head | mean A and head, own B | of A | no |
| hetlora | A, B, head at the client's rank | the first of the rows | no | yes |
| flexlora | A, B, head at the client's rank | the leading singular vectors | the best of its rank | yes |
| flora | A, B, head at the client's rank | new A, B = 0, head, base | yes | yes |
| fedex | A, B, head | mean A, B, head, base | yes | no |

A base is what the members' frozen weights gain. It is the mean of the bases that the members had plus what the
rule adds, so it is exact even where members come from different clusters. It grows: its rank is at most the sum of all
ranks so far, and never above min(out, in). Clients keep nothing, so each round sends all of it, in factors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fltac.config import AggregationConfig
from fltac.records import LORA_A, LORA_B, Adapter, FloatArray, is_head, lora_modules
from fltac.server.aggregation.means import mean_adapter
from fltac.server.aggregation.parts import Part, as_base, decomposed, stacked

Rule = Callable[[Sequence[Part], Adapter], Adapter]
"""From the members, at least one, and this round's fresh factors to the cluster's adapter, base included."""


def combined(parts: Sequence[Part], config: AggregationConfig, fresh: Adapter) -> Adapter:
    """Applies the configured rule.

    Args:
        parts: The members' contributions, at least one.
        config: Names the rule.
        fresh: Factors as v0 has them, A random and B zero.

    Returns:
        Factors of the rank of ``fresh``, heads, and a base if the rule makes one. Float32.
    """
    return RULES[config.rule](parts, fresh)


def _mean(parts: Sequence[Part], _: Adapter) -> Adapter:
    """The mean of the factors, tensor by tensor (FedIT, arXiv 2305.05644).

    Also FFA-LoRA (arXiv 2403.12313), where A is v0's and only B and head are trained and sent, so that the mean of B is
    exact; RoLoRA (arXiv 2409.02346), where B is trained and sent in odd rounds and A in even ones; and FedSA-LoRA
    (arXiv 2410.01463), where A and head are averaged and each slot keeps its own B (``ServerState.own``).

    What differs from FedSA-LoRA: B goes to the server and back, since clients keep nothing between two rounds, so
    nothing is saved and B is not hidden. The cluster's adapter, for newcomers and for export, has the mean B.
    """
    return mean_adapter([part.adapter for part in parts], [part.weight for part in parts])


def _hetlora(parts: Sequence[Part], fresh: Adapter) -> Adapter:
    """After HetLoRA (arXiv 2401.06432): factors filled up with zeros, averaged by the Frobenius norms of the products.

    A client is sent the first rows of A and columns of B. What differs: clients do not prune their rank themselves;
    the norm multiplies the weight of the member (``weighting: uniform`` is the paper); heads are averaged by weight
    alone; a row that is zero in both factors, since only clients of smaller ranks were heard, is fresh in A, or nobody
    could ever train it again.
    """
    norms = np.zeros(len(parts))
    for module in lora_modules(parts[0].adapter):
        for index, part in enumerate(parts):
            a, b = part.adapter[module + LORA_A].astype(np.float64), part.adapter[module + LORA_B].astype(np.float64)
            norms[index] += np.einsum("ij,ij->", b.T @ b, a @ a.T)
    # Only rounding makes a square negative.
    norms = np.sqrt(np.maximum(norms, 0.0))
    if not norms.any():
        norms[:] = 1.0
    weights = [float(part.weight * norm) for part, norm in zip(parts, norms, strict=True)]
    factors = mean_adapter([_split(part.adapter)[0] for part in parts], weights)
    for module in lora_modules(factors):
        dead = ~(factors[module + LORA_A].any(axis=1) | factors[module + LORA_B].any(axis=0))
        factors[module + LORA_A][dead] = fresh[module + LORA_A][dead]
    return {**factors, **_mean_heads(parts)}


def _flexlora(parts: Sequence[Part], fresh: Adapter) -> Adapter:
    """FlexLoRA (arXiv 2402.11505): the singular value decomposition of the mean product, cut to the rank.

    B holds the left vectors times the values, A the right vectors, the largest first, so that a client of a smaller
    rank is sent the best approximation of its own rank. Where members have fewer ranks together than the cluster, the
    rest of A is fresh and that of B zero.
    """
    factors: dict[str, FloatArray] = {}
    for module in lora_modules(fresh):
        u, values, v = decomposed(*stacked(parts, module))
        a, b = fresh[module + LORA_A].copy(), np.zeros_like(fresh[module + LORA_B])
        rank = min(len(a), len(values))
        a[:rank], b[:, :rank] = v[:rank], u[:, :rank] * values[:rank]
        factors |= {module + LORA_A: a, module + LORA_B: b}
    return {**factors, **_mean_heads(parts)}


def _flora(parts: Sequence[Part], fresh: Adapter) -> Adapter:
    """FLoRA (arXiv 2409.05976): the stacked factors are merged into the frozen weights, and training begins anew.

    What differs: clients do not keep the merged weights; the base holds all that was merged so far, in factors of the
    least rank. The fresh factors are the server's, the same for all.
    """
    bases: Adapter = {}
    for module in lora_modules(fresh):
        bases = {**bases, **as_base(*stacked(parts, module), module)}
    return {**_split(fresh)[0], **_mean_heads(parts), **bases}


def _fedex(parts: Sequence[Part], _: Adapter) -> Adapter:
    """FedEx-LoRA (arXiv 2410.09432): the mean of the factors, and what its product misses into the frozen weights.

    What differs: the frozen weights are the cluster's, not everybody's, and clients do not keep them; the base holds
    the sum of all residuals so far, in factors of the least rank.
    """
    mean = _mean(parts, {})
    bases: Adapter = {}
    for module in lora_modules(mean):
        b, a = stacked(parts, module)
        missed_b = np.concatenate([b, -mean[module + LORA_B]], axis=1, dtype=np.float64)
        missed_a = np.concatenate([a, mean[module + LORA_A]], axis=0, dtype=np.float64)
        bases = {**bases, **as_base(missed_b, missed_a, module)}
    return {**mean, **bases}


def _split(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """The factors and the heads."""
    heads = {name: tensor for name, tensor in adapter.items() if is_head(name)}
    return {name: tensor for name, tensor in adapter.items() if name not in heads}, heads


def _mean_heads(parts: Sequence[Part]) -> Adapter:
    return _mean([replace(part, adapter=_split(part.adapter)[1]) for part in parts], {})


RULES: Mapping[str, Rule] = {
    "mean": _mean,
    "ffa": _mean,
    "rolora": _mean,
    "fedsa": _mean,
    "hetlora": _hetlora,
    "flexlora": _flexlora,
    "flora": _flora,
    "fedex": _fedex,
}
