"""``fltac flower ...``: what the coordinator of a federation over the network needs."""

from pathlib import Path
from typing import Annotated

import typer

from fltac.config import load_config

flower_app = typer.Typer(help="For the coordinator of a federation with Flower.", no_args_is_help=True)

NewFolder = Annotated[Path, typer.Argument(metavar="OUT", show_default=False)]


@flower_app.command()
def init(
    out: NewFolder,
    config: Annotated[
        Path, typer.Option(help="The experiment's YAML, such as a coordinator.yaml.", show_default=False)
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
) -> None:
    """Write a Flower app to OUT (empty or missing): its components, the experiment, a README with the commands."""
    from fltac.runtime.flower_app import require_flower, write_app

    require_flower()
    write_app(out, load_config(config, overrides or []))
    print(out)


@flower_app.command()
def certs(
    out: NewFolder,
    host: Annotated[list[str] | None, typer.Option(help="A name or address of the SuperLink; may be repeated.")] = None,
    node: Annotated[list[str] | None, typer.Option(help="A node to make a key for; may be repeated.")] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the certificates hold.")] = 365,
) -> None:
    """Write a development CA, a server certificate and node keys to OUT (empty or missing)."""
    from fltac.runtime.flower_app import require_flower

    require_flower()
    from fltac.runtime.flower_certs import write_certificates

    write_certificates(out, host or [], node or [], days)
    print(out)
