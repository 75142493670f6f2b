"""Messages through a Unix socket, each after its length, between processes of one user."""

import os
import socket
import struct
from typing import Final

LENGTH: Final = struct.Struct(">Q")
LARGEST: Final = 2**34


class BrokenFrame(OSError):
    """The other side went away in mid-message, sent too much, or belongs to somebody else."""


def send(connection: socket.socket, payload: bytes) -> None:
    """Sends one message.

    Raises:
        OSError: the other side is gone.
    """
    connection.sendall(LENGTH.pack(len(payload)))
    connection.sendall(payload)


def receive(connection: socket.socket) -> bytes:
    """Receives one message.

    Raises:
        OSError: the other side is gone, or the message is too large.
    """
    (length,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
    if length > LARGEST:
        raise BrokenFrame(f"a message of {length} bytes; allowed are {LARGEST}")
    return _exactly(connection, length)


def refuse_stranger(connection: socket.socket) -> None:
    """Raises BrokenFrame where the other side runs as another user; says nothing where the system cannot tell."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    if uid != os.getuid():
        raise BrokenFrame(f"the other side runs as user {uid}, not {os.getuid()}")


def _exactly(connection: socket.socket, count: int) -> bytes:
    # Grown as bytes arrive: a length alone must not make this side take memory.
    parts, missing = [], count
    while missing:
        part = connection.recv(min(missing, 2**20))
        if not part:
            raise BrokenFrame(f"the other side closed with {missing} of {count} bytes missing")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
