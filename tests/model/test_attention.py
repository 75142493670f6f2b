"""Attention in float32 under a bfloat16 backbone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from fltac.config import BackboneConfig
from fltac.model.attention import NAME, use_float32_attention
from fltac.model.backbone import load_backbone, pooled

IDS = torch.tensor([[3, 9, 4, 0], [5, 7, 8, 6]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


def test_only_a_bfloat16_model_with_fused_attention_is_switched(tiny_bert: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert, attn_implementation="sdpa", dtype=torch.float32)
    assert not use_float32_attention(model)
    model.to(torch.bfloat16)
    assert use_float32_attention(model)
    assert model.config._attn_implementation == NAME
    eager = AutoModel.from_pretrained(tiny_bert, attn_implementation="eager", dtype=torch.bfloat16)
    assert not use_float32_attention(eager)


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_vit"])
def test_it_is_as_near_to_float32_as_plain_bfloat16(fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    kind = "text" if fixture == "tiny_bert" else "image"
    batch = {"input_ids": IDS, "attention_mask": MASK}
    if kind == "image":
        batch = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}

    def features(switch: bool, dtype: torch.dtype) -> torch.Tensor:
        backbone = load_backbone(BackboneConfig(name=str(folder), device="cpu"), kind)  # type: ignore[arg-type]
        backbone.model.to(dtype)
        assert not switch or use_float32_attention(backbone.model)
        with torch.no_grad():
            return pooled(backbone, batch)

    reference = features(False, torch.float32)
    plain = (features(False, torch.bfloat16) - reference).abs().max()
    switched = (features(True, torch.bfloat16) - reference).abs().max()
    assert switched < 1.5 * plain + 1e-3


def test_padding_stays_masked(tiny_bert: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cpu"), "text")
    backbone.model.to(torch.bfloat16)
    assert use_float32_attention(backbone.model)
    other = IDS.clone()
    other[0, 3] = 11
    with torch.no_grad():
        one = pooled(backbone, {"input_ids": IDS, "attention_mask": MASK})
        two = pooled(backbone, {"input_ids": other, "attention_mask": MASK})
    torch.testing.assert_close(one, two)
