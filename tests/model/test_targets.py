"""Which layers are adapted: by name, by PEFT's table, by inspection; for many architectures."""

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, T5EncoderModel

from fltac.errors import InputError
from fltac.model.targets import find_targets, layer_shapes

USUAL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**USUAL, "vocab_size": 50}
IMAGE = {**USUAL, "image_size": 8, "patch_size": 4}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
GPT = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}

# Class of the config, its options, the adapted modules of layer 0 (its path, the modules), number of layers.
ARCHITECTURES: list[tuple[str, dict[str, Any], str, list[str], int]] = [
    ("ViTConfig", IMAGE, "layers.{}.attention", ["q_proj", "v_proj"], 2),
    ("DeiTConfig", IMAGE, "layers.{}.attention", ["q_proj", "v_proj"], 2),
    ("Dinov2Config", {**IMAGE, "mlp_ratio": 2}, "encoder.layer.{}.attention", ["q_proj", "v_proj"], 2),
    ("BeitConfig", IMAGE, "layers.{}.attention", ["q_proj", "v_proj"], 2),
    ("SwinConfig", SWIN, "encoder.layers.{}.blocks.0.attention", ["q_proj", "v_proj"], 2),
    ("Swinv2Config", SWIN, "encoder.layers.{}.blocks.0.attention.self", ["query", "value"], 2),
    (
        "DistilBertConfig",
        {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "transformer.layer.{}.attention",
        ["q_lin", "v_lin"],
        2,
    ),
    ("BertConfig", TEXT, "encoder.layer.{}.attention.self", ["query", "value"], 2),
    ("RobertaConfig", TEXT, "encoder.layer.{}.attention.self", ["query", "value"], 2),
    (
        "ElectraConfig",
        {**TEXT, "embedding_size": 8},
        "encoder.layer.{}.attention.self",
        ["query", "value"],
        2,
    ),
    (
        "AlbertConfig",
        {**TEXT, "embedding_size": 8},
        "encoder.albert_layer_groups.{}.albert_layers.0.attention",
        ["query", "value"],
        1,
    ),
    ("DebertaV2Config", TEXT, "encoder.layer.{}.attention.self", ["query_proj", "value_proj"], 2),
    ("DebertaConfig", TEXT, "encoder.layer.{}.attention.self", ["in_proj"], 2),
    ("ModernBertConfig", {**TEXT, **SPECIAL}, "layers.{}.attn", ["Wqkv"], 2),
    ("MPNetConfig", TEXT, "encoder.layer.{}.attention.attn", ["q", "v"], 2),
    (
        "XLMConfig",
        {"vocab_size": 50, "emb_dim": 16, "n_layers": 2, "n_heads": 2},
        "attentions.{}",
        ["q_lin", "v_lin"],
        2,
    ),
    ("GPT2Config", GPT, "h.{}.attn", ["c_attn"], 2),
    ("GPTNeoXConfig", TEXT, "layers.{}.attention", ["query_key_value"], 2),
    ("LlamaConfig", TEXT, "layers.{}.self_attn", ["q_proj", "v_proj"], 2),
    ("Phi3Config", {**TEXT, "pad_token_id": 0}, "layers.{}.self_attn", ["qkv_proj"], 2),
]


def build(name: str, options: dict[str, Any]) -> nn.Module:
    config = getattr(transformers, name)(**options)
    model: nn.Module = AutoModel.from_config(config)
    return model


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return build("BertConfig", TEXT)


@pytest.mark.parametrize(
    ("name", "options", "block", "modules", "layers"), ARCHITECTURES, ids=[row[0] for row in ARCHITECTURES]
)
def test_query_and_value_by_default(
    name: str, options: dict[str, Any], block: str, modules: list[str], layers: int
) -> None:
    expected = [f"{block.format(layer)}.{module}" for layer in range(layers) for module in modules]
    model = build(name, options)
    found = find_targets(model, None, None)
    assert found == expected
    for path, (inputs, outputs) in layer_shapes(model, found).items():
        layer = model.get_submodule(path)
        assert layer(torch.zeros(3, inputs)).shape == (3, outputs)


def test_the_encoder_of_t5() -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    assert find_targets(T5EncoderModel(config), None, None) == [
        f"encoder.block.{layer}.layer.0.SelfAttention.{name}" for layer in (0, 1) for name in "qv"
    ]


def test_the_shape_of_a_transposed_layer() -> None:
    model = build("GPT2Config", GPT)
    assert layer_shapes(model, ["h.0.attn.c_attn", "h.0.mlp.c_fc", "h.1.mlp.c_proj"]) == {
        "h.0.attn.c_attn": (16, 48),
        "h.0.mlp.c_fc": (16, 64),
        "h.1.mlp.c_proj": (64, 16),
    }


@pytest.mark.parametrize(
    "targets",
    [
        ["dense"],
        ["query", "output.dense"],
        ["attention.output.dense"],
        ["encoder.layer.1.attention.self.key"],
    ],
)
def test_named_targets_are_those_that_peft_adapts(bert: nn.Module, targets: list[str]) -> None:
    adapted = get_peft_model(build("BertConfig", TEXT), LoraConfig(r=1, target_modules=targets))
    theirs = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A.default")
    ]
    assert find_targets(bert, targets, None) == theirs


