"""The figure of a partition: each task's rows as one bar, cut into the clients' shares (Fig. 2a)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fltac.errors import InputError

FORMATS = (".png", ".svg", ".pdf")
LABELLED_SHARE = 0.04
"""A narrower piece has no room for the client's name."""


def check_plot_file(path: Path) -> None:
    """Raises InputError where the figure could not be written, before anything expensive."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--plot: {path}: unknown kind of figure {path.suffix!r}; allowed are {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise InputError(f"--plot: {path}: the folder {path.parent} does not exist")
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

    figure = Figure(figsize=(8, 1.2 + 0.55 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    clients = list(counts)
    colours = colormaps["turbo"].resampled(max(2, len(clients)))
    for position, task in enumerate(tasks):
        left = 0.0
        for client, share in shares(counts, task).items():
            number = clients.index(client)
            axes.barh(position, share, left=left, color=colours(number), edgecolor="white", linewidth=0.8)
            if share >= LABELLED_SHARE:
                dark = sum(colours(number)[:3]) < 1.5
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
    figure.savefig(path)
