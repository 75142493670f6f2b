"""How a backbone is run on this machine: precision, packing, shortcuts, and how large a pass may be."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from fltac.client.schedule import POOL, LanePlan
from fltac.config import Config, TrainingConfig
from fltac.data.encoded import EncodedTask, Split
from fltac.errors import InputError
from fltac.model.attention import use_own_attention
from fltac.model.backbone import Backbone
from fltac.model.causal import reads_ahead
from fltac.model.lanes import LaneModel
from fltac.model.packed_pass import first_position
from fltac.model.trial import FAILURES, keeps_lanes_apart, take_shortcuts

TOKENS_PER_PASS = {"cpu": 1536, "mps": 4096, "cuda": 16384}
"""What ``training.lanes: auto`` fills a pass up to at most; more is not faster there."""
MOST_TOKENS, OPERATIONS_PER_PASS = 65536, 1e13
"""On a GPU a pass of a small backbone with fewer operations ends before its many small kernels are launched, so that
it gets more tokens, up to so many."""

SHARE_OF_MEMORY = 0.5
"""Of the memory that is free at the start, what the activations of a pass may take."""

NO_LIMIT = 2**62

# Read when torch multiplies for the first time. Passes of packed rows have ever new shapes, and each shape's compiled
# product stays in memory; the default, 1024, grew to more than a gigabyte.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def try_backbone(model: LaneModel, task: EncodedTask, config: Config) -> None:
    """Tries a backbone in float32 on a few rows of a task, sets what it can take, and puts it into its precision.

    Raises:
        InputError: it cannot be run; rows of different lanes mix in it and ``training.lanes`` is not 1; or
            ``training.packing`` asks for packed rows and it cannot take them.
    """
    training, backbone = config.training, model.backbone
    use_own_attention(backbone.model)
    few = some_rows(task.train)
    longest = int(task.train.lengths[few].max())
    lanes = [task.train.batch(few[[end]], longest) for end in (0, -1)]
    name = f"backbone.name: {config.backbone.name!r} ({type(backbone.model).__name__})"
    adapted = bool(model.layers)
    try:
        model.features(model.stack([task.train.batch(few)]), 0)
        ahead = backbone.kind == "causal-lm" and reads_ahead(backbone, task.train.batch(few))
        apart = not adapted or keeps_lanes_apart(model, lanes)
        if training.packing is True or (training.packing == "auto" and backbone.device.type == "cpu"):
            model.first_position = first_position(backbone, task.train.batch(few))
            apart = apart and (not adapted or keeps_lanes_apart(model, lanes))
        if adapted:
            take_shortcuts(model, lanes)
    except FAILURES as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{name} cannot be run on rows of the task {task.name}: {reason}") from error
    if ahead:
        raise InputError(f"{name} sees the tokens that it is to predict: it is no causal language model")
    if not apart and training.lanes != 1:
        raise InputError(f"{name} mixes the rows of different adapters in a pass; set training.lanes=1")
    if training.packing is True and not model.packs:
        raise InputError(f"training.packing: true, but {name} cannot be run on packed rows; allowed are auto, false")
    backbone.model.to(choose_precision(training, backbone.device))


def some_rows(split: Split) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Up to four rows of a split, from its shortest to its longest."""
    order = np.argsort(split.lengths, kind="stable")
    return order[np.unique(np.linspace(0, len(order) - 1, 4, dtype=np.int64))]


def admit_to_prefix(model: LaneModel, visits: Iterable[tuple[Split, int]], budget: int) -> None:
    """Decides which splits' rows are kept as they come out of the frozen layers, the smallest first.

    A fixed decision before the first pass: what is kept changes rounding.

    Args:
        model: With its prefix, if it has one.
        visits: Splits that are read, each with the most rows that a run reads of it.
        budget: Bytes for all that is kept.
    """
    if model.prefix is None:
        return
    width = model.backbone.hidden * model.backbone.model.dtype.itemsize
    tokens = _tokens_per_length(model.backbone)
    sizes = {
        split.fingerprint: (min(rows, len(split)) * float(split.lengths.mean()) * tokens * width, split.fingerprint)
        for split, rows in visits
    }
    for size, name in sorted(sizes.values()):
        if size > budget:
            break
        budget -= int(size)
        model.prefix.admitted.add(name)


