"""The paper's backbones as shapes alone: built from their configurations on the meta device, no weights, no network.

What transformers' configuration classes have as defaults are the base models of their papers; what differs stands here.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Final

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    ViTConfig,
)

from fltac.config import LoraConfig
from fltac.errors import InputError
from fltac.model.targets import find_targets, layer_shapes
from fltac.paths import resolve

ARCHITECTURES: Final[Mapping[str, Callable[[], PreTrainedConfig]]] = {
    "google-bert/bert-base-uncased": lambda: BertConfig(),
    "google-bert/bert-base-cased": lambda: BertConfig(vocab_size=28996),
    "google/vit-base-patch16-224-in21k": lambda: ViTConfig(),
    "huggyllama/llama-7b": lambda: LlamaConfig(),
}
"""Hub id to the model's configuration."""


def architecture(name: str) -> PreTrainedConfig:
    """The configuration of a backbone: known here, or read from a local folder.

    Raises:
        InputError: it is neither.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]()
    folder = resolve(name, "backbone.name")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"backbone.name: got {name!r}; allowed are {known}, or a local model folder") from error


def on_meta(config: PreTrainedConfig) -> nn.Module:
    """The base model without any memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config)
    return model


def adapter_parameters(model: nn.Module, lora: LoraConfig) -> int:
    """Numbers in one adapter without a head: A ``[rank, in]`` and B ``[out, rank]`` of every target that is found.

    Raises:
        InputError: see :func:`fltac.model.targets.find_targets`.
    """
    shapes = layer_shapes(model, find_targets(model, lora.targets, lora.layers))
    return sum(lora.rank * (inputs + outputs) for inputs, outputs in shapes.values())


def whole_classifier(config: PreTrainedConfig, classes: int) -> int:
    """Numbers in the whole model with its own sequence classification head."""
    config.num_labels = classes
    with torch.device("meta"):
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return sum(prod(parameter.shape) for parameter in model.parameters())


def linear_head(hidden: int, outputs: int, bias: bool) -> int:
    """Numbers in a linear head."""
    with torch.device("meta"):
        head = nn.Linear(hidden, outputs, bias=bias)
    return sum(parameter.numel() for parameter in head.parameters())
