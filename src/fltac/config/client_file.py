"""``client.yaml``: who a data owner is and where its tasks' rows lie. It is read on the owner's machine alone.

Of all this only the client's id, slot numbers and counts of rows ever leave that machine.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from fltac.config.base import Positive, Section
from fltac.config.data import TaskConfig
from fltac.config.loading import read_yaml, validated
from fltac.config.sections import Config, Device
from fltac.errors import InputError
from fltac.paths import BUILTIN, PACKAGE, expand
from fltac.records import CLIENT_ID, MOST_SLOTS

PLACES = ("path", "validation_path")
"""The settings of a task that name a file or a folder."""


class OwnTask(TaskConfig):
    """A task of this client: the settings of a config's task, and its slot."""

    slot: Annotated[int, Field(ge=0, lt=MOST_SLOTS)] | None = None
    """The number under which the server knows it; default: its place in the file, from 0. It should never be
    given to another task, so a file from which tasks may be taken gives every task its slot."""


class OwnBackbone(Section):
    """Where the backbone lies on this machine, if not where the coordinator's config says."""

    name: str | None = None
    """As ``backbone.name`` in a config; a local folder may be relative to the client file."""
    device: Device | None = None


class Limits(Section):
    """What this machine gives to the federation."""

    threads: Positive | None = None
    """CPU threads; default: what the coordinator's config says, else all cores."""
    steps: Positive | None = None
    """The most optimizer steps of one task in a round; default: whatever the coordinator asks for. Of gradients no more
    batches are made."""
    message_mb: Positive = 1024
    """The largest question that is read, in MiB."""
    profile: bool = False
    """Whether the coordinator may have profiles (``server.clustering.profile_rows``): vectors that say what the rows
    are about."""
    profile_multiplier: Annotated[float, Field(ge=0)] = 0.0
    """The least ``s n / 2`` of a profile that is sent, with noise ``s`` and ``n`` rows (``client.profile``): both are
    the coordinator's to choose, and a slot may have few rows."""


class ClientSection(Section):
    """The content of ``client.yaml``."""

    client: str
    """A stable id, known to the coordinator: letters, digits, dots, hyphens and underscores."""
    tasks: Annotated[dict[str, OwnTask], Field(min_length=1)]
    """By names that never leave this machine."""
    backbone: OwnBackbone = OwnBackbone()
    limits: Limits = Limits()

    @field_validator("client")
    @classmethod
    def _safe_id(cls, client: str) -> str:
        if not CLIENT_ID.fullmatch(client):
            raise ValueError(
                "allowed are up to 64 letters, digits, dots, hyphens and underscores, a letter or digit first"
            )
        return client

    @model_validator(mode="after")
    def _slots_differ(self) -> "ClientSection":
        seen: dict[int, str] = {}
        for name, slot in self.slots.items():
            if slot in seen:
                raise ValueError(
                    f"tasks.{name}.slot: got {slot}, which is the slot of {seen[slot]} as well; give each its own"
                )
            seen[slot] = name
        return self

    @property
    def slots(self) -> dict[str, int]:
        """Each task's slot number."""
        return {
            name: place if task.slot is None else task.slot for place, (name, task) in enumerate(self.tasks.items())
        }


@dataclass(frozen=True)
class ClientFile:
    """A client file as read.

    Attributes:
        path: The file.
        id: The client's id.
        tasks: Name to settings by ascending slot number, their paths placed: relative ones beside the file.
        slots: Name to slot number, in the same order.
        backbone: What replaces the config's ``backbone`` settings.
        limits: What this machine gives.
    """

    path: Path
    id: str
    tasks: Mapping[str, TaskConfig]
    slots: Mapping[str, int]
    backbone: Mapping[str, str]
    limits: Limits

    def applied(self, config: Config) -> Config:
        """The coordinator's config with this client's tasks, its place of the backbone, and its device."""
        backbone = config.backbone.model_copy(update=dict(self.backbone))
        return config.model_copy(update={"tasks": dict(self.tasks), "data_root": None, "backbone": backbone})

    def stamp(self) -> str:
        """Changes when this file, or a data file that it names, is written again."""
        digest = hashlib.sha256()
        try:
            digest.update(self.path.read_bytes())
        except OSError:
            digest.update(b"missing")
        for task in self.tasks.values():
            for place in PLACES:
                digest.update(f"|{_state(getattr(task, place))}".encode())
        return digest.hexdigest()


def load_client_file(path: str | Path) -> ClientFile:
    """Reads and checks a client file; whether its data can be read is for those who load it.

    Raises:
        InputError: naming the key, its value and what is allowed.
    """
    file = Path(path)
    section = validated(ClientSection, read_yaml(file, "client file"), f"client file {file}")
    names = sorted(section.tasks, key=section.slots.__getitem__)
    tasks = {name: _task(name, section.tasks[name], file.absolute().parent) for name in names}
    own = section.backbone
    backbone = {} if own.device is None else {"device": str(own.device)}
    if own.name is not None:
        backbone["name"] = _placed_backbone(own.name, file.absolute().parent)
    return ClientFile(
        path=file.absolute(),
        id=section.client,
        tasks=tasks,
        slots={name: section.slots[name] for name in names},
        backbone=backbone,
        limits=section.limits,
    )


def _task(name: str, task: OwnTask, folder: Path) -> TaskConfig:
    given = task.model_dump(exclude={"slot"})
    for place in PLACES:
        if given[place] is not None:
            given[place] = _placed(given[place], folder, f"tasks.{name}.{place}")
    return TaskConfig.model_validate(given)


def _placed(text: str, folder: Path, key: str) -> str:
    """A path as it is, if it says by itself where it lies; else inside the folder."""
    if text.startswith((PACKAGE, BUILTIN)):
        return text
    return str(folder / expand(text, key))


def _placed_backbone(name: str, folder: Path) -> str:
    """A name that is a folder beside the client file means that folder; any other may be a hub id."""
    placed = Path(_placed(name, folder, "backbone.name"))
    if name.startswith((".", "~", "/", "$")) and not placed.is_dir():
        raise InputError(f"backbone.name: got {name!r}; there is no folder {placed}")
    return str(placed) if placed.is_dir() else name


def _state(place: str | None) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of a data file, or of those directly inside a folder."""
    if place is None or place.startswith((PACKAGE, BUILTIN)):
        return ()
    path = Path(place)
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    except OSError:
        return ()
