"""What may happen to a federation, with real processes: killed, slow, late, strange; each time the run finishes."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import BertModel

import fltac
from fltac.runtime.checkpoint import latest_checkpoint, newest_folder
from fltac.runtime.flower_local import LocalFederation, free_port, running
from runtime.local_federation import (
    commands_with,
    connected,
    cpu_seconds,
    edit_client,
    federated,
    largest_difference,
    one_process,
    processes_of,
    reasons,
    record,
    rounds_of,
    run_of,
    said,
    simulated,
    until,
    worker_of,
)

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a test does, nothing that runs out of its folder outlives it."""
    yield
    until(lambda: not commands_with(str(tmp_path)), f"these end: {commands_with(str(tmp_path))}")


def finish(federation: LocalFederation, seconds: float = 300) -> None:
    assert federation.wait(seconds), federation.log("run").read_text()[-3000:]


def test_a_supernode_killed_in_training_costs_its_own_update_and_comes_back_with_its_memory(tmp_path: Path) -> None:
    config = simulated(tmp_path, "federation.rounds=3", "training.steps=300")
    with running(federated(tmp_path, config, "federation.clients=3", "federation.quorum=2")) as federation:
        connected(federation, *federation.clients)
        federation.start_run()
        until(lambda: len(rounds_of(federation)) == 1, "round 1")
        worker, other = worker_of(federation, "client-2"), worker_of(federation, "client-0")
        before = cpu_seconds(worker)
        until(lambda: cpu_seconds(worker) > before + 0.5, "client-2 trains in round 2")
        os.kill(other, signal.SIGSTOP)  # So that round 2 is not over before client-2 is back.
        assert len(rounds_of(federation)) == 1
        federation.kill("client-2")
        until(lambda: not Path(f"/proc/{worker}").exists(), "its worker ends with it")

        def back() -> bool:
            """Flower lets it in again a minute after its last heartbeat; a supervisor would try as often."""
            if "client-2" not in federation.processes or federation.processes["client-2"].poll() is not None:
                federation.log("client-2").unlink()
                federation.start_node("client-2")
            return said(federation, "client-2", "SuperNode ID:")

        until(back, "client-2 is back")
        os.kill(other, signal.SIGCONT)
        finish(federation)
    first, second, third = rounds_of(federation)
    ((client, reason),) = reasons(federation, 2).items()
    assert client == "client-2"
    assert reason == "its node has left" or "failed to report a heartbeat" in reason
    assert second["updates"] < first["updates"] == third["updates"]
    assert third["clients"] == 3
    # What the third round began from: the second, in which it was away.
    shutil.rmtree(federation.run_directory / "checkpoints" / "round-0003")
    away = latest_checkpoint(federation.run_directory)
    assert away is not None
    assert away.state.round_number == 2
    slots = {key for key in away.state.assignment() if key[0] == "client-2"}
    assert len(slots) == first["updates"] - second["updates"]
    assert all(away.state.memory[key]["body"].any() for key in slots)


def test_a_client_past_the_deadline_is_used_as_stale(tmp_path: Path) -> None:
    config = simulated(tmp_path, "federation.rounds=4", "federation.clients=2")
    settings = ("federation.deadline_seconds=20", "federation.stale=use")
    with running(federated(tmp_path, config, *settings)) as federation:
        connected(federation, *federation.clients)
        federation.start_run()
        worker = worker_of(federation, "client-1")
        until(lambda: said(federation, "run", "client client-1 is there"), "client-1 is there")
        os.kill(worker, signal.SIGSTOP)
        until(lambda: len(rounds_of(federation)) == 1, "round 1")
        os.kill(worker, signal.SIGCONT)
        finish(federation)
    rounds = rounds_of(federation)
    assert reasons(federation, 1) == {"client-1": "no reply within 20 s"}
    assert [item["clients"] for item in rounds[:2]] == [2, 1]
    assert sum(item.get("stale", 0) for item in rounds) >= 1
    assert said(federation, "run", "client client-1: its reply to round 1 came late")


