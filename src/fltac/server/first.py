"""What a federation begins from: v0, and for the rule ``ifca`` one adapter for each cluster."""

from collections.abc import Mapping

import numpy as np

from fltac.config import ServerSettings
from fltac.records import LORA_A, LORA_B, Cluster, FloatArray
from fltac.seeding import generator

HEAD_DEVIATION = 0.02
"""Of a head's first weights, as transformers draws a classifier's."""


def first_head(key: str, shape: tuple[int, int], draw: np.random.Generator) -> dict[str, FloatArray]:
    """A head's first tensors: weights from N(0, 0.02^2), biases zero.

    Args:
        key: The head key.
        shape: (outputs, hidden).
        draw: Where the weights come from.
    """
    return {
        f"head.{key}.weight": draw.normal(0.0, HEAD_DEVIATION, shape).astype(np.float32),
        f"head.{key}.bias": np.zeros(shape[0], dtype=np.float32),
    }


def first_factors(
    shapes: Mapping[str, tuple[int, ...]], draw: np.random.Generator, spread: float = 0.0
) -> dict[str, FloatArray]:
    """A body's first tensors: A from U(-1/sqrt(in), 1/sqrt(in)) as PEFT draws it, B from N(0, spread^2), the rest zero.

    Args:
        shapes: Name to shape of all tensors that are not heads.
        draw: Where the numbers come from.
        spread: Standard deviation of B; with 0 the body changes nothing.
    """
    out: dict[str, FloatArray] = {}
    for name, shape in shapes.items():
        bound = shape[-1] ** -0.5
        value = np.zeros(shape)
        if name.endswith(LORA_A):
            value = draw.uniform(-bound, bound, shape)
        elif name.endswith(LORA_B) and spread > 0:
            value = draw.normal(0.0, spread, shape)
        out[name] = value.astype(np.float32)
    return out


def first_adapter(
    body_shapes: Mapping[str, tuple[int, ...]],
    head_shapes: Mapping[str, tuple[int, int]],
    draw: np.random.Generator,
    spread: float = 0.0,
) -> dict[str, FloatArray]:
    """An adapter before any training: :func:`first_factors`, and a :func:`first_head` for each head key.

    Args:
        body_shapes: Name to shape of all adapter tensors that are not heads.
        head_shapes: Head key to (outputs, hidden).
        draw: Where its numbers come from.
        spread: Standard deviation of B.
    """
    out = first_factors(body_shapes, draw, spread)
    for key, shape in head_shapes.items():
        out |= first_head(key, shape, draw)
    return out


def first_clusters(
    settings: ServerSettings,
    body_shapes: Mapping[str, tuple[int, ...]],
    head_shapes: Mapping[str, tuple[int, int]],
) -> tuple[Cluster, ...]:
    """The K random models that IFCA (arXiv 2006.04088) begins with, without members.

    Each is drawn by itself: A, B and all heads. With B = 0, as v0 has it, the K bodies would be one function, and only
    the heads would tell them apart; so B gets a small spread (``server.clustering.spread``).
    """
    assert settings.k is not None, "the rule 'ifca' needs K"
    return tuple(
        Cluster(
            number,
            first_adapter(
                body_shapes,
                head_shapes,
                generator(settings.seed, "first-cluster", slot=number),
                settings.clustering.spread,
            ),
            (),
        )
        for number in range(settings.k)
    )
