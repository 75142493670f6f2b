"""Reads a PEFT folder with LoRA factors and perhaps a linear head, and refuses everything else. No pickle."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from fltac.errors import InputError
from fltac.records import HEAD, LORA_A, LORA_B, Adapter

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"
OWN = "fltac.json"
KEYS = "base_model.model."
"""What PEFT puts in front of module paths in a file of weights."""
LORA_SUFFIXES = {LORA_A: ".lora_A.weight", LORA_B: ".lora_B.weight"}

NOT_PLAIN = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
)


def import_adapter(folder: Path) -> Adapter:
    """Reads an adapter from a PEFT folder.

    Args:
        folder: As ``export_adapter`` writes it. A folder by others, without ``fltac.json``, is taken as it
            is: module paths keep what a classification class put in front, and the head's key is its number
            of outputs.

    Returns:
        The tensors under the names of ``fltac.records``, float32.

    Raises:
        InputError: naming the file or tensor that is missing, damaged, of the wrong shape or not finite, or a
            PEFT option that a plain pair of factors cannot express.
    """
    config = _config(folder)
    own = _read_json(folder / OWN) if (folder / OWN).exists() else {}
    tensors = _tensors(folder / WEIGHTS)
    path = folder / WEIGHTS
    adapter: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    saved = config.get("modules_to_save") or []
    for key, tensor in tensors.items():
        name = _our_name(key, str(own.get("prefix") or ""))
        if name is not None:
            adapter[name] = tensor
        elif any(key in (f"{KEYS}{module}.weight", f"{KEYS}{module}.bias") for module in saved):
            head[key.rpartition(".")[2]] = tensor
        else:
            raise InputError(f"{path}: tensor {key} is neither a LoRA factor nor the weight or bias of a head")
    _check_factors(path, adapter, config["r"])
    if (folder / HEAD_FILE).exists():
        path = folder / HEAD_FILE
        head = _tensors(path)
    if head or own.get("head_key") is not None:
        _check_head(path, head)
        head_key = str(own.get("head_key") or len(head["weight"]))
        if head_key.partition("-")[0] != str(len(head["weight"])):
            raise InputError(
                f"{path}: the head has {len(head['weight'])} outputs, but {OWN} says head_key {head_key!r}"
            )
        adapter |= {f"{HEAD}{head_key}.{part}": tensor for part, tensor in head.items()}
    return {name: tensor.numpy() for name, tensor in adapter.items()}


def _our_name(key: str, prefix: str) -> str | None:
    for ours, theirs in LORA_SUFFIXES.items():
        if key.startswith(KEYS) and key.endswith(theirs):
            return key.removeprefix(KEYS).removesuffix(theirs).removeprefix(prefix) + ours
    return None


def _config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / CONFIG)
    path = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; allowed is 'LORA'")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{path}: r is {rank!r}; expected a whole number from 1")
    for option in NOT_PLAIN:
        if config.get(option):
            raise InputError(f"{path}: {option} is {config[option]!r}; only plain LoRA factors can be read")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is {config['bias']!r}; allowed is 'none'")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise InputError(f"{path}: modules_to_save is {saved!r}; expected a list of names")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; a PEFT folder has {CONFIG} and {WEIGHTS}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file in float32, by name."""
    if not path.is_file():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (path.parent / name).exists()]
        hint = f"; {pickled[0]} is a pickle, which is never opened" if pickled else ""
        raise InputError(f"{path}: no such file{hint}")
    try:
        tensors: dict[str, Tensor] = load_safetensors(path.read_bytes())
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a safetensors file ({' '.join(str(error).split())})") from error
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            raise InputError(f"{path}: tensor {name} is {tensor.dtype}; expected floating point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise InputError(f"{path}: tensor {name} has values that are not finite")
    return {name: tensors[name].float() for name in sorted(tensors)}


def _check_factors(path: Path, adapter: dict[str, Tensor], rank: int) -> None:
    if not adapter:
        raise InputError(f"{path}: holds no LoRA factors")
    for name, tensor in adapter.items():
        module, dot, factor = name.rpartition(".")
        partner = module + (LORA_B if dot + factor == LORA_A else LORA_A)
        if partner not in adapter:
            raise InputError(f"{path}: {name} has no partner {partner}")
        shape = tuple(tensor.shape)
        expected = f"[{rank}, in]" if dot + factor == LORA_A else f"[out, {rank}]"
        axis = 0 if dot + factor == LORA_A else 1
        if len(shape) != 2 or shape[axis] != rank:
            raise InputError(f"{path}: {name} has shape {list(shape)}; expected {expected} as r is {rank}")


def _check_head(path: Path, head: dict[str, Tensor]) -> None:
    if set(head) != {"weight", "bias"}:
        raise InputError(f"{path}: a head needs weight and bias, found {', '.join(sorted(head)) or 'nothing'}")
    weight, bias = list(head["weight"].shape), list(head["bias"].shape)
    if len(weight) != 2:
        raise InputError(f"{path}: the head's weight has shape {weight}; expected [outputs, hidden]")
    if bias != weight[:1]:
        raise InputError(f"{path}: the head's bias has shape {bias}; expected {weight[:1]}")
