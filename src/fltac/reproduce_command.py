"""``fltac reproduce NAME``: the paper's tables and figures."""

import contextlib
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fltac.errors import InputError

SOURCE_CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
"""Where the experiments lie if this package is used from its source tree."""


class ScaleOption(StrEnum):
    """``--scale``."""

    small = "small"
    paper = "paper"


def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    scale: Annotated[ScaleOption, typer.Option(help="Two cores and local data, or the paper's.")] = ScaleOption.small,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for all items of a scale. Default: runs/reproduce-<scale>, with the settings."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default: one; of figure3 ten.")] = None,
    configs: Annotated[
        Path | None, typer.Option(help="Folder with the experiments. Default: configs/paper of the source tree.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, everything else on stderr.")] = False,
) -> None:
    """Make one table or figure of the paper; what is finished in the folder is not run again.

    NAME: table1, table2, figure2, figure3, figure4 or parameters.

    KEY=VALUE changes a setting of all its experiments (lora.rank=2), or of one (glue.lora.rank=2).
    """
    from fltac.reproduce.order import Order
    from fltac.reproduce.registry import as_json, check_name
    from fltac.reproduce.registry import reproduce as make

    check_name(name)
    folder = configs or SOURCE_CONFIGS
    if not folder.is_dir():
        raise InputError(f"--configs: {folder}: no such folder; expected configs/paper of fltac's source tree")
    out = out or Path("runs") / "-".join(
        [f"reproduce-{scale}", *(re.sub(r"[^\w.=]+", "_", text) for text in overrides or ())]
    )
    order = Order(name, scale.value, tuple(overrides or ()), seeds, out, folder)
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        from fltac.runtime.progress import for_stream

        progress = for_stream(sys.stderr)
        try:
            made, output = make(order, progress)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on with what is in {out}", file=sys.stderr)
            raise typer.Exit(130) from None
        finally:
            progress.close()
    if json:
        from fltac.runtime.atomic import to_json

        print(to_json(as_json(made, output), indent=2))
        return
    from fltac.report.compare import markdown_table

    print(markdown_table(made.table))
    print("\n" + "\n\n".join(made.notes))
    for path in output.files(made):
        print(path, file=sys.stderr)
