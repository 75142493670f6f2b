"""``fltac client ...``: what a data owner runs on its own machine."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fltac.config import load_config

if TYPE_CHECKING:
    from fltac.runtime.check import ClientCheck

client_app = typer.Typer(help="For a data owner of a federation.")


@client_app.callback()
def _client() -> None:
    """For a data owner of a federation."""


@client_app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    config: Annotated[Path, typer.Option(help="The coordinator's config.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, everything else on stderr.")] = False,
) -> None:
    """Check the client file FILE: read its data, train three steps on each task, estimate a round. Sends nothing."""
    parsed = load_config(config)
    with contextlib.redirect_stdout(sys.stderr):
        from fltac.runtime.check import check_client

        found = check_client(parsed, file)
    if json:
        from fltac.runtime.atomic import to_json

        print(to_json(found.record(), indent=2))
    else:
        _print(found)


def _print(found: "ClientCheck") -> None:
    from rich.console import Console

    from fltac.report.tables import client_table

    Console().print(client_table(found.record()["tasks"]))
    memory = f"{found.peak_memory_bytes / 2**20:.0f} MB of memory"
    if found.peak_gpu_bytes is not None:
        memory += f" and {found.peak_gpu_bytes / 2**20:.0f} MB of the GPU's"
    print(
        f"client {found.client}: a round takes about {found.seconds:.1f} s on {found.device} with {found.threads} "
        f"thread{'s' if found.threads > 1 else ''}, {memory}, and uploads {found.upload_bytes / 1000:.1f} kB"
    )
