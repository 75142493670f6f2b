"""The resident worker with real processes: started once, found again, killed in mid-question, ended in time."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from fltac.records import Reply
from fltac.runtime import frames, worker
from fltac.runtime.partition_files import write_partition
from fltac.runtime.setup import prepare
from fltac.runtime.worker import answer_cold, ask
from fltac.runtime.worker_folder import NoWorker, Place, place_of, private_folder
from fltac.runtime.worker_process import serve
from fltac.server.round import init_server, plan_round
from fltac.wire.node_protocol import (
    NodeHello,
    decode_answer,
    encode_hello_question,
    encode_train_question,
)
from runtime.owners import federation

PATIENCE = 120.0
"""Seconds after which a condition that should come true counts as never."""

LONG = 1500
"""Steps of a training that is still going on when its worker is killed."""


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


class Owner:
    """A client's folder, the coordinator's config, and whoever works for them."""

    def __init__(self, folder: Path) -> None:
        config = federation(folder, "federation.clients=1")
        write_partition(config, folder / "out")
        self.file = folder / "out" / "client-0" / "client.yaml"
        self.text = (folder / "out" / "coordinator.yaml").read_text()
        experiment = prepare(config)
        state = init_server(
            config.server_settings, experiment.model.body_shapes, experiment.head_shapes, experiment.clients
        )
        self.train = encode_train_question(plan_round(state, config.server_settings)[0], "float32")
        self.hello = encode_hello_question()

    def with_steps(self, steps: int) -> str:
        tree = yaml.safe_load(self.text)
        tree["training"]["steps"] = steps
        return yaml.safe_dump(tree)

    def place(self, text: str | None = None) -> Place:
        return place_of(text or self.text, self.file)


def worker_id(place: Place) -> int | None:
    """The process that listens, as the system says; None where nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(place.socket))
        except OSError:
            return None
        return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    return Owner(tmp_path_factory.mktemp("owner"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Workers have a folder of their own; all that the test starts is ended, by its id."""
    monkeypatch.setenv("FLTAC_WORKERS", str(tmp_path / "w"))
    processes: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(worker, "_started", processes)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


Started = list[subprocess.Popen[bytes]]


def hello(answer: bytes) -> NodeHello:
    found = decode_answer(answer)
    assert isinstance(found, NodeHello)
    return found


def test_one_worker_for_all_questions_with_the_cold_answers(owner: Owner, started: Started) -> None:
    assert ask(owner.text, owner.file, owner.hello) == answer_cold(owner.text, owner.file, owner.hello)
    assert ask(owner.text, owner.file, owner.train) == answer_cold(owner.text, owner.file, owner.train)
    assert [process.pid for process in started] == [worker_id(owner.place())]


@pytest.mark.process
def test_files_are_for_their_owner_alone(owner: Owner, started: Started) -> None:
    ask(owner.text, owner.file, owner.hello)
    place = owner.place()
    assert place.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in place.folder.iterdir()} == {0o600}
    assert {path.suffix for path in place.folder.iterdir()} == {".sock", ".lock", ".log"}


@pytest.mark.process
def test_another_config_or_client_file_has_a_worker_of_its_own(owner: Owner, started: Started, tmp_path: Path) -> None:
    other = owner.with_steps(7)
    ask(owner.text, owner.file, owner.hello)
    ask(other, owner.file, owner.hello)
    ask(owner.text, owner.file, owner.hello)
    assert len(started) == 2
    assert worker_id(owner.place()) == started[0].pid
    assert worker_id(owner.place(other)) == started[1].pid
    assert place_of(owner.text, tmp_path / "other.yaml") != owner.place()


@pytest.mark.process
def test_two_who_ask_at_the_same_time_share_a_worker(owner: Owner, started: Started) -> None:
    """From two processes, none of which finds a worker."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom fltac.runtime.worker import ask\n"
        "text, file, question, parent = sys.argv[1:]\n"
        "sys.stdin.readline()\n"
        "answer = ask(Path(text).read_text(), Path(file), Path(question).read_bytes(), parent=int(parent))\n"
        "sys.stdout.buffer.write(answer)"
    )
    folder = owner.file.parent.parent
    (folder / "question").write_bytes(owner.train)
    command = [sys.executable, "-c", script, str(folder / "coordinator.yaml"), str(owner.file)]
    command += [str(folder / "question"), str(os.getpid())]
    askers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for asker in askers:
        assert asker.stdin is not None
        asker.stdin.write(b"go\n")
        asker.stdin.flush()
    answers = [asker.communicate()[0] for asker in askers]
    assert set(answers) == {answer_cold(owner.text, owner.file, owner.train)}
    log = owner.place().log.read_text()
    assert log.count("listens for questions") == 1
    assert log.count("was asked") == 3
    process = worker_id(owner.place())
    assert process is not None
    os.kill(process, signal.SIGKILL)


@pytest.mark.process
def test_a_worker_killed_in_mid_question_costs_time_alone(
    owner: Owner, started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    text = owner.with_steps(LONG)
    answers: list[bytes] = []
    ask(text, owner.file, owner.hello)
    place = owner.place(text)
    question = threading.Thread(target=lambda: answers.append(ask(text, owner.file, owner.train)))
    question.start()
    until(lambda: place.log.read_text().count("was asked") == 2)
    started[0].send_signal(signal.SIGKILL)
    question.join()
    assert "no answer from a resident worker" in caplog.text
    reply = decode_answer(answers[0])
    assert isinstance(reply, Reply)
    assert reply.error is None
    assert len(reply.updates) == 3
    # The killed worker's socket is still there; the next question starts another one.
    assert place.socket.exists()
    assert hello(ask(text, owner.file, owner.hello)).client == "client-0"
    assert [process.pid for process in started[1:]] == [worker_id(place)]


@pytest.mark.process
def test_a_socket_that_nobody_listens_at(owner: Owner, started: Started) -> None:
    place = owner.place()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place.socket))
    assert place.socket.exists()
    assert hello(ask(owner.text, owner.file, owner.hello)).client == "client-0"
    assert worker_id(place) == started[0].pid


