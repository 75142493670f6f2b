"""The ServerApp: the coordinator's run over Flower's grid.

Flower's strategies are not used: the loop is ``fltac.runtime.loop.federate``. Started again with the same run
directory, the run goes on after its last finished round.
"""

import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import httpx
from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from fltac.config import load_config
from fltac.errors import InputError
from fltac.runtime.coordinator import coordinate
from fltac.runtime.flower_client import OVERRIDES
from fltac.runtime.flower_message import NoPayload, content_of, payload_of, size_of
from fltac.runtime.post import Arrival, Kind, PostError, Sent
from fltac.runtime.progress import Lines
from fltac.wire.node_protocol import one_line

DIRECTORY = "directory"
"""The run-config key that names the run directory."""

APP = "app"
"""The run-config key that names the app's folder as the coordinator does."""

GRACE_SECONDS = 10.0
"""For Flower to end the process in its own way."""

TYPES: Mapping[Kind, str] = {
    "query": MessageType.QUERY,
    "train": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
}


class GridPost:
    """Flower's grid as a ``Post``. A node's address is its id and when it was last activated."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> dict[str, str]:
        """The nodes that the SuperLink thinks are connected, by the name they were registered with, else by id."""
        return {
            f"{node.node_id}@{node.last_activated_at}": f"node {node.name or node.node_id}"
            for node in self._grid.get_nodes()
        }

    def send(self, node: str, kind: Kind, payload: bytes, round_number: int) -> Sent:
        """Pushes one message."""
        message = Message(
            content_of(payload),
            dst_node_id=int(node.partition("@")[0]),
            message_type=TYPES[kind],
            group_id=str(round_number),
        )
        size = size_of(message)
        try:
            ids = list(self._grid.push_messages([message]))
        except (httpx.HTTPStatusError, ValueError) as error:
            raise PostError(f"the SuperLink does not take the message: {one_line(str(error))}") from error
        if not ids or not ids[0]:
            raise PostError(f"the SuperLink does not take the message of {size} bytes")
        return Sent(ids[0], size)

    def collect(self, ids: Collection[str]) -> list[Arrival]:
        """Pulls the replies that have arrived."""
        found = []
        for item in ids:
            # One by one: what cannot be read is confirmed as received, and must not cost the answers of others.
            try:
                messages = list(self._grid.pull_messages([item]))
            except httpx.TransportError:
                break  # The SuperLink is not there now; what has not been pulled can be pulled later.
            except Exception as error:
                found.append(Arrival(item, None, f"its answer cannot be read ({type(error).__name__})", 0))
                continue
            found += [_arrival(message) for message in messages]
        return found


def _arrival(message: Message) -> Arrival:
    answered = message.metadata.reply_to_message_id
    if message.has_error():
        reason = one_line(message.error.reason or "") or f"code {message.error.code}"
        return Arrival(answered, None, reason, size_of(message))
    try:
        return Arrival(answered, payload_of(message), None, size_of(message))
    except NoPayload as error:
        return Arrival(answered, None, str(error), size_of(message))


def end_with_parent() -> None:
    """Ends this process some seconds after its parent, whatever it is doing then.

    Flower's own watch sends a signal, which a main thread that waits for a transfer never gets to see. The process
    would stay behind and hold the run directory, so that the run could not go on. All finished rounds are on disk.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def server_app(config_file: Path) -> ServerApp:
    """The ServerApp of an app bundle.

    Args:
        config_file: The experiment's config in the bundle.
    """
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        end_with_parent()
        logging.getLogger("flwr").setLevel(logging.WARNING)
        directory = context.run_config.get(DIRECTORY)
        if not isinstance(directory, str) or not directory:
            raise InputError(f"run config: {DIRECTORY} is {directory!r}; expected the path of a run directory")
        settings = {key: context.run_config.get(key, "") for key in (DIRECTORY, OVERRIDES)}
        again = {"app": context.run_config.get(APP), "run_config": settings}
        config = load_config(config_file, shlex.split(str(context.run_config.get(OVERRIDES, ""))))
        coordinate(config, Path(directory), GridPost(grid), Lines(sys.stderr), again)

    app.main()(main)
    return app
