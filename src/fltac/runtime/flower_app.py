"""The coordinator's Flower app as a folder, and its run started again after it was interrupted."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from fltac.config import Config, to_yaml
from fltac.errors import InputError, RunError
from fltac.runtime.atomic import write_atomic
from fltac.runtime.owner import refuse_not_federated
from fltac.runtime.run_directory import RunDirectory, refuse_occupied

APP_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
"""What Flower allows as the name of an app."""

PACKAGE = "fltac_federation"


def require_flower() -> None:
    """Raises InputError with the line to type where Flower is not installed."""
    if importlib.util.find_spec("flwr") is None:
        raise InputError("Flower is not installed; type: pip install 'fltac[flower]'")


def write_app(out: Path, config: Config) -> None:
    """Writes a Flower app: its components, the experiment's config, and a README with the commands.

    Args:
        out: Empty or missing; its name becomes the app's.
        config: The coordinator's.

    Raises:
        InputError: the folder is not empty or its name is not allowed, or the config's method cannot be federated.
    """
    name = out.absolute().name
    if not APP_NAME.fullmatch(name):
        raise InputError(
            f"{out}: the folder's name becomes the app's: a letter, then up to 31 letters, digits, hyphens"
        )
    refuse_occupied(out)
    refuse_not_federated(config)
    names = {"name": name, "package": PACKAGE, "folder": str(out), "run": f"runs/{name}"}
    files = {
        "pyproject.toml": PYPROJECT.format(**names),
        "README.md": README.format(**names),
        "experiment.yaml": to_yaml(config),
        f"{PACKAGE}/__init__.py": f'"""The Flower app {name}."""\n',
        f"{PACKAGE}/server_app.py": COMPONENT.format(side="server"),
        f"{PACKAGE}/client_app.py": COMPONENT.format(side="client"),
    }
    try:
        (out / PACKAGE).mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            write_atomic(out / path, text.encode())
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error


def resume_command(opened: RunDirectory, superlink: str | None, app: Path | None) -> list[str]:
    """What starts a federation's run again: the same app with the same run config.

    Args:
        opened: The run directory that the federation has made.
        superlink: Name of the connection in Flower's configuration; None for its default.
        app: The app's folder; None for the one that it was made in, as the coordinator named it.

    Raises:
        InputError: the app's folder is not there.
    """
    told = opened.federation() or {}
    folder, settings = app or Path(str(told.get("app") or "")), told.get("run_config")
    if not isinstance(settings, dict) or not (folder / "pyproject.toml").is_file():
        raise InputError(f"{opened.path}: its Flower app is not at {folder}; say where it is with --app")
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in sorted(settings.items()))
    return ["flwr", "run", str(folder), *([superlink] if superlink else []), "--stream", "--run-config", pairs]


def resume(opened: RunDirectory, superlink: str | None = None, app: Path | None = None) -> dict[str, Any]:
    """Starts a federation's run again and waits for its end.

    Returns:
        The run's summary.

    Raises:
        InputError: as :func:`resume_command`.
        RunError: the run has ended without a summary; Flower's output says why.
    """
    require_flower()
    name, *arguments = resume_command(opened, superlink, app)
    print(shlex.join([name, *arguments]), file=sys.stderr)
    command = [str(Path(sys.executable).parent / name), *arguments]
    ended = subprocess.run(command, check=False, stdout=sys.stderr).returncode
    summary = opened.summary()
    if summary is None:
        raise RunError(f"{opened.path}: the run has not finished; flwr ended with {ended}")
    return summary


PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "A federation of clustered low-rank adapters"
license = "Apache-2.0"
dependencies = ["fltac[flower]"]

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.flwr.app]
publisher = "coordinator"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# Every node sees these. A relative directory lies where the SuperLink was started.
[tool.flwr.app.config]
app = "{folder}"
directory = "{run}"
overrides = ""
"""

COMPONENT = '''\
"""The {side}'s side: all code is fltac's; experiment.yaml says what is run."""

from pathlib import Path

from fltac.runtime.flower_{side} import {side}_app

app = {side}_app(Path(__file__).parent.parent / "experiment.yaml")
'''

README = """\
# {name}: a federation with fltac and Flower

`experiment.yaml` is the experiment; the coordinator and every node read it. Data owners write a `client.yaml` on their
own machines, which stays there. All machines need `pip install 'fltac[flower]'`, the same version.

## Coordinator

    export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
    fltac flower certs certs --host coordinator.example.org --node hospital-a --node hospital-b
    flower-superlink --ssl-ca-certfile certs/ca.crt --ssl-certfile certs/server.pem --ssl-keyfile certs/server.key \\
        --enable-supernode-auth --host 0.0.0.0 --port 8000 --database superlink.db \\
        --disable-runtime-dependency-installation

In Flower's configuration (`$FLWR_HOME/config.toml`, else `~/.flwr/config.toml`) name the connection:

    [superlink]
    default = "federation"

    [superlink.federation]
    address = "coordinator.example.org:8000"
    root-certificates = "/path/to/certs/ca.crt"

Then, once for each node, and to start:

    flwr supernode register certs/nodes/hospital-a.pub federation --name hospital-a
    flwr run {folder} federation --stream

The run directory is `{run}`, where the SuperLink was started. After the SuperLink or the ServerApp has died, start the
SuperLink again with the same command, and continue with

    fltac resume {run} --superlink federation

## Data owner

    fltac client check client.yaml --config experiment.yaml
    flower-supernode --root-certificates ca.crt --superlink coordinator.example.org:8000 \\
        --auth-supernode-private-key hospital-a.key --node-config 'client-file="/path/to/client.yaml"'
"""
