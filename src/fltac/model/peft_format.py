"""Adapters as ordinary PEFT folders, with their head, written in one piece and read back with checks.

A folder holds ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md`` and ``fltac.json`` (the
head's key and what module paths got in front). The head is one of PEFT's ``modules_to_save`` where the
architecture's own classification class computes the same as here; otherwise it lies beside as
``head.safetensors``.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from torch import nn
from transformers.pytorch_utils import Conv1D

from fltac.config import LoraConfig
from fltac.errors import InputError
from fltac.model.backbone import Backbone
from fltac.model.model_card import CardFacts, model_card
from fltac.model.native import NativeHead, native_head
from fltac.model.peft_import import (
    CONFIG,
    HEAD_FILE,
    KEYS,
    LORA_SUFFIXES,
    OWN,
    WEIGHTS,
    import_adapter,
)
from fltac.model.targets import layer_shapes, linear_layers, matches
from fltac.records import HEAD, Adapter, FloatArray, head_keys

__all__ = ["CardFacts", "export_adapter", "import_adapter"]


def export_adapter(
    folder: Path,
    adapter: Adapter,
    head_key: str | None,
    backbone: Backbone,
    lora: LoraConfig,
    targets: Sequence[str],
    card: CardFacts,
) -> None:
    """Writes one adapter with one head as a folder that ``PeftModel.from_pretrained`` loads.

    Args:
        folder: Written in one piece; an adapter folder that is there already is replaced.
        adapter: The factors of all targets, and any number of heads.
        head_key: Which head goes along; None where there is one or none.
        backbone: The base model, without adapters in it.
        lora: Rank and scale.
        targets: Paths of the adapted modules.
        card: For the model card.

    Raises:
        InputError: the adapter does not fit the targets, the rank or the backbone, has no such head, or
            ``folder`` is something else than an adapter folder.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file())):
        raise InputError(f"{folder}: exists and is no adapter folder; allowed are a new or an empty folder")
    key = _chosen_head(adapter, head_key)
    weight = None if key is None else adapter[f"{HEAD}{key}.weight"]
    outputs = None if weight is None else len(weight)
    _check(adapter, key, backbone, lora, targets)
    native = None if outputs is None else native_head(backbone, outputs)
    tensors = {
        f"{KEYS}{native.prefix if native else ''}{path}{theirs}": adapter[path + ours]
        for path in targets
        for ours, theirs in LORA_SUFFIXES.items()
    }
    head = {} if key is None else {part: adapter[f"{HEAD}{key}.{part}"] for part in ("weight", "bias")}
    files = {}
    if native:
        tensors |= {f"{KEYS}{native.linear}.{part}": tensor for part, tensor in head.items()}
    elif head:
        files[HEAD_FILE] = _safetensors(head)
    own = {"head_key": key, "prefix": native.prefix if native else ""}
    modules = f"rank {lora.rank}, alpha {lora.alpha:g}, {'rsLoRA, ' if lora.rslora else ''}{len(targets)} modules"
    files |= {
        WEIGHTS: _safetensors(tensors),
        OWN: _json(own),
        "README.md": model_card(backbone, native, outputs, card, f"LoRA: {modules}").encode(),
        CONFIG: _json(_peft_config(backbone, lora, targets, native)),
    }
    _write_folder(folder, files)


def _chosen_head(adapter: Adapter, head_key: str | None) -> str | None:
    keys = head_keys(adapter)
    if head_key is None and len(keys) <= 1:
        return keys[0] if keys else None
    if head_key not in keys:
        raise InputError(f"head key: got {head_key!r}; the adapter has the heads {', '.join(keys) or 'none'}")
    return head_key


def _check(adapter: Adapter, key: str | None, backbone: Backbone, lora: LoraConfig, targets: Sequence[str]) -> None:
    there = set(linear_layers(backbone.model))
    missing = [path for path in targets if path not in there]
    if missing:
        raise InputError(f"adapter: {missing[0]!r} is no linear layer of {type(backbone.model).__name__}")
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (inputs, outputs) in layer_shapes(backbone.model, targets).items():
        shapes[f"{path}.lora_A"] = (lora.rank, inputs)
        shapes[f"{path}.lora_B"] = (outputs, lora.rank)
    if key is not None:
        outputs = adapter[f"{HEAD}{key}.weight"].shape[0]
        shapes[f"{HEAD}{key}.weight"] = (outputs, backbone.hidden)
        shapes[f"{HEAD}{key}.bias"] = (outputs,)
    for name, shape in shapes.items():
        got = adapter[name].shape if name in adapter else None
        if got != shape:
            raise InputError(f"adapter tensor {name}: got shape {got}; expected {shape}")
    extra = [name for name in adapter if name not in shapes and not name.startswith(HEAD)]
    if extra:
        raise InputError(f"adapter tensor {extra[0]}: is of none of the {len(targets)} targets")


def _peft_config(
    backbone: Backbone, lora: LoraConfig, targets: Sequence[str], native: NativeHead | None
) -> dict[str, object]:
    task_type = None if backbone.kind == "image" else "SEQ_CLS" if native else "FEATURE_EXTRACTION"
    task_type = "CAUSAL_LM" if backbone.kind == "causal-lm" else task_type
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": backbone.name,
        "revision": backbone.revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": all(isinstance(backbone.model.get_submodule(path), Conv1D) for path in targets),
        "target_modules": _target_modules(backbone.model, targets, native),
        "modules_to_save": [native.linear] if native else None,
    }


def _target_modules(model: nn.Module, targets: Sequence[str], native: NativeHead | None) -> list[str] | str:
    """The full paths, or a regular expression where one of them is also the end of another module's path."""
    chosen = set(targets)
    ends = [path for path, _ in model.named_modules() if any(matches(path, target) for target in targets)]
    if set(ends) == chosen:
        return list(targets)
    prefix = re.escape(native.prefix) if native else ""
    return f"{prefix}({'|'.join(re.escape(path) for path in targets)})"


def _safetensors(tensors: Mapping[str, FloatArray]) -> bytes:
    arrays = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    return save(arrays, metadata={"format": "pt"})  # type: ignore[no-any-return]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """The folder appears in one piece; one that was there before is moved aside first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        for name, data in files.items():
            with (new / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(temporary)
