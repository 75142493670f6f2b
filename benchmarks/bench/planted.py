"""Uploads with known groups, as hard to tell apart as real adapters after one round.

Rank 1 on query and value of a 12-layer encoder of width 768 and a 2-way head. All slots start from the same A and from
B = 0, so that A is nearly common and B carries the change, as in training. The cosines of the changes of ``B A`` are
those measured between adapters of the GLUE tasks on MiniLM: two slots of one task .113, two slots of one client .080,
neither .038; and of the heads' changes .147, .014 and .002. Each slot also has gradients of A, whose leading direction
is as alike as the changes of ``B A`` are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fltac.config import GRADIENT_DIRECTIONS
from fltac.records import LORA_A, LORA_B, Adapter, Reply, Update

LAYERS, WIDTH, OUTPUTS, TASKS = 12, 768, 2, 5
MODULES = tuple(sorted(f"layer.{layer:02d}.{part}" for layer in range(LAYERS) for part in ("query", "value")))
BODY_SHAPES = {
    name: shape for module in MODULES for name, shape in ((module + LORA_A, (1, WIDTH)), (module + LORA_B, (WIDTH, 1)))
}
HEAD_SHAPES = {"2": (OUTPUTS, WIDTH)}
PRODUCTS = {"same task": 0.113, "same client": 0.080, "neither": 0.038}
HEADS = {"same task": 0.147, "same client": 0.014, "neither": 0.002}
NOTHING = {"same task": 0.0, "same client": 0.0, "neither": 0.0}
MOVED = 0.3
"""How far A moves, relative to its length."""
B_LENGTH, HEAD_LENGTH = 0.3, 0.5


@dataclass(frozen=True)
class Planted:
    """A round's uploads.

    Attributes:
        factors: float32 ``[n, 36864]``: the factors, flattened in the order of their names; the updates' tensors are
            views into it.
        replies: One a client.
        clients: Their ids.
        task, client: int64 ``[n]``: the truth, and whose the slot is.
        heads: float32 ``[n, 1538]``: what the heads changed.
    """

    factors: NDArray[np.float32]
    replies: tuple[Reply, ...]
    clients: tuple[str, ...]
    task: NDArray[np.int64]
    client: NDArray[np.int64]
    heads: NDArray[np.float32]


def plant(n: int, seed: int, initial: Adapter) -> Planted:
    """Draws n uploads that continue from ``initial``, of clients with 3 to 5 of the five tasks, 4 on average."""
    draw = np.random.default_rng(seed)
    client, task = _slots(n, draw)
    factors = np.empty((n, len(MODULES) * 2 * WIDTH), dtype=np.float32)
    loudness = np.exp(0.3 * draw.standard_normal((n, 1), dtype=np.float32))
    # What A has in common multiplies the cosine of every pair.
    common = 1.0 / (1.0 + MOVED**2)
    for number, module in enumerate(MODULES):
        a = factors[:, 2 * number * WIDTH : (2 * number + 1) * WIDTH]
        b = factors[:, (2 * number + 1) * WIDTH : (2 * number + 2) * WIDTH]
        first = initial[module + LORA_A]
        draw.standard_normal(out=(noise := np.empty((n, WIDTH), dtype=np.float32)), dtype=np.float32)
        noise *= MOVED * np.linalg.norm(first) / WIDTH**0.5
        np.add(first, noise, out=a)
        b[:] = _mixed({pair: value / common for pair, value in PRODUCTS.items()}, task, client, WIDTH, draw)
        b *= B_LENGTH * loudness
    size = OUTPUTS * WIDTH + OUTPUTS
    heads = HEAD_LENGTH * _mixed(HEADS, task, client, size, draw)
    seen = np.empty((n, len(MODULES), GRADIENT_DIRECTIONS, WIDTH), dtype=np.float32)
    for module in range(len(MODULES)):
        seen[:, module, 0] = _mixed(PRODUCTS, task, client, WIDTH, draw)
        for direction in range(1, GRADIENT_DIRECTIONS):
            seen[:, module, direction] = 0.5**direction * _mixed(NOTHING, task, client, WIDTH, draw)
    return Planted(factors, _replies(factors, heads, seen, client, initial), _names(client), task, client, heads)


def _slots(n: int, draw: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    owners: list[int] = []
    tasks: list[int] = []
    while len(tasks) < n:
        own = draw.permutation(TASKS)[: draw.choice([3, 4, 5], p=[0.25, 0.5, 0.25])]
        owners += [owners[-1] + 1 if owners else 0] * len(own)
        tasks += own.tolist()
    return np.array(owners[:n]), np.array(tasks[:n])


def _mixed(
    cosines: dict[str, float],
    task: NDArray[np.int64],
    client: NDArray[np.int64],
    width: int,
    draw: np.random.Generator,
) -> NDArray[np.float32]:
    """Vectors of length about 1: what all share, what a task shares, what a client shares, and each one's own."""
    shared = cosines["neither"]
    parts = (shared, cosines["same task"] - shared, cosines["same client"] - shared)
    out = draw.standard_normal((len(task), width), dtype=np.float32)
    out *= np.float32((1 - sum(parts)) ** 0.5)
    for part, of in zip(parts, (np.zeros_like(task), task, client), strict=True):
        common = draw.standard_normal((int(of.max()) + 1, width), dtype=np.float32)
        for start in range(0, len(of), 512):  # no second array of this size
            out[start : start + 512] += np.float32(part**0.5) * common[of[start : start + 512]]
    out /= np.float32(width**0.5)
    return out


