"""The resident worker itself: ``python -m fltac.runtime.worker_process``, started by ``fltac.runtime.worker``.

It listens first and loads afterwards, answers one question at a time, and ends after idle time or with the process
that it was tied to. It prints to its log, which only its owner can read.
"""

import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fltac.runtime.frames import receive, refuse_stranger, send

log = logging.getLogger("fltac.worker")

STALLED_SECONDS = 60.0
"""An asker that neither sends nor takes anything for so long is given up."""

WAITING = 64
"""Askers that may wait for their turn."""


def main(arguments: Sequence[str]) -> None:
    """Serves until idle.

    Args:
        arguments: Socket, config file (removed once it is read), client file, idle seconds, id of the process to end
            with (0: none), and the descriptor of the pipe that is told once the worker listens.
    """
    place, config, client_file, idle, parent, told = arguments
    os.umask(0o077)
    logging.basicConfig(format="%(asctime)s %(process)d %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("fltac").setLevel(logging.INFO)
    path = Path(place)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(place)
        path.chmod(0o600)
        listener.listen(WAITING)
        os.write(int(told), b"1")
        os.close(int(told))
        log.info("listens for questions")
        if int(parent):
            threading.Thread(target=_end_with, args=(int(parent), path), daemon=True).start()
        text = Path(config).read_text(encoding="utf-8")
        Path(config).unlink()
        serve(listener, path, _answers(text, Path(client_file)), float(idle))
    log.info("ends after %s idle seconds", idle)


def serve(listener: socket.socket, path: Path, answer: Callable[[bytes], bytes], idle_seconds: float) -> None:
    """Answers whoever connects, one after the other, until nobody has for so long.

    Args:
        listener: Listening.
        path: Its socket file, removed at the end.
        answer: From a question to its answer.
        idle_seconds: How long to wait for the next asker.
    """
    listener.settimeout(idle_seconds)
    while (connection := _accepted(listener)) is not None:
        _one(connection, answer)
    # Nobody can come any more; who came just before is still served.
    path.unlink(missing_ok=True)
    listener.settimeout(0.0)
    while (connection := _accepted(listener)) is not None:
        _one(connection, answer)


def _answers(config_text: str, client_file: Path) -> Callable[[bytes], bytes]:
    from fltac.runtime.node import StandingNode  # with torch: after the socket listens

    return StandingNode(config_text, client_file).answer


def _accepted(listener: socket.socket) -> socket.socket | None:
    try:
        return listener.accept()[0]
    except (TimeoutError, BlockingIOError):
        return None


def _one(connection: socket.socket, answer: Callable[[bytes], bytes]) -> None:
    with connection:
        try:
            refuse_stranger(connection)
            connection.settimeout(STALLED_SECONDS)
            question = receive(connection)
            log.info("was asked, %d bytes", len(question))
            begun = time.monotonic()
            found = answer(question)
            log.info("answers after %.3f s, %d bytes", time.monotonic() - begun, len(found))
            send(connection, found)
        except OSError as error:
            log.warning("lost an asker: %s", error)


def _end_with(parent: int, path: Path) -> None:
    """Ends this process, whatever it is doing, once another one is gone."""
    _wait_for_end(parent)
    with suppress(OSError):
        log.info("ends with process %d", parent)
        path.unlink(missing_ok=True)
    os._exit(0)


def _wait_for_end(process: int) -> None:
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):
        descriptor = None
    if descriptor is not None:
        select.select([descriptor], [], [])
        return
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            pass
        time.sleep(1.0)


if __name__ == "__main__":
    main(sys.argv[1:])
