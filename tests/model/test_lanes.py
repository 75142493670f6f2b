"""Several lanes against PEFT on one architecture after another: each lane's features and gradients are its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    ViTConfig,
)

from fltac.config import BackboneConfig
from fltac.model.backbone import Kind, load_backbone
from fltac.model.lanes import LaneModel
from fltac.model.targets import find_targets, layer_shapes

TEXT: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES: dict[str, tuple[Kind, PretrainedConfig]] = {
    "bert": (
        "text",
        BertConfig(**TEXT, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32),
    ),
    "distilbert": ("text", DistilBertConfig(**TEXT, dim=16, n_layers=2, n_heads=2, hidden_dim=32)),
    "modernbert": (
        "text",
        ModernBertConfig(
            **TEXT,
            cls_token_id=1,
            sep_token_id=2,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        ),
    ),
    "gpt2 (Conv1D)": ("text", GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "llama (grouped queries)": (
        "text",
        LlamaConfig(
            **TEXT,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
        ),
    ),
    "vit": (
        "image",
        ViTConfig(
            image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        ),
    ),
}
RANK, SCALING, ROWS = 2, 3.0, 3


def batch_of(kind: Kind, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if kind == "image":
        return {"pixel_values": torch.randn(ROWS, 3, 8, 8, generator=draw)}
    mask = torch.ones(ROWS, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(3, 40, (ROWS, 6), generator=draw) * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lanes_equal_peft(name: str, tmp_path: Path) -> None:
    kind, config = ARCHITECTURES[name]
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    backbone = load_backbone(BackboneConfig(name=str(tmp_path), device="cpu", pooling="mean"), kind)
    targets = find_targets(backbone.model, None, None)
    model = LaneModel(backbone, layer_shapes(backbone.model, targets), RANK, SCALING)
    draw = np.random.default_rng(0)
    adapters = [
        {key: draw.normal(size=shape).astype(np.float32) * 0.3 for key, shape in model.body_shapes.items()}
        for _ in range(3)
    ]
    model.load(adapters)
    batches = [batch_of(kind, seed) for seed in range(3)]
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    features = model.features(together, 3)
    features.square().sum().backward()
    bare = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    for lane, (adapter, batch) in enumerate(zip(adapters, batches, strict=True)):
        theirs, gradients = peft_features(tmp_path, targets, adapter, batch)
        ours = features[lane * ROWS : (lane + 1) * ROWS]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        for key, part in model.parts(lane).items():
            gradient = model.gradients[lane, part.start : part.stop].view(part.shape)
            torch.testing.assert_close(gradient, gradients[key], atol=1e-4, rtol=1e-3)
        with torch.no_grad():
            assert (mean_states(bare(**batch), batch) - theirs).abs().max() > 1e-3, "the adapter does nothing"


def mean_states(out: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    states = out.last_hidden_state
    if "attention_mask" not in batch:
        return states.mean(1)
    mask = batch["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def peft_features(
    folder: Path, targets: list[str], adapter: dict[str, np.ndarray], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pooled features, and the gradients of their squared sum, by PEFT alone."""
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    settings = LoraConfig(r=RANK, lora_alpha=RANK * SCALING, target_modules=targets, lora_dropout=0.0)
    model = get_peft_model(base, settings).eval()
    parameters = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data = torch.from_numpy(adapter[key])
            parameters[key] = parameter
    assert parameters.keys() == adapter.keys()
    features = mean_states(model(**batch), batch)
    features.square().sum().backward()
    return features.detach(), {key: parameter.grad for key, parameter in parameters.items()}  # type: ignore[misc]


def test_without_active_lanes_the_backbone_is_bare(tiny_bert: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cpu"), "text")
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    with torch.no_grad():
        before = backbone.model(**batch).last_hidden_state
        shapes = layer_shapes(backbone.model, find_targets(backbone.model, None, None))
        model = LaneModel(backbone, shapes, RANK, SCALING)
        model.load([{key: np.ones(shape, np.float32) for key, shape in model.body_shapes.items()}])
        assert not torch.equal(model.features(batch, 1), before.mean(1))
        torch.testing.assert_close(model.features(batch, 0), before.mean(1))


def test_an_adapter_is_read_back_as_it_was_loaded(tiny_bert: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cpu"), "text")
    model = LaneModel(backbone, layer_shapes(backbone.model, find_targets(backbone.model, None, None)), RANK, SCALING)
    draw = np.random.default_rng(1)
    one, other = (
        {
            **{key: draw.normal(size=shape).astype(np.float32) for key, shape in model.body_shapes.items()},
            f"head.{outputs}.weight": draw.normal(size=(outputs, 16)).astype(np.float32),
            f"head.{outputs}.bias": draw.normal(size=outputs).astype(np.float32),
        }
        for outputs in (2, 3)
    )
    model.load([one, other])
    for lane, expected in enumerate((one, other)):
        found = model.read(lane)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            np.testing.assert_array_equal(found[key], tensor)


def test_adapters_take_turns_in_a_pass(tiny_bert: Path) -> None:
    """What was changed in a pass is still there when other adapters have been in it since."""
    backbone = load_backbone(BackboneConfig(name=str(tiny_bert), device="cpu"), "text")
    model = LaneModel(backbone, layer_shapes(backbone.model, find_targets(backbone.model, None, None)), RANK, SCALING)
    adapters = [{key: np.full(shape, n, np.float32) for key, shape in model.body_shapes.items()} for n in range(3)]
    model.load(adapters, lanes=2)
    assert model.values.shape[0] == 2
    model.activate([2, 0])
    model.values.add_(10.0)
    model.activate([1, 2])
    np.testing.assert_array_equal(model.values[:, 0], [1.0, 12.0])
    model.values[0] = 5.0
    found = [set(np.unique(np.concatenate([t.ravel() for t in model.read(n).values()]))) for n in range(3)]
    assert found == [{10.0}, {5.0}, {12.0}]