def _names(client: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(f"client-{number:05d}" for number in range(int(client.max()) + 1))


def _replies(
    factors: NDArray[np.float32],
    heads: NDArray[np.float32],
    seen: NDArray[np.float32],
    client: NDArray[np.int64],
    initial: Adapter,
) -> tuple[Reply, ...]:
    names, by_client = _names(client), {}
    ends = np.cumsum([int(np.prod(BODY_SHAPES[name])) for name in sorted(BODY_SHAPES)])
    weight, bias = initial["head.2.weight"], initial["head.2.bias"]
    for row, change, directions, owner in zip(factors, heads, seen, client.tolist(), strict=True):
        tensors = {
            name: part.reshape(BODY_SHAPES[name])
            for name, part in zip(sorted(BODY_SHAPES), np.split(row, ends[:-1]), strict=True)
        }
        tensors["head.2.weight"] = weight + change[: weight.size].reshape(weight.shape)
        tensors["head.2.bias"] = bias + change[weight.size :]
        own = by_client.setdefault(owner, [])
        gradients = {module + LORA_A: rows for module, rows in zip(MODULES, directions, strict=True)}
        own.append(Update(names[owner], len(own), tensors, 1, gradients=gradients))
    return tuple(Reply(names[owner], tuple(own)) for owner, own in by_client.items())


def cosines(planted: Planted, pairs: int, seed: int) -> dict[str, dict[str, float]]:
    """The mean cosines of randomly drawn pairs, from the products themselves: what was planted, measured."""
    draw = np.random.default_rng(seed)
    first, second = draw.integers(0, len(planted.task), (2, 200 * pairs))
    same_task, same_client = (
        planted.task[first] == planted.task[second],
        planted.client[first] == planted.client[second],
    )
    # Two slots of one client are rare among all pairs: neighbours are often such a pair.
    near = draw.integers(0, len(planted.task) - 1, pairs * 4)
    near = near[planted.client[near] == planted.client[near + 1]][:pairs]
    chosen = {
        "same task": (first[same_task & ~same_client][:pairs], second[same_task & ~same_client][:pairs]),
        "same client": (near, near + 1),
        "neither": (first[~same_task & ~same_client][:pairs], second[~same_task & ~same_client][:pairs]),
    }
    out: dict[str, dict[str, float]] = {"products": {}, "heads": {}}
    for kind, (i, j) in chosen.items():
        x, y = (planted.factors[rows].reshape(len(rows), len(MODULES), 2, WIDTH) for rows in (i, j))
        # <B A, B' A'> = <B, B'> <A, A'> at rank 1
        inner = ((x * y).sum(axis=3)).prod(axis=2)
        lengths = ((x**2).sum(axis=3) * (y**2).sum(axis=3)).prod(axis=2) ** 0.5
        out["products"][kind] = float((inner / lengths).mean())
        u, v = planted.heads[i], planted.heads[j]
        length = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
        out["heads"][kind] = float(((u * v).sum(axis=1) / length).mean())
    return out
