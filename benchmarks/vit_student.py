"""A small vision transformer that learns to predict features of the image that it reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

SIZE = 32
PATCH = 4
SIDE = SIZE // PATCH
"""Tokens along an edge."""
RIDGE = 0.01
"""Added to the eigenvalues of pixel patches, so that the first layer does not blow up JPEG noise."""


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates.

    Attributes:
        hidden: Width.
        feed_forward: Width of the layers between two attentions.
        layers: Blocks.
        shallow: Steps in which only the first two blocks run, which learn what is local at a third of the price; those
            above begin as small random changes of their output.
        heads: Attention heads of each.
        batch: Images of a step.
        lr: Peak rate of AdamW, for vectors, embeddings and the layers that are thrown away.
        matrix_lr: Peak rate of Muon, for the blocks' matrices.
        weight_decay: Of both.
        warmup: Steps in which the rates rise.
        decay: Share of all steps, the last, in which they fall in a line to zero. Before, nothing depends on how
            many steps there will be.
    """

    hidden: int = 192
    feed_forward: int = 384
    layers: int = 6
    shallow: int = 400
    heads: int = 6
    batch: int = 64
    lr: float = 2e-3
    matrix_lr: float = 4e-3
    weight_decay: float = 0.02
    warmup: int = 60
    decay: float = 0.35


class Student(nn.Module):
    """The transformer and the linear layers that read targets from its last states; those are thrown away.

    The first token, the mean of all others and the means of the others in each cell have a layer each.
    """

    def __init__(self, recipe: Recipe, whole: int, cell: int) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=SIZE,
            patch_size=PATCH,
            num_channels=3,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.first = nn.Linear(recipe.hidden, whole)
        self.mean = nn.Linear(recipe.hidden, whole)
        self.cell = nn.Linear(recipe.hidden, cell)

    def states(self, pixels: Tensor, depth: int) -> Tensor:
        """Last states ``[b, 65, hidden]`` of the first ``depth`` blocks on ``pixels`` ``[b, 3, 32, 32]``."""
        states: Tensor = self.vit.embeddings(pixels)
        for layer in self.vit.layers[:depth]:
            states = layer(states)
        return self.vit.layernorm(states)

    def loss(self, pixels: Tensor, whole: Tensor, cells: Tensor, depth: int) -> Tensor:
        """Sum of three mean squared errors, each 1 for who always answers the mean.

        Args:
            pixels: ``[b, 3, 32, 32]``.
            whole: Target ``[b, whole]`` of the image.
            cells: Targets ``[b, grid * grid, cell]`` of the cells of a grid that divides that of the tokens.
            depth: Blocks to run.
        """
        states = self.states(pixels, depth)
        grid = round(cells.shape[1] ** 0.5)
        tokens = states[:, 1:].transpose(1, 2).reshape(len(pixels), -1, SIDE, SIDE)
        local = F.avg_pool2d(tokens, SIDE // grid).flatten(2).transpose(1, 2)
        from_first = F.mse_loss(self.first(states[:, 0]).float(), whole)
        from_mean = F.mse_loss(self.mean(local.mean(dim=1)).float(), whole)
        return from_first + from_mean + F.mse_loss(self.cell(local).float(), cells)


def build(recipe: Recipe, whole: int, cell: int, images: NDArray[np.uint8]) -> Student:
    """A student with random weights that begins by looking at neighbours.

    Its first layer whitens patches; positions are waves; keys are queries, so that a token attends to those that are
    like it, in place above all.

    Args:
        recipe: Sizes.
        whole: Numbers of an image's target.
        cell: Numbers of a cell's target.
        images: uint8 ``[n, 32, 32, 3]``, some of those to be learned from.
    """
    student = Student(recipe, whole, cell)
    cut = F.unfold(as_pixels(images), PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2)
    mean = cut.mean(0)
    values, vectors = torch.linalg.eigh((cut - mean).T @ (cut - mean) / len(cut))
    whitening = torch.diag((values + RIDGE).rsqrt()) @ vectors.T
    weight = nn.init.orthogonal_(torch.empty(recipe.hidden, len(mean))) @ whitening
    embeddings = student.vit.embeddings
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight.copy_(weight.reshape(recipe.hidden, 3, PATCH, PATCH))
        embeddings.patch_embeddings.projection.bias.copy_(-weight @ mean)
        embeddings.position_embeddings[0, 1:].copy_(_waves(recipe.hidden))
        parameters = dict(student.vit.named_parameters())
        for name, query in parameters.items():
            if name.endswith("query.weight") or name.endswith("q_proj.weight"):
                nn.init.normal_(query, std=recipe.hidden**-0.5)
                parameters[name.replace("query", "key").replace("q_proj", "k_proj")].copy_(query)
    return student


def as_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 ``[b, 32, 32, 3]`` as float32 ``[b, 3, 32, 32]`` from -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def optimizers(student: Student, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices = [value for name, value in student.vit.named_parameters() if "layer" in name and value.ndim == 2]
    known = {id(value) for value in matrices}
    others = [value for value in student.parameters() if id(value) not in known]
    decay = recipe.weight_decay
    return [
        torch.optim.AdamW(others, recipe.lr, betas=(0.9, 0.98), weight_decay=decay, fused=True),
        torch.optim.Muon(matrices, recipe.matrix_lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
    ]


def set_rates(chosen: Sequence[torch.optim.Optimizer], recipe: Recipe, step: int, steps: int) -> None:
    """Sets the rates of a step, counted from 0, of so many."""
    factor = min(1.0, (step + 1) / recipe.warmup, (steps - step) / (recipe.decay * steps))
    for optimizer, peak in zip(chosen, (recipe.lr, recipe.matrix_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor


@torch.no_grad()
def features(student: Student, images: NDArray[np.uint8], batch: int = 250) -> tuple[Tensor, Tensor]:
    """The first token and the mean of the others, each float32 ``[n, hidden]``."""
    states = [
        student.vit(pixel_values=as_pixels(images[start : start + batch])).last_hidden_state
        for start in range(0, len(images), batch)
    ]
    return torch.cat([part[:, 0] for part in states]), torch.cat([part[:, 1:].mean(dim=1) for part in states])


def _waves(hidden: int) -> Tensor:
    """``[64, hidden]``: sines and cosines of row and column numbers."""
    place = torch.arange(SIDE, dtype=torch.float32)
    speed = torch.pi / SIDE * 8 ** (torch.arange(hidden // 4) / (hidden // 4))
    angle = place[:, None] * speed
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.cat([line.repeat_interleave(SIDE, 0), line.repeat(SIDE, 1)], dim=1)
