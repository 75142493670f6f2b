"""What is kept of a round's uploads: all that a clustering rule looks at, as inner products between slots.

A file is a few hundred kilobytes of safetensors. Each kind of inner product is a symmetric matrix ``[n, n]`` of which
the upper triangle is stored in float32; those of adapted matrices have one such row for each.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

Gram = NDArray[np.float64]

KINDS = ("product", "product_seen", "product_top", "a", "a_row", "b", "head")
"""Inner products of the changes of: the products B A; the same weighted by the covariance of the layer's own inputs;
their best approximations of rank 1, where they are of a higher one; A; its rows alone, likewise; B; the head (weight
and bias apart)."""


@dataclass(frozen=True)
class Recording:
    """One round's uploads of n slots.

    Attributes:
        facts: Regime, seed, tau, rank, loss, commit and versions.
        truth: ``[n]`` the task of each slot as a number.
        clients: ``[n]`` the client of each slot.
        examples: ``[n]`` its training rows.
        scores: ``[n]`` score of the uploaded adapter on some validation rows of its task; NaN where not taken.
        majority: ``[n]`` what always answering the most frequent class scores there.
        grams: Kind to ``[parts, n, n]``.
    """

    facts: Mapping[str, Any]
    truth: NDArray[np.int64]
    clients: tuple[str, ...]
    examples: NDArray[np.int64]
    scores: NDArray[np.float64]
    majority: NDArray[np.float64]
    grams: Mapping[str, Gram]

    @property
    def name(self) -> str:
        """Also the file's."""
        facts = self.facts
        loss = "" if facts["loss"] == "plain" else f"-{facts['loss']}"
        return f"{facts['regime']}-rank{facts['rank']}{loss}-seed{facts['seed']}-tau{facts['tau']}"

    def save(self, folder: Path) -> Path:
        """Writes the file under its name and returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        return self.save_as(folder / f"{self.name}.safetensors")

    def save_as(self, path: Path) -> Path:
        """Writes the file and returns its path."""
        n = len(self.truth)
        upper = np.triu_indices(n)
        # safetensors writes the memory of an array as it lies, whatever its strides.
        tensors = {
            kind: np.ascontiguousarray(gram[:, upper[0], upper[1]], dtype=np.float32)
            for kind, gram in self.grams.items()
        }
        tensors |= {"truth": self.truth, "examples": self.examples}
        tensors |= {"scores": self.scores.astype(np.float32), "majority": self.majority.astype(np.float32)}
        about = {"facts": json.dumps(self.facts), "clients": json.dumps(self.clients)}
        save_file(tensors, path.with_suffix(".part"), about)
        path.with_suffix(".part").chmod(0o644)
        path.with_suffix(".part").replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Reads what :meth:`save` wrote."""
        with safe_open(path, "numpy") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        n = len(tensors["truth"])
        upper = np.triu_indices(n)
        grams = {}
        for kind in (kind for kind in KINDS if kind in tensors):
            gram = np.zeros((len(tensors[kind]), n, n))
            gram[:, upper[0], upper[1]] = tensors[kind]
            grams[kind] = gram + gram.transpose(0, 2, 1) - gram * np.eye(n)
        return cls(
            json.loads(about["facts"]),
            tensors["truth"],
            tuple(json.loads(about["clients"])),
            tensors["examples"],
            tensors["scores"].astype(np.float64),
            tensors["majority"].astype(np.float64),
            grams,
        )


def load_all(folder: Path, pattern: str = "*") -> list[Recording]:
    """The recordings of a folder whose names match, sorted by name."""
    return [Recording.load(path) for path in sorted(folder.glob(f"{pattern}.safetensors"))]
