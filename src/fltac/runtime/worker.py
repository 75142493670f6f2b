"""A data owner's node that stays in memory between messages, and whoever asks it.

Flower starts a process for each message, so that the backbone would be loaded in every round. ``ask`` sends the
message to a resident worker, which it starts where there is none; where that fails, or the worker dies before it has
answered, the same question is answered in this process, with the same numbers: only the time differs.
"""

import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fltac.runtime.frames import receive, refuse_stranger, send
from fltac.runtime.worker_folder import NoWorker, Place, place_of, private_file

log = logging.getLogger("fltac.worker")

IDLE_SECONDS = 900.0
START_SECONDS = 60.0
"""A worker listens before it loads anything, so it is there at once or something is wrong."""

_started: list[subprocess.Popen[bytes]] = []
"""Held, since a process object that is dropped while its process runs warns."""


def ask(
    config_text: str,
    client_file: Path,
    payload: bytes,
    idle_seconds: float = IDLE_SECONDS,
    parent: int | None = None,
) -> bytes:
    """Answers a question of ``fltac.wire.node_protocol`` for a client file; never raises for what it was given.

    Args:
        config_text: The coordinator's experiment config as YAML.
        client_file: The owner's ``client.yaml``.
        payload: The question.
        idle_seconds: A worker that is started ends after so long without a question; 0: no worker, answer here.
        parent: Id of the process with which a worker that is started ends, such as the SuperNode's.

    Returns:
        The encoded answer; a reply with an error where there is none.
    """
    if idle_seconds > 0:
        try:
            place = place_of(config_text, client_file)
            with closing(_connected(place, config_text, client_file, idle_seconds, parent)) as worker:
                send(worker, payload)
                return receive(worker)
        except (OSError, ValueError) as error:  # ValueError: a config or path that cannot be written as bytes
            log.warning("no answer from a resident worker (%s); answering without", error)
    return answer_cold(config_text, client_file, payload)


def answer_cold(config_text: str, client_file: Path, payload: bytes) -> bytes:
    """Loads everything in this process, answers one question, and forgets it."""
    from fltac.runtime.node import StandingNode  # with torch and all that hangs on it

    return StandingNode(config_text, client_file).answer(payload)


def _connected(
    place: Place, config_text: str, client_file: Path, idle_seconds: float, parent: int | None
) -> socket.socket:
    """A connection to the worker, which is started where nobody listens."""
    found = _connect(place)
    if found is not None:
        return found
    with _only_one(place.lock):
        found = _connect(place)
        if found is None:
            place.write_config(config_text)
            _start(place, client_file, idle_seconds, parent)
            found = _connect(place)
    if found is None:
        raise NoWorker("a worker was started but does not listen")
    return found


def _connect(place: Place) -> socket.socket | None:
    """None where nobody listens, whether or not a killed worker has left its socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(place.socket))
        refuse_stranger(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Waits until no other process starts a worker; a lock ends with its process."""
    import fcntl

    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise NoWorker("another process has been starting a worker for too long") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _start(place: Place, client_file: Path, idle_seconds: float, parent: int | None) -> None:
    """Starts a worker and waits until it listens.

    Raises:
        NoWorker: it did not come to listen; its log says why.
    """
    place.socket.unlink(missing_ok=True)  # Of a worker that was killed.
    ready, told = os.pipe()
    options = [str(place.socket), str(place.config), str(client_file.absolute()), str(idle_seconds), str(parent or 0)]
    command = [sys.executable, "-m", "fltac.runtime.worker_process", *options, str(told)]
    output = private_file(place.log)
    try:
        # A session of its own: what stops the process that asks must not stop the worker.
        _started.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[told],
                start_new_session=True,
            )
        )
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(output)
        os.close(told)
    try:
        listens = bool(select.select([ready], [], [], START_SECONDS)[0]) and os.read(ready, 1) == b"1"
    finally:
        os.close(ready)
    if not listens:
        raise NoWorker(f"a worker ended before it listened; {place.log} says why")
