"""Our attention against torch's, padded and packed; and which models it is switched on for."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from fltac.config import BackboneConfig
from fltac.model.attention import NAME, UnpackableError, attend, attending, use_own_attention
from fltac.model.backbone import load_backbone, pooled
from fltac.model.packing import PackedRows

IDS = torch.tensor([[3, 9, 4, 0], [5, 7, 8, 6]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
LENGTHS = [5, 1, 40, 17, 33, 5, 48, 32]
"""Three buckets; one row fills its own."""


class Layer(nn.Module):
    """What ``attend`` reads of an attention layer."""

    def __init__(self, causal: bool = False, groups: int = 1) -> None:
        super().__init__()
        self.is_causal = causal
        self.num_key_value_groups = groups


def packed_rows(lengths: list[int]) -> PackedRows:
    return PackedRows(np.array(lengths), (len(lengths),), torch.device("cpu"))


def draw(heads: int, tokens: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    value = torch.randn(1, heads, tokens, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value.to(dtype).requires_grad_()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_packed_rows_attend_to_their_own_row_alone(
    causal: bool, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Outputs and gradients equal those of torch's attention in float64, row by row."""
    heads, tokens = 4, sum(LENGTHS)
    query = draw(heads, tokens, dtype, 0)
    key, value = draw(heads // groups, tokens, dtype, 1), draw(heads // groups, tokens, dtype, 2)
    weight = draw(heads, tokens, torch.float64, 3).detach().transpose(1, 2)
    with attending(packed_rows(LENGTHS)):
        ours, _ = attend(Layer(causal, groups), query, key, value, None, scaling=0.3, dropout=0.0)
    (ours.double() * weight).sum().backward()

    exact = [part.detach().double().requires_grad_() for part in (query, key, value)]
    rows, start = [], 0
    for length in LENGTHS:
        q, k, v = (part[:, :, start : start + length] for part in exact)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        rows.append(F.scaled_dot_product_attention(q, k, v, scale=0.3, is_causal=causal))
        start += length
    theirs = torch.cat(rows, dim=2).transpose(1, 2)
    (theirs * weight).sum().backward()
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)
    for part, reference in zip((query, key, value), exact, strict=True):
        assert part.grad is not None
        torch.testing.assert_close(part.grad.double(), reference.grad, atol=tolerance, rtol=tolerance)


def test_rows_of_nearly_the_same_length_share_a_bucket() -> None:
    buckets = packed_rows(LENGTHS).buckets
    assert [(bucket.rows, bucket.length) for bucket in buckets] == [(5, 32), (3, 48)]
    seen = torch.cat([bucket.tokens for bucket in buckets])
    assert sorted(seen.tolist()) == list(range(sum(LENGTHS)))


@pytest.mark.parametrize(
    "options", [{"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}]
)
def test_what_packed_rows_cannot_do_is_refused(options: dict[str, object]) -> None:
    q = draw(4, 6, torch.float32, 0)
    with attending(packed_rows([4, 2])), pytest.raises(UnpackableError, match="Layer"):
        attend(Layer(), q, q, q, None, scaling=1.0, **options)


def test_a_mask_on_packed_rows_is_refused() -> None:
    q = draw(4, 6, torch.float32, 0)
    with attending(packed_rows([4, 2])), pytest.raises(UnpackableError):
        attend(Layer(), q, q, q, torch.zeros(1, 1, 6, 6))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_rows_without_padding_equal_torchs_attention(dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = (
        draw(4, 12, dtype, seed).detach().expand(3, -1, -1, -1).clone().requires_grad_() for seed in range(3)
    )
    ours, _ = attend(Layer(), query, key, value, None, scaling=0.3)
    ours.double().square().sum().backward()
    exact = [part.detach().double().requires_grad_() for part in (query, key, value)]
    theirs = F.scaled_dot_product_attention(*exact, scale=0.3).transpose(1, 2)
    theirs.square().sum().backward()
    torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)
    assert query.grad is not None
    torch.testing.assert_close(query.grad.double(), exact[0].grad, atol=tolerance, rtol=tolerance)


def test_only_a_model_with_torchs_attention_is_switched(tiny_bert: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert, attn_implementation="sdpa", dtype=torch.float32)
    assert use_own_attention(model)
    assert model.config._attn_implementation == NAME
    eager = AutoModel.from_pretrained(tiny_bert, attn_implementation="eager", dtype=torch.bfloat16)
    assert not use_own_attention(eager)
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_vit"])
def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_one(fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    kind = "text" if fixture == "tiny_bert" else "image"
    batch = {"input_ids": IDS, "attention_mask": MASK}
    if kind == "image":
        batch = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}

    def features(switch: bool, dtype: torch.dtype) -> torch.Tensor:
        backbone = load_backbone(BackboneConfig(name=str(folder), device="cpu"), kind)  # type: ignore[arg-type]
        backbone.model.to(dtype)
        if switch:
            assert use_own_attention(backbone.model)
        else:
            backbone.model.set_attn_implementation("eager")
        with torch.no_grad():
            return pooled(backbone, batch)

    reference = features(False, torch.float32)
    torch.testing.assert_close(features(True, torch.float32), reference, atol=1e-5, rtol=1e-4)
    plain = (features(False, torch.bfloat16) - reference).abs().max()
    switched = (features(True, torch.bfloat16) - reference).abs().max()
    assert switched < 1.5 * plain + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_stays_masked(tiny_bert: Path, dtype: torch.dtype) -> None:
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cpu"), "text")
    backbone.model.to(dtype)
    assert use_own_attention(backbone.model)
    other = IDS.clone()
    other[0, 3] = 11
    with torch.no_grad():
        one = pooled(backbone, {"input_ids": IDS, "attention_mask": MASK})
        two = pooled(backbone, {"input_ids": other, "attention_mask": MASK})
    torch.testing.assert_close(one, two)
