"""Finds the linear layers of a backbone that get low-rank adapters, and their shapes.

A layer is adaptable if it is an ``nn.Linear``, the transposed ``Conv1D`` of GPT-2, or anything else (a
quantized linear) with a weight, ``in_features`` and ``out_features``. LoRA's usual choice is the query and
value projections (arXiv 2106.09685, section 4.2).
"""

import re
from collections.abc import Iterable, Sequence

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from fltac.errors import InputError

QUERY_OR_VALUE = re.compile(
    r"(projection_|to_|attn_|w_?)?(q|query|v|value|kv|key_value|qv|qkv|query_key_value)(_?(proj|lin|linear|head))?"
    r"|c_attn|in_proj(_qkv)?|queries_keys_values|w_pack",
    re.IGNORECASE,
)
"""Last path component of a projection that makes queries or values, alone or fused with others."""

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def find_targets(model: nn.Module, targets: Sequence[str] | None, layers: Sequence[int] | None) -> list[str]:
    """Chooses the modules to adapt.

    Args:
        model: The backbone, without adapters.
        targets: Names matched at the end of a module's path, as PEFT does; None: PEFT's table for the
            architecture, or, where that has nothing, the query and value projections of its attention blocks.
        layers: Indices of the layers to adapt: the first number in a module's path; None: all.

    Returns:
        The modules' full paths, in the model's order, each once.

    Raises:
        InputError: a target matches no linear layer, no target can be found, or a layer does not exist.
    """
    linear = linear_layers(model)
    found = _named(model, linear, targets) if targets is not None else _usual(model, linear)
    return found if layers is None else _in_layers(model, found, layers)


def layer_shapes(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Returns ``{path: (in_features, out_features)}`` in the order of ``paths``."""
    return {path: _shape(model.get_submodule(path)) for path in paths}


def linear_layers(model: nn.Module) -> list[str]:
    """The paths of all adaptable layers, in the model's order."""
    return [path for path, module in model.named_modules() if path and _adaptable(module)]


def matches(path: str, target: str) -> bool:
    """PEFT's rule for target modules: the whole path, or its end from a dot on."""
    return path == target or path.endswith("." + target)


def _adaptable(module: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weight of its output projection and never calls the layer.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if isinstance(module, nn.Linear | Conv1D):
        return True
    return all(hasattr(module, name) for name in ("in_features", "out_features", "weight"))


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape  # stored transposed
        return int(inputs), int(outputs)
    assert isinstance(module.in_features, int)
    assert isinstance(module.out_features, int)
    return module.in_features, module.out_features


def _named(model: nn.Module, linear: list[str], targets: Sequence[str]) -> list[str]:
    if not targets:
        raise InputError(f"lora.targets: the list is empty; candidates are {_candidates(linear)}")
    for target in targets:
        if not any(matches(path, target) for path in linear):
            raise InputError(
                f"lora.targets: {target!r} matches no linear layer of {type(model).__name__}; "
                f"candidates are {_candidates(linear)}"
            )
    return [path for path in linear if any(matches(path, target) for target in targets)]


def _usual(model: nn.Module, linear: list[str]) -> list[str]:
    found = _from_table(model, linear) or [path for path in linear if _is_projection(model, path)]
    if not found:
        raise InputError(
            f"lora.targets: no query and value projections found in {type(model).__name__}; "
            f"set lora.targets; candidates are {_candidates(linear)}"
        )
    return found


def _from_table(model: nn.Module, linear: list[str]) -> list[str]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    entry = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, [])
    if isinstance(entry, str):  # a regular expression
        return [path for path in linear if re.fullmatch(entry, path)]
    return [path for path in linear if any(matches(path, target) for target in entry)]


def _is_projection(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    inside = ATTENTION.search(parent) or ATTENTION.search(type(model.get_submodule(parent)).__name__)
    return bool(inside and QUERY_OR_VALUE.fullmatch(name))


def _in_layers(model: nn.Module, found: list[str], layers: Sequence[int]) -> list[str]:
    index = {path: number for path in found if (number := _layer(path)) is not None}
    if not index:
        raise InputError(
            f"lora.layers: {list(layers)} cannot be chosen, as the targets in {type(model).__name__} "
            "are not in numbered layers; allowed is null"
        )
    there = sorted(set(index.values()))
    contiguous = there == list(range(there[0], there[-1] + 1))
    allowed = f"{there[0]} to {there[-1]}" if contiguous else ", ".join(map(str, there))
    if not layers:
        raise InputError(f"lora.layers: the list is empty; allowed are {allowed}, or null for all")
    for layer in layers:
        if layer not in there:
            raise InputError(
                f"lora.layers: {layer} is no layer with targets in {type(model).__name__}; allowed are {allowed}"
            )
    return [path for path in found if index.get(path) in layers]


def _layer(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _candidates(linear: list[str]) -> str:
    names = dict.fromkeys(path.rpartition(".")[2] for path in linear)
    return ", ".join(names) or "none: the model has no linear layers"
