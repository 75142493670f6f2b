"""The command line: a thin shell over the Python API.

Exit codes: 0 done; 1 failed while running; 2 the input is wrong, one line on stderr; 130 stopped by Ctrl-C.
With ``--json`` stdout holds JSON and nothing else. Whatever imports torch is imported in a command, so that
``--help`` answers at once.
"""

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer

import fltac
from fltac.client_commands import client_app
from fltac.config import Config, load_config
from fltac.errors import InputError, RunError
from fltac.flower_commands import flower_app
from fltac.reproduce_command import reproduce

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(client_app, name="client")
app.add_typer(flower_app, name="flower")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", show_default=False)]
NewFolder = Annotated[Path, typer.Argument(metavar="OUT", show_default=False)]
RunFolders = Annotated[list[Path], typer.Argument(metavar="DIR...", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, everything else on stderr.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line (default: the process's own) and exits with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    command = typer.main.get_command(app)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command.main(given or ["--help"], prog_name="fltac", standalone_mode=False)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        code = _fail(error.format_message() + hint, error.exit_code)
    except InputError as error:
        code = _fail(str(error), 2)
    except RunError as error:
        code = _fail(str(error), 1)
    except click.Abort:
        code = _fail("stopped", 130)
    sys.exit(code or 0)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Federated fine-tuning with low-rank, task-specific adapters that the server clusters (FL-TAC)."""
    if version:
        print(f"fltac {fltac.__version__}")


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory, empty or missing. Default: output.dir, else runs/<config>-<method>."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Run so many seeds, each into a folder seed-<n> of the run directory."),
    ] = None,
    json: Json = False,
) -> None:
    """Run the experiment of the YAML file CONFIG; KEY=VALUE overrides a setting (federation.rounds=3)."""
    from fltac.runtime.run_directory import refuse_occupied

    parsed = load_config(config, overrides or [])
    base = out or Path(parsed.output.dir or f"runs/{config.stem}-{parsed.method}")
    jobs: list[tuple[Config, Path]] = [(parsed, base)]
    if seeds is not None:
        first = parsed.federation.seed
        jobs = [
            (load_config(config, [*(overrides or []), f"federation.seed={seed}"]), base / f"seed-{seed}")
            for seed in range(first, first + seeds)
        ]
    for _, folder in jobs:
        refuse_occupied(folder)
    with _stdout_kept_for_json(json):
        results = [_run_one(job, folder) for job, folder in jobs]
    if seeds is None:
        _print_run(base, results[0], json)
    elif json:
        runs = [{"directory": folder, **summary} for (_, folder), summary in zip(jobs, results, strict=True)]
        _print_json({"directory": base, "runs": runs})
    else:
        from fltac.report.compare import comparison_table, load_results

        print(comparison_table(load_results([base])))
        print(base)


@app.command()
def resume(
    directory: RunFolder,
    superlink: Annotated[str | None, typer.Option(help="Of a federation: the connection's name for flwr run.")] = None,
    moved_app: Annotated[
        Path | None, typer.Option("--app", help="Of a federation: its Flower app's folder, if that has moved.")
    ] = None,
    json: Json = False,
) -> None:
    """Continue the run in DIR after its last checkpoint; a federation's run is started again."""
    from fltac.runtime.run_directory import open_existing

    opened = open_existing(directory)
    if opened.summary() is not None:
        _say(f"{directory} is finished")
    elif opened.federation() is not None:
        from fltac.runtime.flower_app import resume as start_again

        _print_run(directory, start_again(opened, superlink, moved_app), json)
        return
    with _stdout_kept_for_json(json), _interruptible(directory), _progress() as progress:
        from fltac.runtime import experiment

        summary = experiment.resume(directory, progress=progress).summary
    _print_run(directory, summary, json)


@app.command()
def evaluate(directory: RunFolder, overrides: Overrides = None, json: Json = False) -> None:
    """Score the newest checkpoint of the run in DIR on all validation rows.

    KEY=VALUE overrides a setting of evaluation: evaluation.generation.max_rows=8 has a language model's adapters write
    answers, and evaluation.judge.* has them judged. A judging that was stopped goes on where it was.
    """
    with _stdout_kept_for_json(json), _progress() as progress:
        from fltac.runtime import experiment

        record = experiment.evaluate(directory, progress=progress, overrides=overrides or [])
    _print_run(directory, record, json)


@app.command()
def partition(
    config: ConfigFile,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the shares into this file (png, svg, pdf).")] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Write each client's rows and client.yaml into this folder (empty or missing)."),
    ] = None,
    json: Json = False,
) -> None:
    """Show how the training rows are split over the clients by the YAML file CONFIG."""
    from fltac.report.partition_plot import check_plot_file, plot_partition
    from fltac.report.tables import partition_table

    parsed = load_config(config, overrides or [])
    if plot is not None:
        check_plot_file(plot)
    with _stdout_kept_for_json(json):
        from fltac.runtime import experiment

        split = experiment.partition_of(parsed)
        if write is not None:
            from fltac.runtime.partition_files import write_partition

            write_partition(parsed, write)
            _say(f"wrote {write}")
    tasks = list(parsed.tasks)
    counts = {
        client: {task: len(split.rows[client, task]) for task in split.client_tasks(client)} for client in split.clients
    }
    if plot is not None:
        plot_partition(counts, tasks, plot)
        _say(f"wrote {plot}")
    if json:
        _print_json({"tasks": tasks, "clients": counts})
    else:
        _print_table(partition_table(counts, tasks))


@app.command()
def export(directory: RunFolder, out: NewFolder) -> None:
    """Write every cluster's adapter of the run in DIR as a PEFT folder under OUT (empty or missing)."""
    from fltac.runtime import experiment

    for folder in experiment.export(directory, out):
        print(folder)


@app.command()
def compare(directories: RunFolders, json: Json = False) -> None:
    """Print one table for several runs; a DIR is a run, a folder of seed-<n> runs, or a folder of either."""
    from fltac.report.compare import comparison_json, comparison_table, load_results

    results = load_results(directories)
    if json:
        _print_json(comparison_json(results))
    else:
        print(comparison_table(results), end="")


app.command()(reproduce)


def _run_one(config: Config, folder: Path) -> Mapping[str, Any]:
    with _interruptible(folder), _progress() as progress:
        from fltac.runtime import experiment

        progress.message(f"{config.method}, seed {config.federation.seed}: {folder}")
        return experiment.run(config, out=folder, progress=progress).summary


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    from fltac.runtime.progress import for_stream

    progress = for_stream(sys.stderr)
    try:
        yield progress
    finally:
        progress.close()


@contextlib.contextmanager
def _interruptible(directory: Path) -> Iterator[None]:
    """Ctrl-C says what is saved and how to go on, instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        from fltac.runtime.checkpoint import newest_folder

        newest = newest_folder(directory)
        if newest is None:
            _say(f"stopped before there was a checkpoint in {directory}")
        else:
            _say(f"stopped; the last checkpoint lies at {newest}: continue with `fltac resume {directory}`")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _stdout_kept_for_json(json: bool) -> Iterator[None]:
    """What a library prints while JSON is wanted goes to stderr."""
    if not json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _print_run(directory: Path, summary: Mapping[str, Any], json: bool) -> None:
    if json:
        _print_json({"directory": directory, **summary})
        return
    from fltac.report.tables import summary_table

    _print_table(summary_table(summary))
    clustering = summary.get("clustering") or {}
    if clustering.get("ari") is not None:
        ari, accuracy = clustering["ari"], clustering["accuracy"]
        print(f"clusters {clustering.get('k')}, ARI {ari:.3f}, accuracy {accuracy:.3f}")
    print(directory)


def _print_table(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def _print_json(value: object) -> None:
    from fltac.runtime.atomic import to_json

    print(to_json(value, indent=2))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _fail(text: str, code: int) -> int:
    _say("error: " + " ".join(text.split()))
    return code
