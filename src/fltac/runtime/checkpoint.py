"""The server's state on disk, exact to the bit; a kill at any moment leaves the last whole checkpoint.

``<run>/checkpoints/round-0007/`` holds ``state.safetensors`` (all arrays) and ``state.json`` (everything
else, with the SHA-256 of both). A checkpoint is written under a temporary name beside it and renamed, so
what has its proper name is complete; leftovers of a killed write are ignored, and removed by the next save.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from fltac.errors import InputError
from fltac.records import Adapter, Cluster, ServerState
from fltac.runtime.atomic import TEMPORARY, sync_folder, to_json, write_new

FOLDER = "checkpoints"
TENSORS = "state.safetensors"
TEXT = "state.json"
FORMAT = 7
REPLACED = ".replaced"
"""Suffix of a checkpoint that is being written again, for the moment between the two renames."""

Tensors = dict[str, NDArray[Any]]


class Checkpoint(NamedTuple):
    """What :func:`save_checkpoint` was given."""

    state: ServerState
    extra: dict[str, Any]


def save_checkpoint(run_dir: Path, state: ServerState, extra: Mapping[str, object], keep: int = 2) -> Path:
    """Writes the state after a round, then removes all but the newest checkpoints.

    Args:
        run_dir: The run directory.
        state: What the server knows; arrays of any dtype are kept as they are.
        extra: JSON-able values to keep with it (a float that is not finite comes back as None).
        keep: How many checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or not writable; the checkpoints there are then unchanged.
    """
    root = run_dir / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    tensors, content = _flatten(state)
    blob = dump_tensors(tensors)
    content_text = to_json({**content, "extra": dict(extra)})
    head = to_json(
        {"format": FORMAT, "tensors_sha256": _sha256(blob), "content_sha256": _sha256(content_text.encode())}
    )
    text = f'{head[:-1]}, "content": {content_text}}}\n'

    folder = root / f"round-{state.round_number:04d}"
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=root))
    try:
        temporary.chmod(0o755)
        write_new(temporary / TENSORS, blob)
        write_new(temporary / TEXT, text.encode())
        sync_folder(temporary)
        if folder.exists():
            replaced = folder.with_name(folder.name + REPLACED)
            shutil.rmtree(replaced, ignore_errors=True)
            folder.replace(replaced)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(root)
    _prune(root, keep)
    return folder


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint's state and extra values, or None where there is none yet. Writes nothing.

    Raises:
        InputError: the newest checkpoint is damaged; the line names the file, what is wrong with it, and the
            newest older checkpoint that is whole.
    """
    folders = _folders(run_dir / FOLDER)
    if not folders:
        return None
    newest, *older = folders
    try:
        return _read(newest)
    except InputError as error:
        intact = next((folder for folder in older if _is_intact(folder)), None)
        hint = (
            f"{intact} is intact: remove {newest} to continue from there" if intact else "no older checkpoint is intact"
        )
        raise InputError(f"{error}; {hint}") from error


def newest_folder(run_dir: Path) -> Path | None:
    """The newest checkpoint's folder, whole or damaged; None where there is none."""
    folders = _folders(run_dir / FOLDER)
    return folders[0] if folders else None


def _flatten(state: ServerState) -> tuple[Tensors, dict[str, object]]:
    """All arrays under unique names, and the rest with the names in their order."""
    tensors: Tensors = {}

    def store(prefix: str, adapter: Adapter) -> list[str]:
        for name, tensor in adapter.items():
            tensors[f"{prefix}/{name}"] = np.asarray(tensor, order="C")
        return list(adapter)

    content: dict[str, object] = {
        "round": state.round_number,
        "next_cluster_id": state.next_cluster_id,
        "clients": state.clients,
        "initial": store("initial", state.initial),
        "clusters": [
            {"id": c.id, "members": c.members, "tensors": store(f"cluster/{c.id}", c.adapter)} for c in state.clusters
        ],
        "memory": [
            {"client": client, "slot": slot, "tensors": store(f"memory/{index}", adapter)}
            for index, ((client, slot), adapter) in enumerate(state.memory.items())
        ],
        "own": [
            {"client": client, "slot": slot, "tensors": store(f"own/{index}", adapter)}
            for index, ((client, slot), adapter) in enumerate(state.own.items())
        ],
        "optimizer": [
            {"id": number, "tensors": store(f"optimizer/{number}", moments)}
            for number, moments in state.optimizer.items()
        ],
    }
    return tensors, content


