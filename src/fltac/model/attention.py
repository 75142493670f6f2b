"""Attention in float32 for a backbone in bfloat16 on a CPU, where the fused kernel is slow in bfloat16.

Everything else of the backbone stays in bfloat16; the result is rounded to it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "fltac_float32_sdpa"


def float32_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of ``[b, heads, length, width]`` in float32; returns the dtype of ``query``."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return out.to(query.dtype), None


def use_float32_attention(model: PreTrainedModel) -> bool:
    """Switches a bfloat16 model on a CPU to :func:`float32_sdpa`, if it uses the fused attention of torch.

    Returns:
        Whether it was switched.
    """
    fused = getattr(model.config, "_attn_implementation", None) == "sdpa"
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not fused:
        return False
    AttentionInterface.register(NAME, float32_sdpa)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)
    return True
