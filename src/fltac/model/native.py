"""Decides whether an architecture's own classification class computes what the backbone and a head compute.

That is so for ViT with the [CLS] token or BERT with its pooler; it is not for BERT with mean pooling, or
where the class puts an extra dense layer before its last one. It is decided by computation, not by a list of
architectures.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from fltac.model.backbone import Backbone, pooled, quiet_transformers
from fltac.seeding import generator

AUTO_CLASSES = {"text": AutoModelForSequenceClassification, "image": AutoModelForImageClassification}
TOLERANCE = 1e-5


@dataclass(frozen=True)
class NativeHead:
    """Where a head has its place in the architecture's own classification class.

    Attributes:
        auto_class: Name of the class in ``transformers`` that loads it.
        prefix: What module paths of the backbone get in front there, with the dot: ``bert.``.
        linear: Name of its last linear layer, the only parameters beside the backbone's: ``classifier``.
    """

    auto_class: str
    prefix: str
    linear: str


def native_head(backbone: Backbone, outputs: int) -> NativeHead | None:
    """Compares the classification class with pooling and a linear head, on a small random batch.

    Args:
        backbone: Without adapters; its device and precision play no part.
        outputs: Number of the head's outputs.

    Returns:
        The head's place if the logits agree to 1e-5, else None.
    """
    try:
        return _compared(backbone, outputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return None  # the class cannot be built or run here, or its base model lacks this pooling


def _compared(backbone: Backbone, outputs: int) -> NativeHead | None:
    auto_class = AUTO_CLASSES[backbone.kind]
    config = copy.deepcopy(backbone.model.config)
    config.architectures = config.architectures or []
    config.num_labels = outputs
    if type(config) not in auto_class._model_mapping:
        return None
    # A large model is only built when the names and shapes of its parameters have fitted already.
    with torch.device("meta"):
        head = _place(auto_class.from_config(config), backbone, outputs)
    if head is None:
        return None
    with torch.random.fork_rng(devices=[]), quiet_transformers(), torch.no_grad():
        model = auto_class.from_config(config, dtype=torch.float32).eval()
        base: PreTrainedModel = model.get_submodule(head.prefix.removesuffix("."))
        base.load_state_dict(backbone.model.state_dict())
        linear = model.get_submodule(head.linear)
        torch.manual_seed(0)
        for parameter in linear.parameters():
            parameter.normal_(std=backbone.hidden**-0.5)
        batch = _small_batch(backbone)
        expected = linear(pooled(replace(backbone, model=base), batch))
        agree = torch.allclose(model(**batch).logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
    return head if agree else None


def _place(model: PreTrainedModel, backbone: Backbone, outputs: int) -> NativeHead | None:
    """The head's place if the model is exactly the backbone and one linear layer of the head's shape."""
    prefix = model.base_model_prefix
    base = getattr(model, prefix, None)
    if not isinstance(base, nn.Module) or _shapes(base) != _shapes(backbone.model):
        return None
    rest = [name for name, _ in model.named_parameters() if not name.startswith(prefix + ".")]
    name = rest[0].partition(".")[0] if rest else ""
    linear = getattr(model, name, None)
    if not isinstance(linear, nn.Linear) or set(rest) != {f"{name}.weight", f"{name}.bias"}:
        return None
    if (linear.out_features, linear.in_features) != (outputs, backbone.hidden):
        return None
    return NativeHead(AUTO_CLASSES[backbone.kind].__name__, prefix + ".", name)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _small_batch(backbone: Backbone) -> dict[str, Tensor]:
    """Two random texts, one of them padded, or two random images."""
    source = generator(0, "export-check")
    config: PretrainedConfig = backbone.model.config
    if backbone.kind == "text":
        ids = source.integers(1, config.vocab_size, size=(2, 6))
        mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = source.random((2, getattr(config, "num_channels", 3), height, width), dtype=np.float32)
    return {"pixel_values": torch.from_numpy(pixels)}
