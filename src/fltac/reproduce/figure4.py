"""Fig. 4: the uploaded adapters of each round in the plane, coloured by the cluster that they fell into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fltac.config import PRESETS, Config
from fltac.records import FloatArray
from fltac.reproduce.order import Made, Order, sort_overrides
from fltac.reproduce.output import mark
from fltac.reproduce.registry import refuse_missing
from fltac.reproduce.runs import EXPERIMENTS, runs_of
from fltac.reproduce.uploads import Recorder, Uploads
from fltac.runtime.progress import Progress
from fltac.runtime.run_directory import open_existing
from fltac.runtime.setup import build_clients, load_partition

ROUNDS: Final = 9
"""As in the paper's figure."""
PROJECTIONS: Final = ("umap", "pca")
MARKERS: Final = "os^DvPX*<>hp"

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """One round.

    Attributes:
        number: The round.
        uploads: What was uploaded.
        tasks: The true task of each upload.
        points: ``[n, 2]``.
        ari: Adjusted Rand index of the clusters against the tasks; None where nothing is clustered.
    """

    number: int
    uploads: Uploads
    tasks: Sequence[str]
    points: Points
    ari: float | None


def make(order: Order, progress: Progress) -> Made:
    """Runs ``experiment=`` (default ``glue``) under ``method=`` (default ``fltac-paper``) and draws its uploads.

    Raises:
        InputError: see ``runs``; ``projection=umap``, the default, needs umap-learn.
    """
    own = {"experiment": tuple(EXPERIMENTS), "projection": PROJECTIONS, "method": tuple(PRESETS)}
    overrides = sort_overrides(order.overrides, own, tuple(EXPERIMENTS))
    projection = overrides.own.get("projection", "umap")
    if projection == "umap":
        refuse_missing("figure4", {"umap": "umap"})
    part, method = overrides.own.get("experiment", "glue"), overrides.own.get("method", "fltac-paper")
    nine = sort_overrides([f"federation.rounds={ROUNDS}", "evaluation.every=0", *overrides.config(part)])
    run = runs_of(order, part, [method], nine, f"figure4{order.suffix}")[0]
    recorder = Recorder(run.directory.parent / "uploads" / run.directory.name)
    mark(order)
    run.finish(progress, recorder)
    truth = true_tasks(run.config)
    records = open_existing(run.directory).rounds()
    panels = []
    for record in records:
        uploads = recorder.read(record["round"])
        points = projected(uploads.factors, projection, run.config.federation.seed)
        tasks = [truth[key] for key in uploads.keys]
        panels.append(Panel(record["round"], uploads, tasks, points, (record.get("clustering") or {}).get("ari")))
    table = [["round", "uploads", "clusters", "ARI"], *map(_row, panels)]
    notes = [
        f"`{part}` under `{method}`, one seed. Each round's uploaded factors (A and B flattened, no heads) by "
        f"{'UMAP' if projection == 'umap' else 'the first two principal components'}, each round for itself: "
        "positions cannot be compared between panels. Colour: cluster; marker: true task, which the server never sees.",
        "Clear islands of one colour only say that the clusters were made from the same uploads. Whether an island "
        "is a task is what the markers and the ARI say.",
    ]
    data = {"experiment": part, "method": method, "projection": projection, "rounds": [_numbers(p) for p in panels]}
    return Made(data, table, notes, pictures={"": _picture(panels, list(run.config.tasks))})


def true_tasks(config: Config) -> Mapping[tuple[str, int], str]:
    """The task of every slot, as the evaluator knows it."""
    tasks, split = load_partition(config)
    return {holding.key: holding.task for holding in build_clients(config, split, tasks)[1]}


def projected(factors: FloatArray, projection: str, seed: int) -> Points:
    """The rows in the plane, float64 ``[n, 2]``; the same for the same rows."""
    if projection == "umap" and len(factors) > 3:
        import umap

        map_ = umap.UMAP(n_neighbors=min(15, len(factors) - 1), init="random", random_state=seed, n_jobs=1)
        return np.asarray(map_.fit_transform(factors), dtype=np.float64)
    centred = factors.astype(np.float64) - factors.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(factors), 2))
    points[:, : min(2, len(values))] = (left * values)[:, :2]
    largest = np.abs(points).argmax(axis=0)
    return points * np.where(points[largest, [0, 1]] < 0, -1.0, 1.0)  # the sign of a component is nobody's choice


def _row(panel: Panel) -> list[str]:
    ari = "-" if panel.ari is None else f"{panel.ari:.2f}"
    return [str(panel.number), str(len(panel.tasks)), str(len(set(panel.uploads.clusters.tolist()))), ari]


def _numbers(panel: Panel) -> dict[str, Any]:
    return {
        "round": panel.number,
        "ari": panel.ari,
        "points": [
            {"client": client, "slot": slot, "task": task, "cluster": int(cluster), "x": float(x), "y": float(y)}
            for (client, slot), task, cluster, (x, y) in zip(
                panel.uploads.keys, panel.tasks, panel.uploads.clusters, panel.points, strict=True
            )
        ],
    }


def _picture(panels: Sequence[Panel], tasks: Sequence[str]) -> Any:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns + 1.6, 2.6 * rows + 0.4), layout="constrained")
    clusters = sorted({int(number) for panel in panels for number in panel.uploads.clusters})
    colours = {number: colormaps["tab10"](place % 10) for place, number in enumerate(clusters)}
    markers = {task: MARKERS[place % len(MARKERS)] for place, task in enumerate(tasks)}
    all_axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(all_axes, panels, strict=False):
        for task, cluster, (x, y) in zip(panel.tasks, panel.uploads.clusters, panel.points, strict=True):
            axes.plot(x, y, markers[task], color=colours[int(cluster)], markersize=5, alpha=0.85, markeredgewidth=0)
        ari = "" if panel.ari is None else f", ARI {panel.ari:.2f}"
        axes.set_title(f"round {panel.number}{ari}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    said = [Line2D([], [], marker=mark_, color="#555555", linestyle="", label=task) for task, mark_ in markers.items()]
    said += [
        Line2D([], [], marker="o", color=colour, linestyle="", label=f"cluster {number}")
        for number, colour in colours.items()
    ]
    figure.legend(handles=said, loc="outside right center", frameon=False, fontsize=8)
    return figure
