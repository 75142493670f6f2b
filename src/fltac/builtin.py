"""``builtin:digits-vit``: a small vision transformer, pretrained on digits at first use without a download.

It learns to name the digits of one half of scikit-learn's; the tasks lie on the other half. It is kept in the
cache as a Hugging Face folder, which is there in full or not at all.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from fltac.data.digits import pretraining_rows
from fltac.errors import InputError
from fltac.model.backbone import quiet_transformers
from fltac.paths import BUILTIN, cache_folder
from fltac.seeding import derive

DIGITS_VIT = f"{BUILTIN}digits-vit"

VERSION = 1
"""Part of the cached folder's name; to be raised when what :class:`Recipe` does not say changes."""

CLASSES = 10
SIZE = 8
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Recipe:
    """How the model is built and pretrained.

    Attributes:
        hidden: Width; the feed-forward layers have twice as much.
        layers: Number of blocks.
        heads: Attention heads of each.
        patch: Edge of a patch in pixels.
        steps: Optimizer steps.
        batch: Images of each.
        lr: Peak of the learning rate.
        weight_decay: Of AdamW.
        deviation: Of the initial weights. The usual 0.02 is for wide models; here it learns positions too slowly.
        beta2: AdamW's decay of squared gradients; a short memory for few steps.
        shifts: What a row and a column number of an augmented image is drawn from: 1 leaves it in its place.
            A quarter of the images stays whole, since too few steps are made to learn all places equally.
    """

    hidden: int = 48
    layers: int = 3
    heads: int = 4
    patch: int = 2
    steps: int = 500
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.05
    deviation: float = 0.1
    beta2: float = 0.98
    shifts: tuple[int, ...] = (0, 1, 1, 2)

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that are others for another recipe or version."""
        content = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def builtin_folder(name: str) -> Path:
    """The Hugging Face folder of a built-in backbone; pretrained now if it has not been yet.

    Processes that start together each pretrain it, and the first to finish keeps its folder.

    Args:
        name: ``builtin:digits-vit``.

    Raises:
        InputError: another name, or the cache folder cannot be written.
    """
    if name != DIGITS_VIT:
        raise InputError(f"backbone.name: got {name!r}; the only built-in one is {DIGITS_VIT}")
    recipe = Recipe()
    with _cache_errors():
        parent = cache_folder() / "builtin"
        parent.mkdir(exist_ok=True)
        folder = parent / f"{name.removeprefix(BUILTIN)}-{recipe.fingerprint}"
        if not is_finished(folder):
            _make(folder, recipe)
    return folder


def is_finished(folder: Path) -> bool:
    """Whether every file is there; a cache may have been cleaned file by file."""
    return all((folder / file).is_file() for file in FILES)


@contextmanager
def _cache_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        place = os.environ.get("FLTAC_CACHE") or "~/.cache/fltac"
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"FLTAC_CACHE: {place!r} cannot be written ({reason}); {DIGITS_VIT} needs a writable cache folder"
        ) from error


def _make(folder: Path, recipe: Recipe) -> None:
    """Pretrains and saves beside ``folder``, then moves there. A kill leaves a temporary folder at most."""
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
    try:
        # A folder that lacks a file is moved out of the way now: nothing can be moved onto it later.
        with suppress(FileNotFoundError):
            folder.rename(temporary / "broken")
        model = temporary / "model"
        model.mkdir()
        save(pretrain(recipe), model)
        _publish(model, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(made: Path, folder: Path) -> None:
    """Moves a finished folder to its place, unless another process has put one there meanwhile."""
    try:
        made.rename(folder)
    except OSError:
        if not is_finished(folder):
            raise


def image_settings(size: int) -> str:
    """A ViT's ``preprocessor_config.json``: images of ``size`` x ``size`` pixels, values from -1 to 1."""
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return json.dumps(settings, indent=2) + "\n"


def save(model: ViTModel, folder: Path) -> None:
    """Writes ``FILES`` and waits until they are on the disk, since a rename may get there before them."""
    with quiet_transformers():
        model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(image_settings(SIZE))
    for name in FILES:
        (folder / name).chmod(0o644)  # safetensors makes files that only their owner can read
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def pretrain(recipe: Recipe) -> ViTModel:
    """Trains on the identity of the digits; the same weights every time on one machine.

    Returns:
        The model without pooler and head, in eval mode. Neither the global random state of the caller nor its
        number of threads has changed.
    """
    images, digits = pretraining_rows()
    with _alone(derive(0, "digits-vit-weights")):
        model = build(recipe)
        head = nn.Linear(recipe.hidden, CLASSES)
        _train(model, head, normalised(images), torch.from_numpy(digits), recipe)
    return model.eval()


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """Within: one thread, the CPU, gradients, and a random state of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads are rounded otherwise
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs as well
            yield
    finally:
        torch.set_num_threads(threads)


def build(recipe: Recipe) -> ViTModel:
    """The model with random weights."""
    config = ViTConfig(
        image_size=SIZE,
        patch_size=recipe.patch,
        num_channels=3,
        hidden_size=recipe.hidden,
        intermediate_size=2 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        initializer_range=recipe.deviation,
    )
    return ViTModel(config, add_pooling_layer=False)


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """Greyscale as ``preprocessor_config.json`` says: float32 ``[n, 8, 8]`` from -1 to 1."""
    return torch.from_numpy(images).float() / 127.5 - 1


def as_input(images: Tensor) -> Tensor:
    """``[n, 8, 8]`` as ``pixel_values`` ``[n, 3, 8, 8]``: grey in all channels."""
    return images.unsqueeze(1).expand(-1, 3, -1, -1)


def _train(model: ViTModel, head: nn.Linear, images: Tensor, digits: Tensor, recipe: Recipe) -> None:
    """AdamW with a rise and a cosine fall of the learning rate.

    Args:
        model: Changed in place.
        head: Linear, changed in place.
        images: float32 ``[n, 8, 8]``.
        digits: int64 ``[n]``.
        recipe: Steps and rates.
    """
    draws = torch.Generator().manual_seed(derive(0, "digits-vit-batches"))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, recipe.lr, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    moved = all_shifts(images)
    shifts = torch.tensor(recipe.shifts)
    model.train()
    for _ in range(recipe.steps):
        rows = torch.randint(len(images), (recipe.batch,), generator=draws)
        down, right = shifts[torch.randint(len(shifts), (2, recipe.batch), generator=draws)]
        pixels = as_input(moved[rows, down, right])
        states = model(pixel_values=pixels).last_hidden_state
        loss = F.cross_entropy(head(states[:, 0]), digits[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def all_shifts(images: Tensor) -> Tensor:
    """Every image moved by up to one pixel, with black moving in.

    Args:
        images: ``[n, height, width]`` with black as -1.

    Returns:
        ``[n, 3, 3, height, width]``, a view; ``[:, 1, 1]`` are the images as they are.
    """
    height, width = images.shape[1:]
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    return padded.unfold(1, height, 1).unfold(2, width, 1)
