"""Shortcuts through a backbone change nothing, are taken where they can be, and leave work out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from fltac.config import BackboneConfig
from fltac.model.attention import use_own_attention
from fltac.model.backbone import load_backbone
from fltac.model.lanes import LaneModel
from fltac.model.packed_pass import first_position
from fltac.model.targets import find_targets, layer_shapes
from fltac.model.trial import keeps_lanes_apart, take_shortcuts
from model.test_lanes import ARCHITECTURES, batch_of

CUT = {
    ("bert", False): "intermediate",
    ("bert", True): "attention",
    ("distilbert", False): "ffn",
    ("distilbert", True): None,
    ("gpt2 (Conv1D)", False): "mlp",
    ("llama (grouped queries)", False): "mlp",
    ("modernbert", False): "mlp",
    ("vit", False): "mlp",
}
"""Where the last layer is cut. Packed rows of a layer that adds its input after attention cannot be cut."""


def make(name: str, folder: Path, packs: bool, layers: list[int] | None, pooling: Any) -> LaneModel:
    kind, config = ARCHITECTURES[name]
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    backbone = load_backbone(BackboneConfig(name=str(folder), device="cpu", pooling=pooling), kind)
    use_own_attention(backbone.model)
    shapes = layer_shapes(backbone.model, find_targets(backbone.model, None, layers))
    model = LaneModel(backbone, shapes, rank=2, scaling=3.0)
    if packs:
        model.first_position = first_position(backbone, numpy_batch(kind, 0))
        assert model.packs
    return model


def numpy_batch(kind: Any, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    return {key: value.numpy() for key, value in batch_of(kind, seed).items()}


def features_and_gradients(model: LaneModel, batches: list[Any], keys: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    model.gradients.zero_()
    features = model.features(model.stack(batches), len(batches), keys)
    (features * torch.arange(features.numel()).view(features.shape).cos()).sum().backward()
    return features.detach(), model.gradients.clone()


@pytest.mark.parametrize(("name", "packs"), CUT)
def test_what_a_cls_head_does_not_read_is_left_out(name: str, packs: bool, tmp_path: Path) -> None:
    model = make(name, tmp_path, packs, None, "cls")
    batches = [numpy_batch(ARCHITECTURES[name][0], seed) for seed in range(2)]
    take_shortcuts(model, batches)
    expected = CUT[name, packs]
    if expected is None:
        assert model.cut is None
        return
    assert model.cut is not None
    last = max((part for part in model.backbone.model.modules() if isinstance(part, torch.nn.ModuleList)), key=len)[-1]
    assert model.cut.path.endswith(f"1.{expected}")
    feed_forward = next(last.get_submodule(part) for part in ("intermediate", "mlp", "ffn") if hasattr(last, part))
    seen: list[int] = []
    handle = feed_forward.register_forward_hook(lambda _, __, out: seen.append(out[..., 0].numel()))
    with_cut = features_and_gradients(model, batches, [])
    assert seen == [6], "one token a row"
    model.cut = None
    without = features_and_gradients(model, batches, [])
    handle.remove()
    for one, other in zip(with_cut, without, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert without[1].abs().max() > 1e-3


def test_adapters_that_change_nothing_are_not_taken_for_mixed(tmp_path: Path) -> None:
    """Queries and keys of rows of one token: what differs between passes is rounding, however they are run."""
    model = make("llama (grouped queries)", tmp_path, False, None, "mean")
    for path, layer in model.layers.items():
        if not path.endswith(("q_proj", "k_proj")):
            layer.register_forward_hook(lambda layer, args, out: layer.base(args[0]))
    rounded = model.layers[next(path for path in model.layers if path.endswith("v_proj"))].base
    rounded.register_forward_hook(lambda _, args, out: out * (1 + 1e-6 * len(args[0])))
    batches = [{name: value[:1, :1] for name, value in numpy_batch("text", seed).items()} for seed in range(2)]
    assert keeps_lanes_apart(model, batches)


def test_nothing_is_cut_where_the_head_reads_all_tokens(tmp_path: Path) -> None:
    model = make("bert", tmp_path, False, None, "mean")
    take_shortcuts(model, [numpy_batch("text", seed) for seed in range(2)])
    assert model.cut is None


def test_nothing_is_cut_where_the_feed_forward_network_is_adapted(tmp_path: Path) -> None:
    model = make("bert", tmp_path, False, None, "cls")
    shapes = {"encoder.layer.1.intermediate.dense": (16, 32)}
    model = LaneModel(model.backbone, shapes, rank=2, scaling=3.0)
    take_shortcuts(model, [numpy_batch("text", seed) for seed in range(2)])
    assert model.cut is None


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_frozen_layers_below_the_first_adapted_one_run_once_for_each_row(
    name: str, packs: bool, tmp_path: Path
) -> None:
    if packs and name in ("vit", "modernbert"):
        pytest.skip("its rows are not packed")
    kind = ARCHITECTURES[name][0]
    model = make(name, tmp_path, packs, [1], "mean")
    batches = [numpy_batch(kind, seed) for seed in range(2)]
    take_shortcuts(model, batches)
    assert model.prefix is not None
    assert model.prefix.first == 1
    assert not model.prefix.kept
    assert not model.prefix.admitted
    plain = features_and_gradients(model, batches, [])
    model.prefix.admitted.add("rows")
    keys = [("rows", row) for row in range(6)]
    runs: list[int] = []
    handle = model.prefix.layers[0].register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    kept = features_and_gradients(model, batches, keys)
    assert len(runs) == 6
    again = features_and_gradients(model, batches[::-1], keys[3:] + keys[:3])
    assert len(runs) == 6
    handle.remove()
    for one, other in zip(kept, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert not torch.equal(again[0], kept[0]), "the lanes have other rows"
    assert plain[1].abs().max() > 1e-3


def test_there_is_no_prefix_where_all_layers_are_adapted(tmp_path: Path) -> None:
    model = make("bert", tmp_path, False, None, "mean")
    take_shortcuts(model, [numpy_batch("text", seed) for seed in range(2)])
    assert model.prefix is None


def test_no_gradient_is_made_below_the_first_adapted_layer(tmp_path: Path) -> None:
    """Autograd keeps nothing of the frozen layers: their outputs need no gradient."""
    model = make("bert", tmp_path, False, [1], "mean")
    needs: dict[str, bool] = {}
    layers = model.backbone.model.get_submodule("encoder.layer")
    for index in range(2):
        layers.get_submodule(str(index)).register_forward_hook(
            lambda _, __, out, index=index: needs.update({str(index): out.requires_grad})
        )
    draw = np.random.default_rng(0)
    model.load([{k: draw.normal(size=s).astype(np.float32) for k, s in model.body_shapes.items()}])
    model.features(model.stack([numpy_batch("text", 0)]), 1)
    assert needs == {"0": False, "1": True}


def test_lanes_that_mix_are_found_out(tmp_path: Path) -> None:
    model = make("bert", tmp_path, False, None, "mean")
    batches = [{k: v[:1] for k, v in numpy_batch("text", seed).items()} for seed in range(2)]
    batches = [{k: v[:, :4] for k, v in batch.items()} for batch in batches]
    assert keeps_lanes_apart(model, batches)
    path, layer = next(iter(model.layers.items()))
    handle = layer.register_forward_pre_hook(lambda _, args: (args[0].flip(0),))
    assert not keeps_lanes_apart(model, batches), path
    handle.remove()
