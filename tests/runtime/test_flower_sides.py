"""What lies between Flower and the rest on both sides, without any process; needs the extra ``flower``."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from fltac.errors import InputError
from fltac.records import Reply
from fltac.runtime.post import PostError
from fltac.wire.node_protocol import decode_answer, encode_hello_question

flwr = pytest.importorskip("flwr.app", reason="needs the extra `flower`")

from fltac.runtime import flower_client, flower_server  # noqa: E402
from fltac.runtime.flower_message import NoPayload, content_of, payload_of, size_of  # noqa: E402


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    """Flower's messages want to know in which run they are."""
    from flwr.supercore.task_identity import TaskIdentity

    before = {name: getattr(TaskIdentity, f"_{name}") for name in ("run_id", "node_id", "task_id")}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 3
    yield
    for name, value in before.items():
        setattr(TaskIdentity, f"_{name}", value)


def message(payload: bytes = b"question", content: Any = None) -> Any:
    carried = content_of(payload) if content is None else content
    return flwr.Message(carried, dst_node_id=7, message_type="query")


def foreign() -> list[Any]:
    array = flwr.RecordDict({"fltac": flwr.ArrayRecord({"payload": flwr.Array(np.zeros(3))})})
    return [array, flwr.RecordDict(), flwr.RecordDict({"fltac": flwr.ConfigRecord({"payload": b"x"})})]


def test_a_payload_survives_and_nothing_else_is_taken() -> None:
    payload = bytes(range(256)) * 40
    assert payload_of(message(payload)) == payload
    assert len(payload) < size_of(message(payload)) < len(payload) + 3000
    for content in foreign():
        with pytest.raises(NoPayload):
            payload_of(message(content=content))


class Grid:
    """As much of Flower's grid as is used."""

    def __init__(self) -> None:
        self.pushed: list[Any] = []
        self.replies: list[Any] = []
        self.ids: list[str] | None = None

    def get_nodes(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(node_id=7, last_activated_at="noon", name="hospital"),
            SimpleNamespace(node_id=8, last_activated_at="one", name=""),
        ]

    def push_messages(self, messages: list[Any]) -> list[str]:
        self.pushed += messages
        return ["m1"] if self.ids is None else self.ids

    def pull_messages(self, ids: list[str]) -> list[Any]:
        return self.replies


def test_nodes_have_an_address_for_each_connection_and_the_name_they_were_registered_with() -> None:
    assert flower_server.GridPost(Grid()).nodes() == {"7@noon": "node hospital", "8@one": "node 8"}


def test_a_message_goes_to_its_node_with_its_kind_and_round() -> None:
    grid = Grid()
    sent = flower_server.GridPost(grid).send("7@noon", "train", b"payload", 5)
    (pushed,) = grid.pushed
    assert (pushed.metadata.dst_node_id, pushed.metadata.message_type, pushed.metadata.group_id) == (7, "train", "5")
    assert payload_of(pushed) == b"payload"
    assert (sent.id, sent.size) == ("m1", size_of(pushed))


def test_what_the_superlink_does_not_take_is_said() -> None:
    grid = Grid()
    grid.ids = []  # As Flower's grid answers where a message is too large.
    with pytest.raises(PostError, match="the SuperLink does not take the message of"):
        flower_server.GridPost(grid).send("7@noon", "train", b"payload", 5)


def test_arrivals_are_payloads_or_errors_in_one_line() -> None:
    grid = Grid()
    question = message()
    question.metadata.__dict__["_message_id"] = "m1"
    error = flwr.Message(flwr.Error(code=3, reason="first line\nsecond"), reply_to=question)
    grid.replies = [
        flwr.Message(content_of(b"answer"), reply_to=question),
        error,
        flwr.Message(foreign()[0], reply_to=question),
    ]
    good, failed, strange = flower_server.GridPost(grid).collect(["m1"])
    assert (good.id, good.payload, good.error) == ("m1", b"answer", None)
    assert (failed.payload, failed.error) == (None, "first line second")
    assert (strange.payload, strange.error) == (None, "the message carries no payload of fltac")
    assert flower_server.GridPost(grid).collect([]) == []


