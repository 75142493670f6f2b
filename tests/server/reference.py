"""The exact kernel, from products formed in float64, against which the sketches are held."""

from collections.abc import Sequence

import numpy as np

from fltac.records import Adapter, head_keys, lora_modules


def product(tensors: Adapter, module: str) -> np.ndarray:
    return tensors[module + ".lora_B"].astype(np.float64) @ tensors[module + ".lora_A"].astype(np.float64)


def products(before: Adapter, after: Adapter) -> dict[str, np.ndarray]:
    """The change of each module's product and of each head, flat; a head that ``before`` lacks counts as zeros."""
    out = {module: (product(after, module) - product(before, module)).ravel() for module in lora_modules(after)}
    for key in head_keys(after):
        parts = [f"head.{key}.weight", f"head.{key}.bias"]
        change = [after[part].astype(np.float64) - before.get(part, np.zeros_like(after[part])) for part in parts]
        out[f"head.{key}"] = np.concatenate([part.ravel() for part in change])
    return out


def cosine(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return unit @ unit.T


def changes_of_a(before: Adapter, after: Adapter) -> dict[str, np.ndarray]:
    """As :func:`products`, but of each module's A alone."""
    out = products(before, after)
    for module in lora_modules(after):
        out[module] = (after[module + ".lora_A"].astype(np.float64) - before[module + ".lora_A"]).ravel()
    return out


def exact_kernel_of_a(changes: Sequence[dict[str, np.ndarray]], head: bool) -> np.ndarray:
    """The mean of the absolute cosines of the changes of A, plus half of that of all heads together."""
    modules = [name for name in changes[0] if not name.startswith("head.")]
    each = [np.abs(exact_kernel([{module: change[module]} for change in changes], False)) for module in modules]
    total = np.mean(each, axis=0)
    if head:
        heads = [
            {"none": np.zeros(1)} | {n: v for n, v in change.items() if n.startswith("head.")} for change in changes
        ]
        total = total + 0.5 * np.abs(exact_kernel(heads, True))
    return np.asarray(total)


def exact_kernel(changes: Sequence[dict[str, np.ndarray]], head: bool) -> np.ndarray:
    """The mean of the products' cosines, plus that of all heads together."""
    modules = [name for name in changes[0] if not name.startswith("head.")]
    total = sum(cosine(np.array([change[module] for change in changes])) for module in modules) / len(modules)
    keys = sorted({name for change in changes for name in change if name.startswith("head.")})
    if head and keys:
        sizes = {key: max(len(change.get(key, [])) for change in changes) for key in keys}
        rows = [np.concatenate([change.get(key, np.zeros(sizes[key])) for key in keys]) for change in changes]
        total = total + cosine(np.array(rows))
    return np.asarray(total)
