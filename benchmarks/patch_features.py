"""Features of images that are learned without labels and without a network: soft-thresholded patch words.

A dictionary of whitened 6 x 6 patches is learned by K-means on the sphere; an image is described by how strongly each
word answers, averaged over the cells of a grid (Coates and Ng 2011, "The importance of encoding versus training with
sparse coding and vector quantization"). They are what ``pretrain_vit.py`` lets a transformer predict.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

EDGE = 6
"""Of a patch, in pixels."""
STRIDE = 2
"""Pixels from one patch to the next when an image is described."""
CONTRAST = 10.0
"""Added to a patch's variance, in levels squared, so that flat patches are not blown up to noise."""
GRID = 4
"""Cells along an edge of an image."""
WHOLE, CELL = 192, 64
"""Components of a whole image's and of a cell's features."""
RIDGE = 0.1
"""Added to the eigenvalues of normalised patches before whitening."""


@dataclass(frozen=True)
class Dictionary:
    """How a patch becomes answers: normalised, whitened, multiplied by the words.

    Attributes:
        mean: ``[108]`` of normalised patches.
        filters: ``[108, words]``: whitening and words in one matrix.
        threshold: What an answer must exceed; the rest is what is kept.
    """

    mean: Tensor
    filters: Tensor
    threshold: float


def learn_dictionary(
    images: NDArray[np.uint8], words: int, threshold: float, patches: int, rounds: int, draw: np.random.Generator
) -> Dictionary:
    """Learns the words from random patches.

    Args:
        images: ``[n, height, width, 3]``.
        words: How many.
        threshold: See :class:`Dictionary`.
        patches: How many patches to learn from.
        rounds: Of K-means.
        draw: Chooses patches and first words.
    """
    height, width = images.shape[1:3]
    row = draw.integers(len(images), size=patches)
    top = draw.integers(height - EDGE + 1, size=patches)
    left = draw.integers(width - EDGE + 1, size=patches)
    cut = np.stack([images[i, y : y + EDGE, x : x + EDGE] for i, y, x in zip(row, top, left, strict=True)])
    flat = _normalised(torch.from_numpy(cut).permute(0, 3, 1, 2).reshape(patches, -1).float())
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / patches)
    whitening = vectors @ torch.diag((values + RIDGE).rsqrt()) @ vectors.T
    points = F.normalize((flat - mean) @ whitening)
    centres = points[torch.from_numpy(draw.choice(patches, words, replace=False))]
    for _ in range(rounds):
        best, nearest = (points @ centres.T).max(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points * best[:, None])
        empty = sums.norm(dim=1) == 0
        sums[empty] = points[torch.from_numpy(draw.choice(patches, int(empty.sum()), replace=False))]
        centres = F.normalize(sums)
    return Dictionary(mean, whitening @ centres.T, threshold)


def cell_features(images: NDArray[np.uint8], dictionary: Dictionary, grid: int, batch: int = 50) -> Iterator[Tensor]:
    """Answers of all words averaged over the cells of a grid.

    Args:
        images: ``[n, height, width, 3]``.
        dictionary: The words.
        grid: Cells along each edge.
        batch: Images at a time.

    Yields:
        float32 ``[b, grid * grid, words]``.
    """
    height, width = ((edge - EDGE) // STRIDE + 1 for edge in images.shape[1:3])
    average = torch.einsum("ay,bx->abyx", _cells(height, grid), _cells(width, grid)).reshape(grid * grid, -1)
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).float()
        flat = _normalised(F.unfold(pixels, EDGE, stride=STRIDE).transpose(1, 2).reshape(-1, dictionary.mean.numel()))
        answers = (flat - dictionary.mean) @ dictionary.filters
        answers = answers.sub_(dictionary.threshold).clamp_min_(0)
        yield average @ answers.reshape(len(pixels), height * width, -1)


@dataclass(frozen=True)
class Targets:
    """What is to be predicted, with mean 0 and variance 1 on the whole; early components vary more.

    Attributes:
        whole: float16 ``[n, components]`` of the image by quarters.
        cells: float16 ``[n, 16, components]`` of each cell.
    """

    whole: Tensor
    cells: Tensor


def make_targets(
    images: NDArray[np.uint8], dictionary: Dictionary, draw: np.random.Generator, sample: int = 4000
) -> Targets:
    """Describes all images by the principal components of a sample's features.

    Args:
        images: ``[n, height, width, 3]``.
        dictionary: The words.
        draw: Chooses the sample.
        sample: Images in it.
    """
    rows = np.sort(draw.choice(len(images), min(sample, len(images)), replace=False))
    some = torch.cat([part.sqrt() for part in cell_features(images[rows], dictionary, GRID)])
    into_whole = _components(_quarters(some), WHOLE)
    into_cells = _components(some.reshape(-1, some.shape[-1]), CELL)
    whole = torch.empty(len(images), WHOLE, dtype=torch.float16)
    cells = torch.empty(len(images), GRID**2, CELL, dtype=torch.float16)
    done = 0
    for part in cell_features(images, dictionary, GRID):
        own = slice(done, done + len(part))
        roots = part.sqrt()
        whole[own] = (_quarters(roots) - into_whole[0]) @ into_whole[1]
        cells[own] = (roots - into_cells[0]) @ into_cells[1]
        done += len(part)
    return Targets(whole, cells)


def _quarters(cells: Tensor) -> Tensor:
    """``[n, 16, words]`` to ``[n, 4 * words]``: means of 2 x 2 cells."""
    half = GRID // 2
    return cells.reshape(len(cells), 2, half, 2, half, -1).mean(dim=(2, 4)).flatten(1)


def _components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean ``[d]`` and ``[d, count]``: the first principal components, each by the root of its deviation."""
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, vectors = values[-count:], vectors[:, -count:]
    return mean, vectors * values.pow(-0.25) / values.sqrt().mean().sqrt()


def _cells(length: int, grid: int) -> Tensor:
    """``[grid, length]``: weights of positions in each cell, which sum to 1."""
    return F.adaptive_avg_pool1d(torch.eye(length), grid).T


def _normalised(flat: Tensor) -> Tensor:
    """Patches ``[n, 108]`` with mean 0 and variance about 1."""
    flat = flat - flat.mean(dim=1, keepdim=True)
    return flat / (flat.square().mean(dim=1, keepdim=True) + CONTRAST).sqrt()
