"""Loads a pretrained model, frozen; an encoder's or vision transformer's last hidden states are pooled for a head."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fltac.config import BackboneConfig
from fltac.errors import InputError
from fltac.paths import expand

Kind = Literal["text", "image", "causal-lm"]
Pooling = Literal["mean", "cls", "pooler"]

MAIN_INPUT = {"text": "input_ids", "image": "pixel_values", "causal-lm": "input_ids"}
AUTO_CLASSES = {"text": AutoModel, "image": AutoModel, "causal-lm": AutoModelForCausalLM}


@dataclass(frozen=True)
class Backbone:
    """A frozen pretrained model.

    Attributes:
        model: The base model without a classification head, or a causal language model with its output layer; in eval
            mode, no parameter requiring a gradient.
        kind: What it reads and is for.
        pooling: What a head reads of it; a causal language model has no head.
        hidden: Width of the pooled features.
        name: As given in the config.
        folder: The local folder or hub id it was loaded from.
        revision: Branch, tag or commit on the hub.
        fingerprint: SHA-256 over the weights, in hexadecimal.
    """

    model: PreTrainedModel
    kind: Kind
    pooling: Pooling
    hidden: int
    name: str
    folder: str
    revision: str | None
    fingerprint: str

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device


def choose_device(name: str) -> torch.device:
    """Resolves ``auto`` to cuda, mps or cpu.

    Raises:
        InputError: the named device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in there.items() if found)
    if not there[name]:
        found = ", ".join(device for device, yes in there.items() if yes)
        raise InputError(f"backbone.device: {name} is not available here; found {found}")
    return torch.device(name)


def load_backbone(config: BackboneConfig, kind: Kind, folder: str | None = None) -> Backbone:
    """Loads the backbone in float32, frozen, in eval mode, on its device.

    Args:
        config: The ``backbone`` section.
        kind: What the tasks need it to read.
        folder: Where it lies, if that has been resolved already.

    Raises:
        InputError: it cannot be loaded, is of another kind, or its checkpoint lacks weights that are needed.
    """
    device = choose_device(config.device)
    folder = folder or expand(config.name, "backbone.name")
    options: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    try:
        architecture = AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_unloadable(config.name, error)) from error
    if getattr(architecture, "is_encoder_decoder", False):
        raise InputError(
            f"backbone.name: {config.name!r} is an encoder-decoder ({architecture.model_type}); "
            "allowed are encoders, decoders and vision transformers"
        )
    pooling: Pooling = config.pooling if config.pooling != "auto" else ("cls" if kind == "image" else "mean")
    if kind == "causal-lm" and config.pooling != "auto":
        raise InputError(f"backbone.pooling: got {config.pooling!r}; allowed with causal-lm tasks is auto")
    model, missing = _load(folder, architecture, kind, pooling, options, config.name)
    reads = model.main_input_name
    if reads != MAIN_INPUT[kind]:
        raise InputError(
            f"backbone.name: {config.name!r} ({type(model).__name__}) reads {reads}, "
            f"but the tasks are {kind} tasks, which need {MAIN_INPUT[kind]}"
        )
    _refuse_missing(missing, pooling, config.name)
    hidden = getattr(model.config, "hidden_size", None)
    if not isinstance(hidden, int):
        raise InputError(
            f"backbone.name: {config.name!r} ({type(model).__name__}) has no hidden_size in its configuration; "
            "allowed are models whose last hidden states have one width"
        )
    model.eval().requires_grad_(False)
    model.to(device)
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    return Backbone(
        model=model,
        kind=kind,
        pooling=pooling,
        hidden=hidden,
        name=config.name,
        folder=folder,
        revision=config.revision,
        fingerprint=fingerprint(model),
    )


def _load(
    folder: str, architecture: Any, kind: Kind, pooling: Pooling, options: dict[str, Any], name: str
) -> tuple[PreTrainedModel, list[str]]:
    model_class = AUTO_CLASSES[kind]._model_mapping.get(type(architecture), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if model_class is None:
        what = "causal language" if kind == "causal-lm" else "base"
        raise InputError(f"backbone.name: {name!r}: transformers has no {what} model for {architecture.model_type!r}")
    takes_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    if pooling == "pooler" and not takes_pooler:
        raise InputError(f"backbone.pooling: 'pooler', but {model_class.__name__} has none; allowed are mean, cls")
    if takes_pooler:
        options = {**options, "add_pooling_layer": pooling == "pooler"}
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )  # never a pickle, whoever names the backbone
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(_unloadable(name, error)) from error
    return model, sorted(info["missing_keys"])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the report of weights that are not used on purpose, and without its progress bars."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _refuse_missing(missing: list[str], pooling: Pooling, name: str) -> None:
    """Weights that the checkpoint lacks would be random numbers on every client."""
    if not missing:
        return
    if pooling == "pooler" and all("pooler" in key for key in missing):
        raise InputError(
            f"backbone.pooling: 'pooler', but the checkpoint of {name!r} has no pooler weights "
            f"({missing[0]}); allowed are mean, cls"
        )
    raise InputError(f"backbone.name: the checkpoint of {name!r} lacks {len(missing)} weights, such as {missing[0]}")


def _unloadable(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160]
    return (
        f"backbone.name: {name!r} cannot be loaded ({reason}); allowed are a local Hugging Face folder, "
        "package:<import name>/<folder>, or a hub id that can be reached"
    )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and values of all parameters, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pooled(backbone: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    """Runs the backbone.

    Args:
        backbone: The model; adapters are applied where lanes are attached to it.
        batch: ``input_ids``, ``attention_mask`` (and ``token_type_ids``), int64 ``[b, length]``; or
            ``pixel_values``, float ``[b, channels, height, width]``.

    Returns:
        float ``[b, hidden]`` in float32, or float64 where the backbone is.
    """
    inputs = dict(batch)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(backbone.model.dtype)
    out = backbone.model(**inputs)
    if backbone.pooling == "pooler":
        return at_least_float32(out.pooler_output)
    states = out.last_hidden_state
    if backbone.pooling == "cls":
        return at_least_float32(states[:, 0])
    states = at_least_float32(states)
    if "attention_mask" not in batch:
        return states.mean(dim=1)
    mask = batch["attention_mask"].to(states.dtype).unsqueeze(-1)
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