def saved_round(federation: LocalFederation) -> int:
    """Of the newest checkpoint. A round's record is written before it: a kill between the two costs the round."""
    newest = newest_folder(federation.run_directory)
    return 0 if newest is None else int(newest.name.removeprefix("round-")[:4])


def test_killed_serverapp_then_killed_superlink_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    config = simulated(tmp_path, "federation.rounds=3")
    fltac.run(config, tmp_path / "simulation")
    with running(federated(tmp_path, config, "federation.quorum=3", "federation.clients=3")) as federation:
        connected(federation, *federation.clients)
        federation.start_run()
        until(lambda: saved_round(federation) == 1, "round 1")
        server = one_process(federation, "flwr-serverapp")
        assert server is not None
        os.kill(server, signal.SIGKILL)
        federation.stop("run")
        federation.start_run()
        until(lambda: saved_round(federation) == 2, "round 2")
        federation.kill("superlink")
        until(lambda: one_process(federation, "flwr-serverapp") is None, "the ServerApp ends with its SuperLink")
        federation.stop("run")
        assert len(rounds_of(federation)) == 2
        federation.start_superlink()
        # The coordinator's command, beside the same Flower configuration.
        federation.start("resume", ["fltac", "resume", str(federation.run_directory), "--json"])
        assert federation.processes["resume"].wait(300) == 0, federation.log("resume").read_text()
    assert said(federation, "run", "goes on after round 1")
    assert said(federation, "resume", "goes on after round 2")
    expected, found = latest_checkpoint(tmp_path / "simulation"), latest_checkpoint(federation.run_directory)
    assert expected is not None
    assert found is not None
    assert found.state.assignment() == expected.state.assignment()
    assert largest_difference(expected.state, found.state) < 1e-6
    assert [item["round"] for item in rounds_of(federation)] == [1, 2, 3]


def poison(client_file: Path) -> int:
    """Makes a client's regression targets so large that its adapter becomes NaN; returns the slot."""
    slots = []

    def find(tree: dict) -> None:  # type: ignore[type-arg]
        task = tree["tasks"]["letters"]
        file = client_file.parent / task["path"]
        table = pyarrow.parquet.read_table(file)
        place = table.column_names.index(task["label"])
        huge = pa.array(np.full(len(table), 3e38), table.schema.field(place).type)
        pyarrow.parquet.write_table(table.set_column(place, task["label"], huge), file)
        slots.append(task["slot"])

    edit_client(client_file, find)
    return slots[0]


def test_strangers_twins_misfits_poison_and_a_late_joiner(tmp_path: Path) -> None:
    config = simulated(tmp_path, "federation.rounds=4", "federation.clients=4", "federation.partition.rule=iid")
    federation = federated(tmp_path / "good", config, "federation.quorum=3")
    federation = _with_strangers(tmp_path, federation)
    poisoned = poison(federation.clients["client-2"])
    everybody = [name for name in federation.clients if name not in ("stranger", "client-3")]
    try:
        federation.start_superlink()
        federation.register(*everybody, "client-3")
        for name in [*everybody, "stranger"]:
            federation.start_node(name)
        _start_unsafe(federation)
        connected(federation, *everybody)
        federation.start_run()
        until(lambda: len(rounds_of(federation)) == 1, "round 1")
        federation.start_node("client-3")
        finish(federation)
        for name in ("stranger", "insecure", "deceived"):
            assert not said(federation, name, "SuperNode ID:"), name
        assert said(federation, "stranger", "Failed to activate SuperNode")
        assert said(federation, "deceived", "CERTIFICATE_VERIFY_FAILED")
    finally:
        federation.stop()
    until(lambda: not processes_of(federation), "everything has ended")
    rounds = rounds_of(federation)
    clients = [item["clients"] for item in rounds]
    assert (clients[0], clients[-1]) == (3, 4), "the late joiner"
    for number in range(1, 5):
        named = [item for item in record(federation, number)["rejections"] if item["client"] == "client-2"]
        assert [item["slot"] for item in named] == [poisoned]
        assert named[0]["reason"].endswith("has values that are not finite")
        refused = record(federation, number)["network"]["refused"]
        assert [reason.partition(": ")[0] for reason in refused] == ["client client-0", "client odd"]
        assert refused[0].endswith("another node that is connected has this client id")
        assert "its backbone's weights are others" in refused[1]
    state = latest_checkpoint(federation.run_directory)
    assert state is not None
    assert {client for client, _ in state.state.assignment()} == {f"client-{number}" for number in range(4)}
    assert ("client-2", poisoned) not in state.state.assignment()
    assert all(np.isfinite(tensor).all() for cluster in state.state.clusters for tensor in cluster.adapter.values())
    summary = run_of(federation).summary()
    assert summary is not None
    assert summary["slots"]["worst_client"]["client"] in summary["slots"]["clients"]