def test_an_answer_that_cannot_be_read_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid()

    def pull(ids: list[str]) -> list[Any]:
        if ids == ["bad"]:
            raise IndexError("no children")
        return []

    monkeypatch.setattr(grid, "pull_messages", pull)
    arrivals = flower_server.GridPost(grid).collect(["bad", "good"])  # type: ignore[arg-type]
    assert [(item.id, item.payload, item.error) for item in arrivals] == [
        ("bad", None, "its answer cannot be read (IndexError)")
    ]


def asked(tmp_path: Path, question: Any, node: dict[str, Any], run: dict[str, Any] | None = None) -> Reply:
    """What the ClientApp answers."""
    config = tmp_path / "experiment.yaml"
    config.write_text(yaml.safe_dump({"backbone": {"name": "x"}, "server": {"clustering": {"k": 2}}}))
    context = flwr.Context(1, 2, node, flwr.RecordDict(), run or {}, series_id=0)
    reply = flower_client.client_app(config)(question, context)
    answer = decode_answer(payload_of(reply))
    assert isinstance(answer, Reply)
    return answer


def test_the_client_app_answers_whatever_is_wrong_with_its_setting(tmp_path: Path) -> None:
    there = {"client-file": str(tmp_path / "client.yaml")}
    question = message(encode_hello_question())
    for node, run, expected in (
        ({}, {}, "its SuperNode was started without client-file in its node config"),
        ({**there, "idle-seconds": "long"}, {}, "its node config has no number as idle-seconds"),
        (there, {"overrides": "lora.rang=2"}, "lora.rang: unknown key; did you mean lora.rank?"),
        ({**there, "idle-seconds": 0}, {}, "its client file, its data or the config cannot be used here"),
    ):
        assert (asked(tmp_path, question, node, run).error or "").startswith(expected)
    assert asked(tmp_path, message(content=foreign()[0]), there).error == "the message carries no payload of fltac"


def test_the_client_app_passes_the_experiment_and_the_bytes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def ask(config: str, client_file: Path, payload: bytes, idle: float, parent: int) -> bytes:
        seen.update(config=yaml.safe_load(config), file=client_file, payload=payload, idle=idle, parent=parent)
        return flower_client.encode_answer(Reply("a", error="asked"))

    monkeypatch.setattr(flower_client, "ask", ask)
    node = {"client-file": "/srv/client.yaml", "idle-seconds": 5}
    assert asked(tmp_path, message(b"bytes"), node, {"overrides": "lora.rank=3 training.lr=0.5"}).error == "asked"
    assert (seen["config"]["lora"]["rank"], seen["config"]["training"]["lr"]) == (3, 0.5)
    assert (seen["file"], seen["payload"], seen["idle"]) == (Path("/srv/client.yaml"), b"bytes", 5.0)
    assert seen["parent"] > 1


def test_the_server_app_wants_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_server, "end_with_parent", lambda: None)
    app = flower_server.server_app(tmp_path / "experiment.yaml")
    context = flwr.Context(1, 2, {}, flwr.RecordDict(), {"directory": ""}, series_id=0)
    with pytest.raises(InputError, match="run config: directory is ''; expected the path of a run directory"):
        app(Grid(), context)


def test_a_serverapp_whose_parent_is_killed_ends_though_its_main_thread_waits() -> None:
    """A parent that starts a process which watches it, then waits for a lock that nobody gives back."""
    child = (
        "import threading, sys\n"
        "from fltac.runtime import flower_server\n"
        "flower_server.GRACE_SECONDS = 0.1\n"
        "flower_server.end_with_parent()\n"
        "print('watches', flush=True)\n"
        "lock = threading.Lock(); lock.acquire(); lock.acquire()\n"
    )
    parent = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"
    with subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"watches\n"
        process.kill()
        assert process.stdout.read() == b"", "the pipe closes when the child has ended"
