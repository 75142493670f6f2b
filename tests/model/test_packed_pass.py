"""Packed rows against padded rows, on one architecture after another; those that cannot be packed are found out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, PretrainedConfig, RobertaConfig

from fltac.config import BackboneConfig
from fltac.model.attention import use_own_attention
from fltac.model.backbone import load_backbone
from fltac.model.lanes import LaneModel
from fltac.model.packed_pass import first_position
from fltac.model.targets import find_targets, layer_shapes
from model.test_lanes import ARCHITECTURES, TEXT

ROBERTA = RobertaConfig(
    **{**TEXT, "pad_token_id": 1, "bos_token_id": 0},
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=34,
)
TEXTS: dict[str, PretrainedConfig] = {
    "roberta": ROBERTA,
    **{name: config for name, (kind, config) in ARCHITECTURES.items() if kind == "text"},
}
FIRST = {"bert": 0, "roberta": 2, "distilbert": 0, "gpt2 (Conv1D)": 0, "llama (grouped queries)": 0}
"""Position of a row's first token; ModernBERT attends in a window and cannot be packed."""


def rows(lengths: list[int], seed: int, padding: int) -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(seed)
    mask = (np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, draw.integers(3, 40, mask.shape), padding)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("name", TEXTS)
def test_packed_features_and_gradients_equal_padded_ones(name: str, pooling: Any, tmp_path: Path) -> None:
    config = TEXTS[name]
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    backbone = load_backbone(BackboneConfig(name=str(tmp_path), device="cpu", pooling=pooling), "text")
    assert use_own_attention(backbone.model)
    padding = config.pad_token_id or 0
    found = first_position(backbone, rows([9, 4, 1, 6], 9, padding))
    assert found == FIRST.get(name)
    if found is None:
        return
    shapes = layer_shapes(backbone.model, find_targets(backbone.model, None, None))
    model = LaneModel(backbone, shapes, rank=2, scaling=3.0)
    draw = np.random.default_rng(0)
    model.load([{k: draw.normal(size=s).astype(np.float32) * 0.3 for k, s in model.body_shapes.items()}] * 2)
    batches = [rows([5, 9, 3], 1, padding), rows([9, 2, 7], 2, padding)]
    results = []
    for first in (None, found):
        model.first_position = first
        features = model.features(model.stack(batches), 2)
        (features * torch.arange(features.numel()).view(features.shape).cos()).sum().backward()
        results.append((features.detach(), model.gradients.clone()))
        model.gradients.zero_()
    (padded, of_padded), (packed, of_packed) = results
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(of_packed, of_padded, atol=1e-4, rtol=1e-3)
    assert of_padded.abs().max() > 1e-2


def test_a_model_with_its_own_pooler_is_not_packed(tiny_bert: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cpu", pooling="pooler"), "text")
    assert use_own_attention(backbone.model)
    assert first_position(backbone, rows([5, 3], 0, 0)) is None


def test_a_model_with_eager_attention_is_not_packed(tiny_bert: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cpu"), "text")
    backbone.model.set_attn_implementation("eager")
    assert first_position(backbone, rows([5, 3], 0, 0)) is None
