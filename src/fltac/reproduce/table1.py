"""Table 1: accuracy on GLUE and CIFAR by method."""

from fltac.reproduce.comparison import compared
from fltac.reproduce.order import Made, Order
from fltac.reproduce.paper import ACCURACY
from fltac.runtime.progress import Progress

NOTES = (
    "The paper's rows have no majority class, no untrained model and no oracle; its FedIT is below the majority class "
    "on QQP, RTE and MRPC. A small ViT that has seen CIFAR-10's images and a MiniLM that has seen QQP are no "
    "BERT-base and no ViT-base: the numbers of `small` show each method at work, not the paper's scores.",
)


def make(order: Order, progress: Progress) -> Made:
    """Runs what is missing. Raises InputError: see :func:`fltac.reproduce.comparison.compared`."""
    return compared(order, progress, ("glue", "cifar"), ACCURACY, NOTES if order.scale == "small" else ())
