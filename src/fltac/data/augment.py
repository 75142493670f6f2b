"""Random views of images for training: moved a little, and mirrored.

What is drawn does not depend on an image's size or content, and is applied to a batch of any size, so that a step's
views are a fixed function of (seed, round, client, slot), whatever it shares a pass with.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

REACH = 8
"""An image is moved by up to this part of its size: 4 of 32 pixels, as is usual for CIFAR (arXiv 1512.03385)."""


@dataclass(frozen=True)
class Views:
    """What each image of a batch is seen as.

    Attributes:
        down: float64 ``[b]`` in [0, 1): 0 moves it up as far as it goes, 1/2 leaves it there.
        right: The same from left to right.
        mirrored: bool ``[b]``: left and right exchanged.
    """

    down: NDArray[np.float64]
    right: NDArray[np.float64]
    mirrored: NDArray[np.bool_]


def draw_views(steps: int, batch_size: int, mirror: bool, draw: np.random.Generator) -> list[Views]:
    """Draws the views of some batches.

    Args:
        steps: Number of batches.
        batch_size: Images in each.
        mirror: Whether a mirrored image has the same label.
        draw: The generator.
    """
    places = draw.random((steps, 2, batch_size))
    mirrored = draw.random((steps, batch_size)) < (0.5 if mirror else 0.0)
    return [Views(place[0], place[1], own) for place, own in zip(places, mirrored, strict=True)]


def seen(batch: dict[str, NDArray[Any]], views: Views) -> dict[str, NDArray[Any]]:
    """The batch with every image as its view.

    Args:
        batch: ``pixel_values`` float32 ``[b, 3, height, width]``, normalised; the gap gets 0, the mean
            colour.
        views: One for each image.
    """
    pixels = batch["pixel_values"]
    height, width = pixels.shape[2:]
    out = np.zeros_like(pixels)
    downs, rights = _shifts(views.down, height), _shifts(views.right, width)
    for image, own, down, right, mirrored in zip(pixels, out, downs, rights, views.mirrored, strict=True):
        source = image[:, :, ::-1] if mirrored else image
        rows, columns = height - abs(down), width - abs(right)
        top, left = max(down, 0), max(right, 0)
        from_top, from_left = max(-down, 0), max(-right, 0)
        own[:, top : top + rows, left : left + columns] = source[
            :, from_top : from_top + rows, from_left : from_left + columns
        ]
    return {**batch, "pixel_values": out}


def _shifts(places: NDArray[np.float64], size: int) -> list[int]:
    """Pixels to move by, each of ``-size // REACH`` to ``size // REACH`` equally likely."""
    most = size // REACH
    shifts: list[int] = (np.floor(places * (2 * most + 1)).astype(int) - most).tolist()
    return shifts
