"""A base merged into factors computes what it computed on its own: what is exported is what was scored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fltac.config import LoraConfig
from fltac.config.sections import BackboneConfig
from fltac.model.backbone import load_backbone
from fltac.model.lanes import LaneModel
from fltac.model.merging import merged
from fltac.model.targets import find_targets, layer_shapes
from fltac.records import Adapter


def features(folder: Path, adapter: Adapter, lora: LoraConfig) -> torch.Tensor:
    backbone = load_backbone(BackboneConfig(name=str(folder), device="cpu", pooling="mean"), "text")
    modules = layer_shapes(backbone.model, find_targets(backbone.model, None, None))
    model = LaneModel(backbone, modules, lora.rank, lora.scaling)
    model.load([adapter])
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        return model.features(batch)


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_factors_compute_what_the_base_did(rslora: bool, tiny_bert: Path) -> None:
    """Bases of different ranks, and a matrix without one."""
    lora = LoraConfig(rank=2, alpha=6.0, rslora=rslora, ranks={"a": 1})
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cpu", pooling="mean"), "text")
    draw, adapter = np.random.default_rng(0), dict[str, np.ndarray]()
    for number, (path, (inputs, outputs)) in enumerate(
        layer_shapes(backbone.model, find_targets(backbone.model, None, None)).items()
    ):
        adapter[path + ".lora_A"] = draw.normal(size=(2, inputs)).astype(np.float32)
        adapter[path + ".lora_B"] = draw.normal(size=(outputs, 2)).astype(np.float32) / 5
        if number:
            adapter[path + ".base_A"] = draw.normal(size=(number, inputs)).astype(np.float32)
            adapter[path + ".base_B"] = draw.normal(size=(outputs, number)).astype(np.float32) / 5
    plain, settings = merged(adapter, lora)
    assert settings.rank > 2 + 1
    assert settings.ranks == {}
    assert not any(".base_" in name for name in plain)
    ours, theirs = features(tiny_bert, adapter, lora), features(tiny_bert, plain, settings)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    bare = {name: tensor for name, tensor in adapter.items() if ".base_" not in name}
    assert (features(tiny_bert, bare, lora) - ours).abs().max() > 1e-2, "the base must matter"
    assert merged(bare, lora) == (bare, lora)
