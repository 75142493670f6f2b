"""Table 2: the categories of Dolly by method."""

from fltac.reproduce.comparison import compared
from fltac.reproduce.order import Made, Order
from fltac.reproduce.paper import JUDGED
from fltac.runtime.progress import Progress

NOTES = (
    "The paper's numbers are scores from 0 to 1 by an LLM judge (higher is better). Ours are the metric that the CSV "
    "names, as a run writes it without a judge; where that is a loss, lower is better, and the two rows of a "
    "method cannot be compared with each other, only methods within one source.",
)


def make(order: Order, progress: Progress) -> Made:
    """Runs what is missing. Raises InputError: see :func:`fltac.reproduce.comparison.compared`."""
    return compared(order, progress, ("dolly",), JUDGED, NOTES)
