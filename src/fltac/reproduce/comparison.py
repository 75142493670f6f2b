"""A table of methods by tasks with the paper's numbers beside ours, and what differs between the two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from string import ascii_uppercase
from typing import Any, Final

from fltac.config import Config, load_config
from fltac.report.compare import Spread, majority_of, score_of, spread
from fltac.report.results import Result
from fltac.report.scores_plot import scores_figure
from fltac.reproduce.order import Made, Order, sort_overrides
from fltac.reproduce.paper import COLUMN_OF, WHOLE, Row
from fltac.reproduce.runs import METHODS, Run, config_file, finished, methods_of, runs_of
from fltac.runtime.progress import Progress
from fltac.runtime.setup import load_partition

MISSING: Final = "-"


@dataclass(frozen=True)
class Block:
    """One experiment's results.

    Attributes:
        part: The experiment.
        configs: Method to configuration.
        results: Method to result.
        sizes: Task to training and validation rows.
    """

    part: str
    configs: Mapping[str, Config]
    results: Mapping[str, Result]
    sizes: Mapping[str, tuple[int, int]]

    @property
    def tasks(self) -> list[str]:
        return list(self.sizes)

    def column(self, task: str) -> str:
        """The paper's name of a task's column; the task's own where the paper has none."""
        preset = next(iter(self.configs.values())).tasks[task].preset or task
        return COLUMN_OF.get(preset, task)


def compared(
    order: Order, progress: Progress, parts: Sequence[str], paper: Mapping[str, Row], notes: Sequence[str]
) -> Made:
    """Runs what is missing and makes the table.

    Args:
        order: What is asked for; ``methods=a,b`` leaves out the others.
        progress: Told what happens.
        parts: The table's experiments.
        paper: Method to the paper's row.
        notes: What else has to be known.

    Raises:
        InputError: see ``runs``.
    """
    overrides = sort_overrides(order.overrides, {"methods": ()}, parts)
    full = ("central-full",) if order.scale == "paper" and "central-full" in paper else ()
    methods = methods_of(overrides, (*METHODS, *full))
    planned = {part: runs_of(order, part, methods, overrides) for part in parts}
    papers = {
        part: {m: load_config(config_file(order, part, "paper"), [f"method={m}"]) for m in methods} for part in parts
    }
    blocks = [_block(part, runs, finished(order, runs, progress)) for part, runs in planned.items()]
    common = {block.part: common_differences(block, papers[block.part]) for block in blocks}
    rows = [
        row
        for method in ("majority", *methods)
        for block in blocks
        for row in _rows(block, method, paper, papers, common)
    ]
    letters = dict(zip(parts, ascii_uppercase, strict=False))
    named = [f"{letters[part]} ({part}): {'; '.join(common[part]) or 'nothing but the seeds'}." for part in parts]
    table = _table(blocks, methods, paper, papers, letters)
    pictures = {}
    if find_spec("matplotlib"):
        pictures = {f"-{block.part}": scores_figure(list(block.results.values())) for block in blocks}
    else:
        progress.message(f"{order.name}: no pictures, they need matplotlib (fltac[plot])")
    legend = (
        "Ours: the mean over the clients that hold the task of the adapter each one received; ± one standard deviation "
        "over seeds. `differs`: what is not as in the paper, or, where the paper does not say, as in its public code."
    )
    return Made({"rows": rows}, table, [legend, *named, *notes], rows, pictures)


def _block(part: str, runs: Sequence[Run], results: Sequence[Result]) -> Block:
    configs = {run.config.method: run.config for run in reversed(runs)}
    first = next(iter(configs.values()))
    tasks, _ = load_partition(first)
    sizes = {name: (len(task.train), len(task.validation)) for name, task in tasks.items()}
    return Block(part, configs, {result.method: result for result in results}, sizes)


def common_differences(block: Block, papers: Mapping[str, Config]) -> list[str]:
    """What differs in all rows of an experiment: the model, the share of the data, the rounds."""
    method = _reference(block)
    ours, theirs = block.configs[method], papers[method]
    out = []
    if ours.backbone.name != theirs.backbone.name:
        out.append(f"model {ours.backbone.name} for {theirs.backbone.name}")
    shares = []
    for task, (train, validation) in block.sizes.items():
        preset = ours.tasks[task].preset or task
        if preset not in WHOLE:
            foreign = "" if preset in COLUMN_OF else ", not a task of the paper"
            shares.append(f"{task}: {train} rows, scored on {validation}{foreign}")
            continue
        whole = WHOLE[preset]
        held_out = ours.tasks[task].validation is not None
        own = (
            f"scored on {validation} rows held out of them" if held_out else _share(validation, whole[1], "validation")
        )
        said = [_share(train, whole[0], "training"), own]
        shares += [f"{task}: {text}" for text in said if text]
    if shares:
        out.append("data " + ", ".join(shares))
    return [
        *out,
        *(f"{mine} {key} for {other}" for key, (mine, other) in _pairs(ours, theirs).items() if mine != other),
    ]


def _pairs(ours: Config, theirs: Config) -> dict[str, tuple[object, object]]:
    """What a result depends on, by name: ours and the paper's."""
    found = [
        {
            "rounds": config.federation.rounds,
            "steps a round": config.training.steps,
            "batch size": config.training.batch_size,
            "learning rate": config.training.lr,
            "clients": config.federation.clients,
            "dropout": config.lora.dropout,
            "pooling": config.backbone.pooling,
            "schedule": config.training.schedule,
            "augmentation": config.training.augment,
            "scale": config.lora.scaling,
        }
        for config in (ours, theirs)
    ]
    return {key: (found[0][key], found[1][key]) for key in found[0]}


