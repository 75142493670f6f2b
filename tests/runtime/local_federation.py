"""Real federations for tests: the owners' tiny tasks as client folders, and what happens in the processes."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from fltac.config import Config, load_config
from fltac.records import ServerState
from fltac.runtime.flower_local import LocalFederation
from fltac.runtime.partition_files import write_partition
from fltac.runtime.run_directory import RunDirectory, open_existing
from runtime.owners import federation

PATIENCE = 180.0
"""Seconds after which something that should happen counts as never."""


def simulated(folder: Path, *overrides: str) -> Config:
    """The config of a simulation whose lanes never span clients, as those of a federation cannot."""
    return federation(folder, "training.lanes=1", "training.precision=float32", "evaluation.every=0", *overrides)


def federated(folder: Path, config: Config, *overrides: str) -> LocalFederation:
    """A federation whose nodes hold the rows that the clients of a simulation hold."""
    write_partition(config, folder / "data")
    clients = {
        path.name: path / "client.yaml"
        for path in sorted((folder / "data").iterdir())
        if (path / "client.yaml").exists()
    }
    coordinator = load_config(folder / "data" / "coordinator.yaml", overrides)
    return LocalFederation(folder / "federation", coordinator, clients, {"OMP_NUM_THREADS": "1"})


def edit_client(file: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    """Changes a client file in place."""
    tree = yaml.safe_load(file.read_text())
    change(tree)
    file.write_text(yaml.safe_dump(tree, sort_keys=False))


def until(condition: Callable[[], object], what: str) -> None:
    """Waits until something is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.2)


def rounds_of(federation: LocalFederation) -> list[dict]:  # type: ignore[type-arg]
    """The records so far."""
    path = federation.run_directory
    return RunDirectory(path, load_config(path / "config.yaml")).rounds() if (path / "config.yaml").exists() else []


def record(federation: LocalFederation, number: int) -> dict:  # type: ignore[type-arg]
    """The record of a round."""
    return rounds_of(federation)[number - 1]


def reasons(federation: LocalFederation, number: int) -> dict[str, str]:
    """Why something of a client was not used in a round."""
    return {item["client"]: item["reason"] for item in record(federation, number).get("rejections", [])}


def said(federation: LocalFederation, name: str, text: str) -> bool:
    """Whether a process has written something."""
    return text in federation.log(name).read_text(errors="replace")


def processes_of(federation: LocalFederation) -> dict[int, str]:
    """All processes that run in the federation's environment, by id, with their command lines."""
    marker = f"FLWR_HOME={federation.environment['FLWR_HOME']}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if marker in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(folder.name)] = command
            except OSError:
                continue
    return {pid: command for pid, command in found.items() if command}


def commands_with(text: str) -> list[str]:
    """The command lines of all processes in which a text occurs."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [command for command in found if text in command]


def one_process(federation: LocalFederation, *words: str) -> int | None:
    """The id of the one process whose command line has all these words; None where there is none yet."""
    found = [pid for pid, command in processes_of(federation).items() if all(word in command for word in words)]
    assert len(found) < 2, [processes_of(federation)[pid] for pid in found]
    return found[0] if found else None


def largest_difference(one: ServerState, other: ServerState) -> float:
    """Between the clusters' adapters, tensor by tensor."""
    assert [cluster.id for cluster in one.clusters] == [cluster.id for cluster in other.clusters]
    return max(
        float(np.abs(first.adapter[name] - second.adapter[name]).max())
        for first, second in zip(one.clusters, other.clusters, strict=True)
        for name in first.adapter.keys() | second.adapter.keys()
    )


def run_of(federation: LocalFederation) -> RunDirectory:
    return open_existing(federation.run_directory)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker_of(federation: LocalFederation, client: str) -> int:
    """The id of a node's resident worker, once it is there."""
    until(lambda: one_process(federation, "fltac.runtime.worker_process", f"/{client}/"), f"the worker of {client}")
    return one_process(federation, "fltac.runtime.worker_process", f"/{client}/") or 0


def connected(federation: LocalFederation, *names: str) -> None:
    """Waits until SuperNodes are connected."""
    for name in names:
        until(lambda name=name: said(federation, name, "SuperNode ID:"), f"{name} is connected")  # type: ignore[misc]
