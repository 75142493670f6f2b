"""The runs behind tables and figures: the paper's experiments under several methods and seeds, in one process.

``OUT/<experiment>/<method>/seed-<n>`` is a run directory like any other. What is finished there is read, what was
interrupted goes on, and what belongs to another configuration is refused before anything is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fltac.config import Config, load_config
from fltac.data.loading import open_splits
from fltac.data.tasks import resolve_task
from fltac.errors import InputError
from fltac.paths import BUILTIN, expand, resolve
from fltac.report.results import Result, load_results
from fltac.reproduce.order import Order, Overrides, Scale
from fltac.reproduce.output import mark
from fltac.runtime import experiment
from fltac.runtime.loop import Watch
from fltac.runtime.progress import Progress
from fltac.runtime.run_directory import CONFIG, open_existing, refuse_occupied

EXPERIMENTS: Final = {"glue": "glue-bert", "cifar": "cifar-vit", "dolly": "dolly-llama"}
"""Name of an experiment to the name of its config file, without ``-small``."""

METHODS: Final = ("zero", "local", "fedit", "fltac-paper", "fltac", "oracle", "central")
"""The majority class comes with every run."""


@dataclass(frozen=True)
class Run:
    """One run that is wanted.

    Attributes:
        config: Its configuration.
        directory: Where it lies or will lie.
    """

    config: Config
    directory: Path

    def finish(self, progress: Progress, watch: Watch | None = None) -> None:
        """Runs it, or what is left of it; ``watch`` is told of the rounds that are run."""
        progress.message(f"{self.config.method}, seed {self.config.federation.seed}: {self.directory}")
        if (self.directory / CONFIG).exists():
            experiment.resume(self.directory, progress, watch)
        else:
            experiment.run(self.config, self.directory, progress, watch)

    def check(self) -> None:
        """Raises InputError where the directory holds something else than the beginning or all of this run."""
        if not (self.directory / CONFIG).exists():
            refuse_occupied(self.directory)
            return
        open_existing(self.directory, as_started(self.config, open_existing(self.directory).config))


def config_file(order: Order, part: str, scale: Scale | None = None) -> Path:
    """The config of an experiment at a scale; default: the order's."""
    ending = "-small" if (scale or order.scale) == "small" else ""
    return order.configs / f"{EXPERIMENTS[part]}{ending}.yaml"


def config_of(order: Order, part: str, method: str, settings: Sequence[str] = ()) -> Config:
    """One experiment under one method, at the order's scale, with the seed of its config.

    Raises:
        InputError: the config is missing or wrong, or a setting is.
    """
    return load_config(config_file(order, part), [f"method={method}", *settings])


def runs_of(order: Order, part: str, methods: Sequence[str], overrides: Overrides, folder: str = "") -> list[Run]:
    """The runs of an experiment; checked, not run.

    Args:
        order: Scale, seeds and folder.
        part: The experiment.
        methods: One row each.
        overrides: Settings.
        folder: Where in the order's folder; default: the experiment's name.

    Raises:
        InputError: a config is missing or wrong, names a place that is not there, or a run directory is occupied.
    """
    runs = []
    settings = overrides.config(part)
    for text in settings:
        if text.startswith(("method=", "output.dir=")):
            raise InputError(f"{text.partition('=')[0]}: not allowed here; methods=a,b says which methods are run")
    for method in methods:
        config = config_of(order, part, method, settings)
        for seed in range(config.federation.seed, config.federation.seed + (order.seeds or 1)):
            seeded = config_of(order, part, method, [*settings, f"federation.seed={seed}"])
            runs.append(Run(seeded, order.out / (folder or part) / method / f"seed-{seed}"))
    for run in runs:
        _check_places(run.config)
        run.check()
    return runs


def finished(order: Order, runs: Sequence[Run], progress: Progress) -> list[Result]:
    """Finishes runs of one experiment and reads them, one result for each method, in the order of the methods.

    Raises:
        InputError: data or a backbone cannot be had, or is not what a run was begun with.
    """
    mark(order)
    for run in runs:
        run.finish(progress)
    folders = list(dict.fromkeys(run.directory for run in runs))
    by_method: dict[Path, list[Path]] = {}
    for folder in folders:
        by_method.setdefault(folder.parent, []).append(folder)
    return [result for folder in by_method for result in load_results([folder])]


def methods_of(overrides: Overrides, known: Sequence[str]) -> list[str]:
    """The methods to run: ``methods=a,b``, else all that are known.

    Raises:
        InputError: one that the table does not have.
    """
    text = overrides.own.get("methods")
    if text is None:
        return list(known)
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in known:
            raise InputError(f"methods: got {name!r}; allowed are {', '.join(known)}, separated by commas")
    return [name for name in known if name in named]


def as_started(config: Config, stored: Config) -> Config:
    """A configuration with what it leaves to the machine as it was chosen when a stored run began."""
    training, theirs = config.training, stored.training
    chosen = {
        "precision": theirs.precision if training.precision == "auto" else training.precision,
        "packing": theirs.packing if training.packing == "auto" else training.packing,
        "threads": theirs.threads if training.threads is None else training.threads,
    }
    device = stored.backbone.device if config.backbone.device == "auto" else config.backbone.device
    return config.model_copy(
        update={
            "training": training.model_copy(update=chosen),
            "backbone": config.backbone.model_copy(update={"device": device}),
        }
    )


def _check_places(config: Config) -> None:
    """What can be said of data and backbone without reading them or asking the hub.

    Raises:
        InputError: a variable is not set, a package, a folder or a task's files are missing.
    """
    if config.data_root is not None:
        root = Path(expand(config.data_root, "data_root"))
        if not root.is_dir():
            raise InputError(f"data_root: {config.data_root!r}: there is no folder {root}")
    for name, task in config.tasks.items():
        resolved = resolve_task(name, task, config.data_root)
        if resolved.path is not None:
            open_splits(resolved)
    if not config.backbone.name.startswith(BUILTIN):
        folder = Path(resolve(config.backbone.name, "backbone.name"))
        if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2):  # a hub id is OWNER/NAME
            raise InputError(
                f"backbone.name: {config.backbone.name!r}: there is no such folder; relative ones are looked for in "
                f"{Path.cwd()}"
            )