def available_cores() -> int:
    """CPU cores that this process may use: what ``OMP_NUM_THREADS`` says, else all that it may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_precision(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the device multiplies it faster than float32, else float32."""
    if config.precision != "auto":
        return PRECISIONS[config.precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16 (AVX512-BF16 or AMX)."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8", errors="replace").split()) if info.is_file() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def choose_plan(config: TrainingConfig, model: LaneModel, task: EncodedTask, threads: int) -> LanePlan:
    """How large a pass may be, and how many run side by side; full fine-tuning has the backbone for itself.

    With ``training.lanes: auto`` as many tokens as are fast on the device, or as their activations fit into memory,
    which is measured on a small pass.

    Args:
        config: The ``training`` section.
        model: The backbone with its lanes, as it will be used.
        task: Gives rows for the measurement.
        threads: Of the processor.
    """
    if config.trainable == "all":
        return LanePlan(1, NO_LIMIT, model.packs)
    device, width = model.backbone.device, _tokens_per_length(model.backbone)
    fits = SHARE_OF_MEMORY * free_memory(device) / bytes_per_token(model, task)
    batch = config.batch_size * int(task.train.lengths.max()) * width
    if config.lanes == "auto":
        tokens = max(1, int(min(fast_tokens(model.backbone), fits)))
        needed = max(tokens, batch)
    else:
        tokens, needed = NO_LIMIT, config.lanes * batch
    workers = max(1, min(threads, int(fits / needed))) if device.type == "cpu" else 1
    lanes = POOL if config.lanes == "auto" else config.lanes
    return LanePlan(lanes, max(1, tokens // width), model.packs, workers)


def fast_tokens(backbone: Backbone) -> int:
    """Tokens of a pass past which more are not faster.

    Each parameter takes about four operations for a token, forward and backward through the activations. Not so many
    of a causal language model, whose logits take more memory than a small pass shows.
    """
    usual = TOKENS_PER_PASS[backbone.device.type]
    if backbone.device.type != "cuda" or backbone.kind == "causal-lm":
        return usual
    return max(usual, min(MOST_TOKENS, int(OPERATIONS_PER_PASS / (4 * max(1, backbone.model.num_parameters())))))


def bytes_per_token(model: LaneModel, task: EncodedTask) -> float:
    """Bytes that a training pass keeps for its way back, for each token, measured on a task's longest row."""
    few = some_rows(task.train)[-1:]  # the longest: attention keeps more for each token of a long row
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    frozen = {parameter.untyped_storage().data_ptr() for parameter in model.backbone.model.parameters()}
    model.load([{name: np.zeros(shape, dtype=np.float32) for name, shape in model.body_shapes.items()}])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.features(model.stack([task.train.batch(few)]), 1)
    lengths = task.train.lengths[few]
    tokens = int(lengths.sum() if model.packs else len(few) * lengths.max()) * _tokens_per_length(model.backbone)
    return max(1.0, sum(size for place, size in kept.items() if place not in frozen) / tokens)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now; a generous guess where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 2**33)
    group = Path("/sys/fs/cgroup")
    allowed, used = (
        file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        for file in (group / "memory.max", group / "memory.current")
    )
    return min(free, max(0, int(allowed) - int(used))) if allowed.isdecimal() and used.isdecimal() else free


def _tokens_per_length(backbone: Backbone) -> int:
    """What one unit of a row's length is in the backbone: a token of text, all patches of an image."""
    config = backbone.model.config
    if backbone.kind != "image":
        return 1
    patch = getattr(config, "patch_size", None) or 16
    size = getattr(config, "image_size", None) or 224
    (height, width), (rows, columns) = _pair(size), _pair(patch)
    return (height // rows) * (width // columns) + 1


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