def _reference(block: Block) -> str:
    """The method whose settings are those of all rows that do not say otherwise."""
    return next((name for name in ("fltac-paper", "fltac") if name in block.configs), next(iter(block.configs)))


def _share(rows: int, whole: int, which: str) -> str | None:
    return None if rows >= whole else f"{rows / whole:.1%} of the {which} rows"


def own_differences(block: Block, method: str, papers: Mapping[str, Config]) -> list[str]:
    """What differs in one row: the rank, what the method sets otherwise than the rest, and how many seeds there are.

    Gradients belong to no method of the paper, and are work beside its steps.
    """
    ours, theirs = block.configs[method], papers[method]
    out = [] if ours.lora.rank == theirs.lora.rank else [f"rank {ours.lora.rank} for {theirs.lora.rank}"]
    reference = _reference(block)
    usual = _pairs(block.configs[reference], papers[reference])
    for key, (mine, other) in _pairs(ours, theirs).items():
        if (mine, other) != usual[key]:
            out.append(f"{mine} {key} " + ("as there" if mine == other else f"for {other}"))
    if ours.gradient_batches:
        out.append(f"{ours.gradient_batches} batches of gradients beside the steps")
    seeds = len(block.results[method].runs)
    return [*out, "one seed" if seeds == 1 else f"{seeds} seeds"]


def _rows(
    block: Block,
    method: str,
    paper: Mapping[str, Row],
    papers: Mapping[str, Mapping[str, Config]],
    common: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """One row for each task, for CSV and JSON."""
    results = list(block.results.values())
    result = None if method == "majority" else block.results[method]
    majority = majority_of(results)
    out = []
    for task in block.tasks:
        score = (
            (Spread(majority[task], None) if task in majority else None) if result is None else score_of(result, task)
        )
        if result is None and score is None:
            continue
        own = own_differences(block, method, papers[block.part]) if result else []
        runs = result.runs if result else ()
        ari, sent = spread([run.ari for run in runs]), spread([run.up_bytes / 1e6 for run in runs])
        out.append(
            {
                "experiment": block.part,
                "method": method,
                "task": task,
                "metric": results[0].runs[0].metrics.get(task),
                "ours": None if score is None else score.mean,
                "std": None if score is None else score.deviation,
                "seeds": len(runs) or None,
                "paper": paper.get(method, {}).get(block.column(task)),
                "ari": None if ari is None else ari.mean,
                "megabytes_up": None if sent is None else sent.mean,
                "differs": "; ".join([*common[block.part], *own]),
            }
        )
    return out


def _table(
    blocks: Sequence[Block],
    methods: Sequence[str],
    paper: Mapping[str, Row],
    papers: Mapping[str, Mapping[str, Config]],
    letters: Mapping[str, str],
) -> list[list[str]]:
    """For each method our row and, where there is one, the paper's below it."""
    columns = [(block, task) for block in blocks for task in block.tasks]
    headings = [block.column(task) for block, task in columns]
    printed = {column for row in paper.values() for column in row}
    missing = sorted(printed - set(headings) - {"mean"}, key=list(COLUMN_OF.values()).index)
    mean = len(blocks) == 1
    rows = [["method", "whose", *headings, *missing, *(["mean"] if mean else []), "ARI", "MB up", "differs"]]
    for method in ("majority", *methods):
        cells = [_text(_score(block, method, task)) for block, task in columns]
        if method == "majority" and set(cells) == {MISSING}:
            continue
        results = [(block.part, block.results[method]) for block in blocks] if method != "majority" else []
        facts = [_by_part([(part, _over(result, "ari", 2)) for part, result in results])]
        facts.append(_by_part([(part, _over(result, "up", 2)) for part, result in results]))
        differs = [
            ", ".join([letters[block.part], *own_differences(block, method, papers[block.part])])
            for block in blocks
            if method != "majority"
        ]
        means = [_over(result, "mean", 3) for _, result in results[:1]] or [MISSING]
        label = f"{method} (told the tasks)" if method == "oracle" else method
        rows.append(
            [
                label,
                "ours",
                *cells,
                *(MISSING for _ in missing),
                *(means if mean else []),
                *facts,
                "; ".join(differs) or MISSING,
            ]
        )
        if method in paper:
            theirs = [paper[method].get(heading) for heading in (*headings, *missing, *(["mean"] if mean else []))]
            rows.append(["", "paper", *(MISSING if x is None else f"{x:.3f}" for x in theirs), MISSING, MISSING, ""])
    return rows


def _score(block: Block, method: str, task: str) -> Spread | None:
    if method == "majority":
        majority = majority_of(list(block.results.values()))
        return Spread(majority[task], None) if task in majority else None
    return score_of(block.results[method], task)


def _over(result: Result, what: str, digits: int) -> str:
    values: dict[str, list[float | None]] = {
        "ari": [run.ari for run in result.runs],
        "up": [run.up_bytes / 1e6 for run in result.runs],
        "mean": [run.mean_score for run in result.runs],
    }
    return _text(spread(values[what]), digits)


def _by_part(values: Sequence[tuple[str, str]]) -> str:
    """``0.53``, or ``glue 0.53, cifar 1.00`` where there are several experiments."""
    if all(text == MISSING for _, text in values):
        return MISSING
    return values[0][1] if len(values) == 1 else ", ".join(f"{part} {text}" for part, text in values)


def _text(value: Spread | None, digits: int = 3) -> str:
    return MISSING if value is None else value.text(digits)
