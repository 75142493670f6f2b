"""Loading, freezing and pooling the backbone, and refusing what does not fit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, T5Config

from fltac.config import BackboneConfig
from fltac.errors import InputError
from fltac.model.backbone import load_backbone, pooled

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def config(folder: Path | str, **options: str) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": str(folder), "device": "cpu", **options})


def test_the_backbone_is_frozen_and_in_eval_mode(tiny_bert: Path) -> None:
    backbone = load_backbone(config(tiny_bert), "text")
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert (backbone.pooling, backbone.hidden) == ("mean", 16)


def test_mean_pooling_leaves_padding_out(tiny_bert: Path) -> None:
    backbone = load_backbone(config(tiny_bert), "text")
    both = pooled(backbone, {"input_ids": IDS, "attention_mask": MASK})
    short = pooled(backbone, {"input_ids": IDS[1:, :2], "attention_mask": MASK[1:, :2]})
    torch.testing.assert_close(both[1:], short, atol=1e-6, rtol=0)
    states = AutoModel.from_pretrained(tiny_bert)(IDS[1:, :2]).last_hidden_state
    torch.testing.assert_close(short, states.mean(1), atol=1e-6, rtol=0)


def test_cls_and_pooler(tiny_bert: Path) -> None:
    reference = AutoModel.from_pretrained(tiny_bert).eval()(IDS, attention_mask=MASK)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    cls = pooled(load_backbone(config(tiny_bert, pooling="cls"), "text"), batch)
    torch.testing.assert_close(cls, reference.last_hidden_state[:, 0], atol=1e-6, rtol=0)
    pooler = pooled(load_backbone(config(tiny_bert, pooling="pooler"), "text"), batch)
    torch.testing.assert_close(pooler, reference.pooler_output, atol=1e-6, rtol=0)


def test_images(tiny_vit: Path) -> None:
    backbone = load_backbone(config(tiny_vit), "image")
    pixels = torch.rand(3, 3, 8, 8)
    assert backbone.pooling == "cls"
    reference = AutoModel.from_pretrained(tiny_vit).eval()(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(pooled(backbone, {"pixel_values": pixels}), reference, atol=1e-6, rtol=0)


def test_the_fingerprint_follows_the_weights(tiny_bert: Path, tmp_path: Path) -> None:
    backbone = load_backbone(config(tiny_bert), "text")
    assert backbone.fingerprint == load_backbone(config(tiny_bert), "text").fingerprint
    with torch.no_grad():
        backbone.model.embeddings.word_embeddings.weight[0, 0] += 1
    backbone.model.save_pretrained(tmp_path)
    assert load_backbone(config(tmp_path), "text").fingerprint != backbone.fingerprint


def test_a_backbone_of_the_wrong_kind(tiny_bert: Path, tiny_vit: Path) -> None:
    with pytest.raises(InputError, match=r"backbone\.name.*pixel_values.*text tasks.*input_ids"):
        load_backbone(config(tiny_vit), "text")
    with pytest.raises(InputError, match=r"backbone\.name.*input_ids.*image tasks.*pixel_values"):
        load_backbone(config(tiny_bert), "image")


def test_a_checkpoint_without_the_pooler_that_was_asked_for(tmp_path: Path) -> None:
    small = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(small, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"backbone\.pooling: 'pooler'.*no pooler weights"):
        load_backbone(config(tmp_path, pooling="pooler"), "text")
    assert load_backbone(config(tmp_path, pooling="cls"), "text").hidden == 16


def test_an_architecture_without_a_pooler(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match=r"backbone\.pooling: 'pooler', but DistilBertModel has none"):
        load_backbone(config(tmp_path, pooling="pooler"), "text")
    assert load_backbone(config(tmp_path), "text").hidden == 16


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="encoder-decoder"):
        load_backbone(config(tmp_path), "text")


def test_a_checkpoint_that_lacks_weights(tiny_bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_bert / "model.safetensors")
    del weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_bert / "config.json").read_text())
    with pytest.raises(InputError, match=r"lacks 1 weights, such as .*query\.weight"):
        load_backbone(config(tmp_path), "text")


def test_weights_that_are_no_safetensors(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "config.json").write_text((tiny_bert / "config.json").read_text())
    with pytest.raises(InputError, match=r"backbone\.name: .*cannot be loaded"):
        load_backbone(config(tmp_path), "text")


def test_a_name_that_cannot_be_loaded() -> None:
    with pytest.raises(InputError, match=r"backbone\.name: 'no/such-model' cannot be loaded.*hub id") as caught:
        load_backbone(config("no/such-model"), "text")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(tiny_bert: Path) -> None:
    with pytest.raises(InputError, match=r"backbone\.device: cuda is not available here; found cpu"):
        load_backbone(BackboneConfig(name=str(tiny_bert), device="cuda"), "text")


def test_a_pickled_checkpoint_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"cannot be loaded .*safetensors"):
        load_backbone(BackboneConfig(name=str(tmp_path), device="cpu"), "text")
