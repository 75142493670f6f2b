"""How large a backbone's images are and how they are normalised, from its ``preprocessor_config.json``."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig
from transformers.image_processing_base import ImageProcessingMixin

from fltac.config import BackboneConfig
from fltac.errors import InputError

BILINEAR = 2
"""Pillow's number of the filter that ``transformers`` takes for vision transformers by default."""


@dataclass(frozen=True)
class Geometry:
    """From an image's size to the backbone's: resize, then cut the middle.

    Attributes:
        height: Pixels that the backbone reads.
        width: Pixels that the backbone reads.
        resize: Height and width to resize to, or the length of the shorter edge, which keeps the proportions.
        resample: Pillow's number of the filter.
    """

    height: int
    width: int
    resize: tuple[int, int] | int
    resample: int

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after resizing, before cutting."""
        if isinstance(self.resize, tuple):
            return self.resize
        shorter = min(height, width)
        return height * self.resize // shorter, width * self.resize // shorter

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the middle part."""
        return (height - self.height) // 2, (width - self.width) // 2


@dataclass(frozen=True)
class Normalisation:
    """``(pixel * scale - mean) / deviation`` by channel."""

    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def read_image_settings(config: BackboneConfig, folder: str, task: str) -> tuple[Geometry, Normalisation]:
    """Reads a backbone's image settings; without any: ``config.json`` and -1 to 1.

    Args:
        config: The ``backbone`` section.
        folder: Local folder or hub id of the pretrained model.
        task: Name of the task that needs it, for errors.

    Raises:
        InputError: nothing says how large the images must be, or they must not have three channels.
    """
    name = config.name
    options = {"revision": config.revision} if config.revision else {}
    try:
        architecture = AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"backbone.name: {name!r} could not be loaded: {reason}") from error
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(folder, **options)
    except OSError:
        settings = {}
    size = settings.get("size") or getattr(architecture, "image_size", None)
    if size is None:
        raise InputError(
            f"backbone.name: {name!r} has neither preprocessor_config.json nor an image_size, "
            f"needed by the image task {task}"
        )
    channels = getattr(architecture, "num_channels", 3)
    if channels != 3:
        raise InputError(f"backbone.name: {name!r} reads images of {channels} channels; allowed are 3")
    return _geometry(name, settings, size), _normalisation(name, settings)


def _geometry(name: str, settings: dict[str, Any], size: Any) -> Geometry:
    resample = settings.get("resample")
    resample = BILINEAR if resample is None else int(resample)
    if isinstance(size, int) and _kind(settings).startswith("CLIP"):
        size = {"shortest_edge": size}
    if isinstance(size, dict) and "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        crop = settings.get("crop_size") if settings.get("do_center_crop", True) else None
        height, width = _pair(name, crop or edge)
        return Geometry(height, width, max(edge, height, width), resample)
    resize = _pair(name, size)
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    height, width = _pair(name, crop) if crop else resize
    return Geometry(height, width, (max(resize[0], height), max(resize[1], width)), resample)


def _kind(settings: dict[str, Any]) -> str:
    return str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")


def _pair(name: str, size: Any) -> tuple[int, int]:
    """Height and width from a number, two of them, or ``{height, width}``."""
    try:
        if isinstance(size, dict):
            return int(size["height"]), int(size["width"])
        if isinstance(size, int):
            return size, size
        height, width = size
        return int(height), int(width)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"backbone.name: {name!r} wants images of size {size!r}; allowed are height and width, or shortest_edge"
        ) from error


def _normalisation(name: str, settings: dict[str, Any]) -> Normalisation:
    scale = float(settings.get("rescale_factor") or 1 / 255) if settings.get("do_rescale", True) else 1.0
    if not settings.get("do_normalize", True):
        return Normalisation(scale, (0.0,) * 3, (1.0,) * 3)
    mean = tuple(settings.get("image_mean") or (0.5,) * 3)
    deviation = tuple(settings.get("image_std") or (0.5,) * 3)
    if len(mean) != 3 or len(deviation) != 3:
        raise InputError(f"backbone.name: {name!r}: image_mean and image_std must have three numbers")
    return Normalisation(scale, mean, deviation)