def test_a_module_named_twice_is_adapted_once(bert: nn.Module) -> None:
    assert find_targets(bert, ["query", "self.query"], [1]) == ["encoder.layer.1.attention.self.query"]


def test_layers_are_those_that_peft_adapts(bert: nn.Module) -> None:
    adapted = get_peft_model(
        build("BertConfig", TEXT), LoraConfig(r=1, target_modules=["query", "dense"], layers_to_transform=[1])
    )
    theirs = {name for name, _ in adapted.named_modules() if name.endswith(".lora_A.default")}
    found = find_targets(bert, ["query", "dense"], [1])
    assert {f"base_model.model.{path}.lora_A.default" for path in found} == theirs
    assert "pooler.dense" not in found


def test_a_quantized_linear_counts_and_the_inside_of_multihead_attention_does_not() -> None:
    class Quantized(nn.Module):
        """What a quantized layer shows to the outside."""

        in_features, out_features = 4, 6

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(12, dtype=torch.uint8), requires_grad=False)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.ModuleDict({"query": Quantized(), "value": Quantized(), "key": Quantized()})
            self.torch_attention = nn.MultiheadAttention(4, 1)
            self.value = nn.Linear(4, 4)  # not inside an attention block

    model = Block()
    assert find_targets(model, None, None) == ["attention.query", "attention.value"]
    assert layer_shapes(model, ["attention.value"]) == {"attention.value": (4, 6)}
    with pytest.raises(InputError, match=r"'out_proj' matches no linear layer of Block"):
        find_targets(model, ["out_proj"], None)
    with pytest.raises(InputError, match=r"lora\.layers: \[0\] cannot be chosen.*Block.*allowed is null"):
        find_targets(model, None, [0])


def test_bad_targets(bert: nn.Module) -> None:
    with pytest.raises(InputError) as caught:
        find_targets(bert, ["query", "q_proj"], None)
    assert str(caught.value) == (
        "lora.targets: 'q_proj' matches no linear layer of BertModel; candidates are query, key, value, dense"
    )
    with pytest.raises(InputError, match=r"'attention' matches no linear layer"):
        find_targets(bert, ["attention"], None)
    with pytest.raises(InputError, match=r"'uery' matches no linear layer"):
        find_targets(bert, ["uery"], None)
    with pytest.raises(InputError, match=r"lora\.targets: the list is empty; candidates are query"):
        find_targets(bert, [], None)


@pytest.mark.parametrize("layer", [2, -1])
def test_a_layer_out_of_range(bert: nn.Module, layer: int) -> None:
    with pytest.raises(InputError) as caught:
        find_targets(bert, None, [0, layer])
    assert str(caught.value) == (f"lora.layers: {layer} is no layer with targets in BertModel; allowed are 0 to 1")
    with pytest.raises(InputError, match=r"lora\.layers: the list is empty; allowed are 0 to 1, or null"):
        find_targets(bert, None, [])


def test_layers_with_gaps() -> None:
    model = nn.ModuleDict({"layer": nn.ModuleList(nn.Linear(2, 2) if i in (1, 3) else nn.ReLU() for i in range(4))})
    assert find_targets(model, ["3"], None) == ["layer.3"]
    with pytest.raises(InputError, match=r"lora\.layers: 0 is no layer.*allowed are 1, 3$"):
        find_targets(model, ["1", "3"], [0])


def test_nothing_found() -> None:
    fnet = build("FNetConfig", {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32})
    with pytest.raises(InputError) as caught:
        find_targets(fnet, None, None)
    assert str(caught.value) == (
        "lora.targets: no query and value projections found in FNetModel; set lora.targets; "
        "candidates are projection, dense"
    )
    with pytest.raises(InputError, match=r"candidates are none: the model has no linear layers"):
        find_targets(nn.Sequential(nn.ReLU()), None, None)
