"""A base, which stands for part of the frozen weights, merged into factors of a higher rank: plain LoRA again."""

import numpy as np

from fltac.config import LoraConfig
from fltac.records import BASE_A, BASE_B, LORA_A, LORA_B, Adapter, at_rank, lora_modules, without_base


def merged(adapter: Adapter, lora: LoraConfig) -> tuple[Adapter, LoraConfig]:
    """An adapter without a base that computes the same.

    Args:
        adapter: Factors, heads and perhaps bases.
        lora: Of the adapter.

    Returns:
        The factors with the bases' rows and columns after their own, filled up with zeros to the largest rank of all
        modules, and the settings with that rank and an alpha that keeps the factor in front of B A. Both as they are
        where there is no base.
    """
    plain = without_base(adapter)
    if plain is adapter:
        return adapter, lora
    out = dict(plain)
    for module in lora_modules(adapter):
        if module + BASE_A in adapter:
            out[module + LORA_A] = np.concatenate([plain[module + LORA_A], adapter[module + BASE_A]], axis=0)
            out[module + LORA_B] = np.concatenate([plain[module + LORA_B], adapter[module + BASE_B]], axis=1)
    rank = max(len(out[module + LORA_A]) for module in lora_modules(adapter))
    alpha = lora.scaling * (rank**0.5 if lora.rslora else rank)
    return at_rank(out, rank), lora.model_copy(update={"rank": rank, "alpha": float(alpha), "ranks": {}})
