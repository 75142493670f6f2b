"""What clients uploaded in each round of a run, recorded beside it for a picture; the server knows nothing of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fltac.errors import InputError
from fltac.records import Adapter, FloatArray, Reply, ServerState, SlotKey
from fltac.runtime.atomic import write_atomic
from fltac.server.similarity import flattened


@dataclass(frozen=True)
class Uploads:
    """One round's uploads that the server used.

    Attributes:
        keys: The slots.
        clusters: ``[n]`` the cluster that each fell into.
        factors: float32 ``[n, D]`` the flattened low-rank factors, without heads.
    """

    keys: tuple[SlotKey, ...]
    clusters: NDArray[np.int64]
    factors: FloatArray


@dataclass(frozen=True)
class Recorder:
    """Writes each round's uploads to a file, before the round itself is kept: a ``Watch`` of the loop.

    Attributes:
        folder: For the files.
    """

    folder: Path

    def __call__(self, state: ServerState, replies: Sequence[Reply]) -> None:
        assignment = state.assignment()
        used = [update for reply in replies for update in reply.updates if update.key in assignment]
        adapters: list[Adapter] = [update.adapter for update in used]
        tensors = {
            "factors": flattened(adapters, head=False),
            "clusters": np.array([assignment[update.key] for update in used], dtype=np.int64),
        }
        about = {"slots": json.dumps([update.key for update in used])}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(state.round_number), save(tensors, about))

    def read(self, round_number: int) -> Uploads:
        """One round's uploads.

        Raises:
            InputError: there is no such file, or it is damaged.
        """
        path = self._path(round_number)
        try:
            with safe_open(path, "numpy") as file:
                slots = json.loads((file.metadata() or {})["slots"])
                keys = tuple((str(client), int(slot)) for client, slot in slots)
                out = Uploads(keys, file.get_tensor("clusters"), file.get_tensor("factors"))
        except FileNotFoundError as error:
            raise InputError(
                f"{path}: the uploads of round {round_number} were not recorded; choose another --out"
            ) from error
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}: is damaged; choose another --out") from error
        if out.factors.ndim != 2 or not len(keys) == len(out.clusters) == len(out.factors):
            raise InputError(f"{path}: is damaged; choose another --out")
        return out

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:04d}.safetensors"