def test_it_ends_after_idle_time_and_leaves_no_socket(owner: Owner, started: Started) -> None:
    ask(owner.text, owner.file, owner.hello, idle_seconds=0.2)
    assert started[0].wait(PATIENCE) == 0
    assert not owner.place().socket.exists()
    assert "ends after 0.2 idle seconds" in owner.place().log.read_text()


@pytest.mark.process
def test_it_ends_with_the_process_that_it_was_tied_to_also_in_mid_question(owner: Owner, started: Started) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent:
        text = owner.with_steps(10**7)
        ask(text, owner.file, owner.hello, parent=parent.pid)
        place = owner.place(text)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(place.socket))
            frames.send(connection, owner.train)
            until(lambda: place.log.read_text().count("was asked") == 2)
            assert started[0].poll() is None
            parent.kill()
            parent.wait()
            assert started[0].wait(PATIENCE) == 0
            assert connection.recv(1) == b""
    assert not place.socket.exists()
    assert f"ends with process {parent.pid}" in place.log.read_text()


@pytest.mark.process
def test_a_worker_that_cannot_be_started(
    owner: Owner, started: Started, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        assert hello(ask(owner.text, owner.file, owner.hello)).client == "client-0"
        assert "a worker ended before it listened" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/python")
        assert hello(ask(owner.text, owner.file, owner.hello)).client == "client-0"
    assert worker_id(owner.place()) is None


def test_without_idle_time_there_is_no_worker(owner: Owner, started: Started) -> None:
    assert hello(ask(owner.text, owner.file, owner.hello, idle_seconds=0)).client == "client-0"
    assert started == []
    assert not owner.place().socket.exists()


def test_a_folder_that_others_may_enter_is_not_used(
    owner: Owner, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w").mkdir(mode=0o700)
    (tmp_path / "w").chmod(0o750)
    with pytest.raises(NoWorker, match="not a folder of this user alone"):
        private_folder()
    assert hello(ask(owner.text, owner.file, owner.hello)).client == "client-0"
    assert started == []
    (tmp_path / "link").symlink_to(tmp_path / "w")
    (tmp_path / "w").chmod(0o700)
    monkeypatch.setenv("FLTAC_WORKERS", str(tmp_path / "link"))
    with pytest.raises(NoWorker, match="not a folder of this user alone"):
        private_folder()
    monkeypatch.setenv("FLTAC_WORKERS", str(tmp_path / ("x" * 120)))
    with pytest.raises(NoWorker, match="too long for a socket"):
        owner.place()


@pytest.mark.process
def test_what_is_wrong_is_answered_in_words_that_may_leave(owner: Owner, started: Started, tmp_path: Path) -> None:
    for text, file in [(owner.text, tmp_path / "none.yaml"), ("backbone: [", owner.file), ("\ud800", owner.file)]:
        for seconds in (60.0, 0.0):
            answer = decode_answer(ask(text, file, owner.hello, idle_seconds=seconds))
            assert isinstance(answer, Reply)
            assert answer.client == ("" if file != owner.file else "client-0")
            assert "cannot be used here; its own log says why" in (answer.error or "")
    assert "none.yaml: no such file" in place_of(owner.text, tmp_path / "none.yaml").log.read_text()


@pytest.mark.process
def test_a_changed_client_file_is_read_again_by_the_same_worker(owner: Owner, started: Started, tmp_path: Path) -> None:
    for source in owner.file.parent.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    file = tmp_path / "client.yaml"
    assert len(hello(ask(owner.text, file, owner.hello)).slots) == 3
    tree = yaml.safe_load(file.read_text())
    tree["tasks"].popitem()
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert hello(ask(owner.text, file, owner.hello)).slots == (0, 1)
    assert len(started) == 1


@pytest.mark.process
def test_an_asker_that_goes_away_or_lies_about_lengths_does_not_harm(owner: Owner, started: Started) -> None:
    ask(owner.text, owner.file, owner.hello)
    for first_bytes in (b"", b"\0\0", struct.pack(">Q", 100) + b"short", struct.pack(">Q", 2**60)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(owner.place().socket))
            connection.sendall(first_bytes)
    assert hello(ask(owner.text, owner.file, owner.hello)).client == "client-0"
    assert len(started) == 1
    assert "a message of 1152921504606846976 bytes" in owner.place().log.read_text()


def test_a_stranger_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames.refuse_stranger(ours)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(frames.BrokenFrame, match=r"runs as user \d+, not 12345"):
            frames.refuse_stranger(ours)


def test_who_connected_before_the_end_is_still_served(tmp_path: Path) -> None:
    """The answer takes longer than the idle time; the second asker waits in the queue meanwhile."""
    path, answers = tmp_path / "s", []

    def slow(question: bytes) -> bytes:
        time.sleep(0.3)
        return question.upper()

    def question(text: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            frames.send(connection, text)
            answers.append(frames.receive(connection))

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(4)
        askers = [threading.Thread(target=question, args=(text,)) for text in (b"one", b"two")]
        for asker in askers:
            asker.start()
        serve(listener, path, slow, 0.1)
        for asker in askers:
            asker.join()
    assert sorted(answers) == [b"ONE", b"TWO"]
    assert not path.exists()
