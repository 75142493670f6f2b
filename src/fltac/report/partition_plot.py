"""The figure of a partition: each task's rows as one bar, cut into the clients' shares (Fig. 2a)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fltac.errors import InputError

FORMATS = (".png", ".svg", ".pdf")
LETTER_SHARE = 0.008
"""Width of a letter of a label; a name longer than its piece is left to the legend."""
LEGEND_CLIENTS = 24


def check_plot_file(path: Path) -> None:
    """Raises InputError where the figure could not be written, before anything expensive."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--plot: {path}: unknown kind of figure {path.suffix!r}; allowed are {', '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise InputError(f"--plot: {path}: {what}; expected a file in a folder that exists")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot: needs matplotlib; install fltac[plot]") from error


def shares(counts: Mapping[str, Mapping[str, int]], task: str) -> dict[str, float]:
    """Each client's share of the task's rows that were given out; clients without any left out."""
    total = sum(row.get(task, 0) for row in counts.values())
    return {client: row[task] / total for client, row in counts.items() if row.get(task)}


def plot_partition(counts: Mapping[str, Mapping[str, int]], tasks: Sequence[str], path: Path) -> None:
    """Draws the figure.

    Args:
        counts: Client to task to number of training rows.
        tasks: One bar for each, from the top.
        path: File to write; its ending says the format.

    Raises:
        InputError: see :func:`check_plot_file`.
    """
    check_plot_file(path)
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    clients = list(counts)
    legend = len(clients) <= LEGEND_CLIENTS
    height = max(1.2 + 0.55 * len(tasks), 0.3 + 0.19 * len(clients) if legend else 0.0)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    # Neighbours are far apart in colour: every other one comes from the other half of the map.
    half = (len(clients) + 1) // 2
    places = [number // 2 + half * (number % 2) for number in range(len(clients))]
    colours = [colormaps["turbo"](0.05 + 0.9 * place / len(clients)) for place in places]
    for position, task in enumerate(tasks):
        left = 0.0
        for client, share in shares(counts, task).items():
            number = clients.index(client)
            axes.barh(position, share, left=left, color=colours[number], edgecolor="white", linewidth=0.8)
            if share >= LETTER_SHARE * (len(client) + 1):
                dark = sum(colours[number][:3]) < 1.5
                axes.text(
                    *(left + share / 2, position, client),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
            left += share
    axes.set_yticks(range(len(tasks)), labels=list(tasks))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the task's rows, by client")
    if legend:
        patches = [Patch(color=colours[number], label=client) for number, client in enumerate(clients)]
        figure.legend(handles=patches, loc="outside right center", frameon=False, fontsize=7)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a figure. Raises InputError where the file cannot be written."""
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"--plot: {path} cannot be written: {error.strerror or error}") from error