def _unflatten(tensors: Tensors, content: Mapping[str, Any]) -> ServerState:
    def fetch(prefix: str, names: list[str]) -> Adapter:
        return {name: tensors[f"{prefix}/{name}"] for name in names}

    return ServerState(
        round_number=content["round"],
        initial=fetch("initial", content["initial"]),
        clients=tuple(content["clients"]),
        clusters=tuple(
            Cluster(
                id=c["id"],
                adapter=fetch(f"cluster/{c['id']}", c["tensors"]),
                members=tuple((client, slot) for client, slot in c["members"]),
            )
            for c in content["clusters"]
        ),
        memory={
            (m["client"], m["slot"]): fetch(f"memory/{index}", m["tensors"])
            for index, m in enumerate(content["memory"])
        },
        next_cluster_id=content["next_cluster_id"],
        own={(o["client"], o["slot"]): fetch(f"own/{index}", o["tensors"]) for index, o in enumerate(content["own"])},
        optimizer={o["id"]: fetch(f"optimizer/{o['id']}", o["tensors"]) for o in content["optimizer"]},
    )


def _read(folder: Path) -> Checkpoint:
    """Raises InputError naming the damaged file."""
    text_path, tensors_path = folder / TEXT, folder / TENSORS
    text, blob = _bytes(text_path), _bytes(tensors_path)
    try:
        tree = json.loads(text)
        version, content = tree["format"], tree["content"]
        content_sha256, tensors_sha256 = tree["content_sha256"], tree["tensors_sha256"]
    except KeyError as error:
        raise InputError(f"damaged checkpoint: {text_path}: the key {error} is missing") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"damaged checkpoint: {text_path}: not the JSON of a checkpoint") from error
    if version != FORMAT:
        raise InputError(
            f"{text_path}: format {version!r} of another version of fltac; this one reads and writes format {FORMAT}"
        )
    if _sha256(to_json(content).encode()) != content_sha256:
        raise InputError(f"damaged checkpoint: {text_path}: its content does not match its SHA-256")
    if _sha256(blob) != tensors_sha256:
        raise InputError(
            f"damaged checkpoint: {tensors_path}: its {len(blob)} bytes do not match the SHA-256 in {TEXT}"
        )
    try:
        tensors = load_tensors(blob)
        return Checkpoint(_unflatten(tensors, content), content["extra"])
    except KeyError as error:
        raise InputError(f"damaged checkpoint: {folder}: the key {error} is missing") from error
    except (TypeError, ValueError, SafetensorError) as error:
        raise InputError(f"damaged checkpoint: {folder}: not laid out as expected") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"damaged checkpoint: {path}: {error.strerror or 'cannot be read'}") from error


def _is_intact(folder: Path) -> bool:
    try:
        _read(folder)
    except InputError:
        return False
    return True


def _folders(root: Path) -> list[Path]:
    """The checkpoints, newest first; one that was being replaced stands in where its successor is missing."""
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = re.fullmatch(rf"round-(\d{{4,}})({re.escape(REPLACED)})?", path.name)
        if match and path.is_dir():
            found.setdefault(int(match.group(1)), path)
    return [found[number] for number in sorted(found, reverse=True)]


def _prune(root: Path, keep: int) -> None:
    kept = set(_folders(root)[:keep])
    for path in root.iterdir():
        temporary = path.name.startswith(TEMPORARY)
        if path not in kept and (temporary or path.name.startswith("round-")):
            shutil.rmtree(path, ignore_errors=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
