"""A whole federation on one machine, with TLS and node keys on loopback: for trying out, tests and benchmarks.

Everything runs in processes of its own, and all that they leave lies in one folder. What was started is stopped by its
id.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fltac.config import Config
from fltac.errors import RunError
from fltac.runtime.flower_app import require_flower, write_app

CONNECTION = "federation"
STOP_SECONDS = 15.0
START_SECONDS = 60.0


class LocalFederation:
    """A SuperLink, SuperNodes and a run, each a process of its own."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        clients: Mapping[str, Path],
        environment: Mapping[str, str] | None = None,
        node_config: Mapping[str, object] | None = None,
    ) -> None:
        """Writes the certificates, the app and Flower's configuration; starts nothing.

        Args:
            folder: Empty or missing; everything lies here.
            config: The coordinator's.
            clients: Node names to client files.
            environment: More variables for all processes.
            node_config: More settings of all SuperNodes' node config, such as ``{"idle-seconds": 0}``.

        Raises:
            InputError: the folder is not empty, the config cannot be federated, or Flower is not installed.
        """
        require_flower()
        from fltac.runtime.flower_certs import write_certificates

        self.folder, self.clients, self.port = folder.absolute(), dict(clients), free_port()
        self.app, self.run_directory = self.folder / "app", self.folder / "run"
        self.node_config = dict(node_config or {})
        self._workers: str | None = None
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.certs = self.folder / "certs"
        write_certificates(self.certs, nodes=list(clients))
        write_app(self.app, config)
        home = self.folder / "flwr"
        home.mkdir()
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            **(environment or {}),
        }
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.certs / "ca.crt"}"\n'
        )

    def log(self, name: str) -> Path:
        """Where a process writes what it says."""
        return self.folder / f"{name}.log"

    def start_superlink(self) -> None:
        """Starts the SuperLink, or starts it again on the same state, and waits until it answers."""
        self.start("superlink", self.superlink_command())
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.processes["superlink"].poll() is not None or time.monotonic() > end:
                raise RunError(f"the SuperLink does not answer; see {self.log('superlink')}")
            time.sleep(0.2)

    def superlink_command(self) -> list[str]:
        """What starts the SuperLink."""
        options = {
            "--ssl-ca-certfile": self.certs / "ca.crt",
            "--ssl-certfile": self.certs / "server.pem",
            "--ssl-keyfile": self.certs / "server.key",
            "--host": "127.0.0.1",
            "--port": self.port,
            "--database": self.folder / "superlink.db",
        }
        given = [str(part) for option in options.items() for part in option]
        return ["flower-superlink", *given, "--enable-supernode-auth", "--disable-runtime-dependency-installation"]

    def register(self, *names: str) -> None:
        """Makes nodes' keys known to the SuperLink."""
        for name in names:
            self.flwr("supernode", "register", str(self.certs / "nodes" / f"{name}.pub"), CONNECTION, "--name", name)

    def start_node(self, name: str) -> None:
        """Starts the SuperNode of a client."""
        self.start(name, self.node_command(name))

    def node_command(self, name: str) -> list[str]:
        """What starts a SuperNode."""
        settings = {"client-file": str(self.clients[name]), **self.node_config}
        options = {
            "--root-certificates": self.certs / "ca.crt",
            "--superlink": f"127.0.0.1:{self.port}",
            "--port": free_port(),
            "--auth-supernode-private-key": self.certs / "nodes" / f"{name}.key",
            "--node-config": " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items()),
        }
        return ["flower-supernode", *(str(part) for option in options.items() for part in option)]

    def start_run(self) -> None:
        """Starts the run, or starts it again; its ServerApp is a child of the SuperLink."""
        self.start("run", self.run_command())

    def run_command(self) -> list[str]:
        """What starts the run."""
        settings = f'directory="{self.run_directory}" app="{self.app}"'
        return ["flwr", "run", str(self.app), CONNECTION, "--stream", "--run-config", settings]

    def wait(self, seconds: float) -> bool:
        """Waits until the run has ended; whether it has left a summary.

        Raises:
            RunError: it has not ended in time.
        """
        try:
            self.processes["run"].wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"the run has not ended within {seconds:g} s; see {self.folder}") from error
        return (self.run_directory / "summary.json").is_file()

    def flwr(self, *arguments: str) -> str:
        """Runs a command of Flower's and returns what it prints.

        Raises:
            RunError: it fails.
        """
        done = subprocess.run(
            ["flwr", *arguments], env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RunError(f"flwr {' '.join(arguments)} failed: {(done.stdout + done.stderr).strip()[-400:]}")
        return done.stdout

    def start(self, name: str, command: Sequence[str]) -> None:
        """Starts a process in a session of its own."""
        if self._workers is None:
            # Not in the folder: the path of a socket may not be long.
            self._workers = tempfile.mkdtemp(prefix="fltac-")
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(command),
                env={**self.environment, "FLTAC_WORKERS": self._workers},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """Kills one process as ``kill -9`` does; what it has started must notice by itself."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self, *names: str) -> None:
        """Stops processes (default: all), the run and the nodes before the SuperLink, and what they have started."""
        chosen = [name for name in self.processes if not names or name in names]
        chosen.sort(key=lambda name: (name == "superlink", name != "run"))
        for name in chosen:
            process = self.processes.pop(name)
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            # Its session is its own, so its group holds nothing but what it has started.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        if not self.processes and self._workers is not None:
            shutil.rmtree(self._workers, ignore_errors=True)
            self._workers = None

    def _answers(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.certs / "ca.crt"))
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), 1.0) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1"),
        ):
            return True
        return False


@contextlib.contextmanager
def running(federation: LocalFederation) -> Iterator[LocalFederation]:
    """A federation with its SuperLink and all its nodes started; everything is stopped at the end."""
    try:
        federation.start_superlink()
        federation.register(*federation.clients)
        for name in federation.clients:
            federation.start_node(name)
        yield federation
    finally:
        federation.stop()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
