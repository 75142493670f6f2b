"""The ClientApp: hands a message's bytes to the data owner's worker, and the answer back.

The node's owner says where its client file lies: ``flower-supernode --node-config 'client-file="/…/client.yaml"'``.
With ``idle-seconds=0`` there besides, nothing stays in memory between messages.
"""

import os
import shlex
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fltac.config import load_config, to_yaml
from fltac.errors import InputError
from fltac.records import Reply
from fltac.runtime.flower_message import NoPayload, content_of, payload_of
from fltac.runtime.worker import IDLE_SECONDS, ask
from fltac.wire.node_protocol import encode_answer

CLIENT_FILE = "client-file"
IDLE = "idle-seconds"
OVERRIDES = "overrides"
"""The run-config key with ``section.key=value`` settings, seen by both sides."""


def client_app(config_file: Path) -> ClientApp:
    """The ClientApp of an app bundle.

    Args:
        config_file: The experiment's config in the bundle.
    """
    app = ClientApp()

    def answered(message: Message, context: Context) -> Message:
        return Message(content_of(_answer(message, context, config_file)), reply_to=message)

    for kind in (app.query, app.train, app.evaluate):
        kind()(answered)
    return app


def _answer(message: Message, context: Context, config_file: Path) -> bytes:
    client_file, idle = context.node_config.get(CLIENT_FILE), context.node_config.get(IDLE, IDLE_SECONDS)
    if not isinstance(client_file, str):
        return _error(f"its SuperNode was started without {CLIENT_FILE} in its node config")
    if isinstance(idle, str):
        return _error(f"its node config has no number as {IDLE}")
    try:
        config = load_config(config_file, shlex.split(str(context.run_config.get(OVERRIDES, ""))))
        payload = payload_of(message)
    except (InputError, NoPayload, ValueError) as error:
        return _error(str(error))
    # The parent is the SuperNode's helper process, which ends with the SuperNode; this process ends with the message.
    return ask(to_yaml(config), Path(client_file), payload, float(idle), os.getppid())


def _error(reason: str) -> bytes:
    return encode_answer(Reply("", error=reason))