def _with_strangers(folder: Path, good: LocalFederation) -> LocalFederation:
    """The same federation with a second client-0, a node with another backbone, and one that is not registered."""
    other = folder / "other-backbone"
    model = BertModel.from_pretrained(folder / "backbone")
    torch.manual_seed(1)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1.0)
    shutil.copytree(folder / "backbone", other)
    model.save_pretrained(other)
    clients = dict(good.clients)
    for name, source in (("twin", "client-0"), ("odd", "client-1"), ("stranger", "client-1")):
        shutil.copytree(clients[source].parent, folder / name)
        clients[name] = folder / name / "client.yaml"

    def oddity(tree: dict) -> None:  # type: ignore[type-arg]
        tree |= {"client": "odd", "backbone": {"name": str(other)}}

    edit_client(clients["odd"], oddity)
    coordinator = fltac.load_config(folder / "good" / "data" / "coordinator.yaml", ["federation.quorum=3"])
    return LocalFederation(folder / "federation", coordinator, clients, {"OMP_NUM_THREADS": "1"})


def _start_unsafe(federation: LocalFederation) -> None:
    """A SuperNode without TLS, and one that trusts another CA."""
    from fltac.runtime.flower_certs import write_certificates

    write_certificates(federation.folder / "other-certs")
    command = federation.node_command("stranger")
    place = command.index("--root-certificates")
    federation.start("insecure", ["flower-supernode", "--insecure", *_without_key(command[place + 2 :])])
    command[place + 1] = str(federation.folder / "other-certs" / "ca.crt")
    command[command.index("--port") + 1] = str(free_port())
    federation.start("deceived", command)


def _without_key(command: list[str]) -> list[str]:
    place = command.index("--auth-supernode-private-key")
    rest = [*command[:place], *command[place + 2 :]]
    rest[rest.index("--port") + 1] = str(free_port())
    return rest


def test_an_expired_certificate_and_a_port_in_use(tmp_path: Path) -> None:
    from fltac.runtime.flower_certs import write_certificates

    config = simulated(tmp_path)
    federation = federated(tmp_path, config)
    try:
        federation.start_superlink()
        second = subprocess.run(
            [*federation.superlink_command()[:-2], "--enable-supernode-auth"],
            env=federation.environment,
            cwd=federation.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode != 0
        assert str(federation.port) in second.stdout + second.stderr
        federation.stop()
        shutil.rmtree(federation.certs)
        write_certificates(federation.certs, nodes=list(federation.clients), days=0)
        federation.start("superlink", federation.superlink_command())
        until(lambda: said(federation, "superlink", "Uvicorn running"), "the SuperLink with an expired certificate")
        federation.start_node("client-0")
        until(lambda: said(federation, "client-0", "certificate has expired"), "client-0 refuses it")
        assert not said(federation, "client-0", "SuperNode ID:")
    finally:
        federation.stop()
