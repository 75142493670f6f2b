"""Where a resident worker is found: a folder that is this user's alone, and names that say what it was started for."""

import hashlib
import json
import os
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import fltac

PLACE = "FLTAC_WORKERS"
"""Environment variable that names the folder instead."""

LONGEST_PATH = 100
"""Bytes that the path of a Unix socket may have on all systems."""


class NoWorker(OSError):
    """There is no worker and none can be started; one line that says why."""


@dataclass(frozen=True)
class Place:
    """The files of one worker: for one user, client file, config and version of the code."""

    folder: Path
    key: str

    @property
    def socket(self) -> Path:
        return self.folder / f"{self.key}.sock"

    @property
    def lock(self) -> Path:
        """Held while a worker is being started."""
        return self.folder / f"{self.key}.lock"

    @property
    def config(self) -> Path:
        """The coordinator's config, as text, until the worker has read it."""
        return self.folder / f"{self.key}.yaml"

    def write_config(self, text: str) -> None:
        """Keeps the config for the worker; raises OSError where the folder cannot be written."""
        with os.fdopen(private_file(self.config), "w", encoding="utf-8") as file:
            file.write(text)

    @property
    def log(self) -> Path:
        """What the worker says; for its owner alone."""
        return self.folder / f"{self.key}.log"


def place_of(config_text: str, client_file: Path) -> Place:
    """The place of the worker for a config and a client file; its folder is made if missing.

    Raises:
        NoWorker: the folder cannot be made, is not this user's alone, or its path is too long for a socket.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise NoWorker("this system has no Unix sockets")
    content = [os.getuid(), str(client_file.absolute()), config_text, code_version()]
    place = Place(private_folder(), hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16])
    if len(os.fsencode(place.socket)) > LONGEST_PATH:
        raise NoWorker(f"{place.folder}: its path is too long for a socket; {PLACE} may name a shorter one")
    return place


def private_file(path: Path) -> int:
    """An emptied file that its owner alone can read, as a descriptor to write to."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def private_folder() -> Path:
    """``FLTAC_WORKERS``, else a folder for this user in the system's folder for temporary files; mode 0700.

    Raises:
        NoWorker: it cannot be made, or somebody else owns it or may enter it.
    """
    named = os.environ.get(PLACE)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"fltac-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise NoWorker(f"{folder} cannot be made: {error.strerror or error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise NoWorker(f"{folder} is not a folder of this user alone (mode 0700)")
    return folder


def code_version() -> str:
    """Changes when the package is upgraded or edited in place."""
    folder = Path(fltac.__file__).parent
    files = [(str(file.relative_to(folder)), file.stat()) for file in sorted(folder.rglob("*.py"))]
    content = [(name, found.st_size, found.st_mtime_ns) for name, found in files]
    return f"{fltac.__version__} {hashlib.sha256(json.dumps(content).encode()).hexdigest()}"
