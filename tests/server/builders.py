"""Tiny adapters, updates and settings for tests of the server."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fltac.config import GRADIENT_DIRECTIONS, ServerSettings, load_config
from fltac.records import LORA_A, Adapter, Reply, ServerState, Update
from fltac.server.round import init_server

BODY = {"m.lora_A": (1, 3), "m.lora_B": (2, 1)}
HEADS = {"2": (2, 3)}


def server(*overrides: str) -> ServerSettings:
    """Settings that compare changes of A and group after the first round already, if nothing else is said."""
    usual = ["server.clustering.features=a", "server.clustering.from_round=1"]
    config = load_config({"backbone": {"name": "x"}, "tasks": ["sst2", "rte"]}, [*usual, *overrides])
    return config.server_settings


def state(*clients: str, heads: Mapping[str, tuple[int, int]] = HEADS, **settings: Any) -> ServerState:
    return init_server(settings.get("settings") or server(), BODY, heads, clients)


def adapter(a: float, b: float, head: float = 0.0, key: str = "2", outputs: int = 2) -> Adapter:
    """Constant factors; the product is ``a * b`` everywhere."""
    return {
        "m.lora_A": np.full((1, 3), a, np.float32),
        "m.lora_B": np.full((2, 1), b, np.float32),
        f"head.{key}.weight": np.full((outputs, 3), head, np.float32),
        f"head.{key}.bias": np.zeros(outputs, np.float32),
    }


def update(client: str, slot: int, tensors: Adapter, examples: int = 1) -> Update:
    return Update(client, slot, tensors, examples)


def reply(client: str, *adapters: Adapter, examples: int = 1) -> Reply:
    return Reply(client, tuple(update(client, slot, item, examples) for slot, item in enumerate(adapters)))


def planted(
    clients: int, tasks: int, seed: int = 0, noise: float = 0.3, rank: int = 1, features: int = 12
) -> tuple[list[Update], list[int]]:
    """Every client holds every task; slots of a task share a direction in A, B and head. Returns the truth too."""
    draw = np.random.default_rng(seed)
    centres = [
        (draw.normal(size=(rank, features)), draw.normal(size=(features, rank)), draw.normal(size=(2, features)))
        for _ in range(tasks)
    ]
    updates, truth = [], []
    for client in range(clients):
        for slot, task in enumerate(draw.permutation(tasks)):
            a, b, head = (
                (part + noise * draw.normal(size=part.shape)).astype(np.float32) for part in centres[int(task)]
            )
            tensors = {"m.lora_A": a, "m.lora_B": b, "head.2.weight": head, "head.2.bias": np.zeros(2, np.float32)}
            updates.append(Update(f"client-{client}", slot, tensors, 1))
            truth.append(int(task))
    return updates, truth


def with_gradients(updates: list[Update], initial: Adapter, noise: float = 0.3, seed: int = 7) -> list[Update]:
    """Each update with gradients of its slot's task: the direction that its A has learned since v0, and noise."""
    draw, out = np.random.default_rng(seed), []
    for item in updates:
        seen = {}
        for name, tensor in item.adapter.items():
            if name.endswith(LORA_A):
                change = (tensor - initial[name]).mean(axis=0)
                rows = noise * draw.normal(size=(GRADIENT_DIRECTIONS, len(change)))
                rows[0] += change * draw.choice([-1, 1])
                seen[name] = (rows / np.linalg.norm(rows)).astype(np.float32)
        out.append(replace(item, gradients=seen))
    return out
