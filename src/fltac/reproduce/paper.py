"""The paper's printed numbers (arXiv 2404.15384), and the sizes of the whole data sets it was run on."""

from collections.abc import Mapping
from typing import Final

Row = Mapping[str, float]
"""Column of the paper's table to score."""

GLUE_AND_CIFAR: Final = ("QNLI", "QQP", "SST-2", "RTE", "MRPC", "CIFAR-10", "CIFAR-100")
DOLLY: Final = (
    *("brainstorming", "classification", "closed QA", "creative writing", "general QA"),
    *("information extraction", "open QA", "summarization", "mean"),
)


def _row(columns: tuple[str, ...], *scores: float) -> Row:
    return dict(zip(columns, scores, strict=True))


ACCURACY: Final[Mapping[str, Row]] = {
    "central-full": _row(GLUE_AND_CIFAR, 0.901, 0.875, 0.923, 0.657, 0.840, 0.987, 0.920),
    "central": _row(GLUE_AND_CIFAR, 0.792, 0.813, 0.884, 0.552, 0.685, 0.950, 0.899),
    "fedit": _row(GLUE_AND_CIFAR, 0.670, 0.510, 0.652, 0.524, 0.520, 0.935, 0.854),
    "fltac-paper": _row(GLUE_AND_CIFAR, 0.787, 0.807, 0.874, 0.532, 0.673, 0.946, 0.884),
}
"""By the method that stands for the paper's row: BERT-base and ViT-base, accuracy."""

JUDGED: Final[Mapping[str, Row]] = {
    "zero": _row(DOLLY, 0.830, 0.640, 0.725, 0.860, 0.930, 0.550, 0.963, 0.661, 0.770),
    "central": _row(DOLLY, 0.890, 0.799, 0.978, 0.930, 0.910, 0.880, 0.970, 0.880, 0.905),
    "fedit": _row(DOLLY, 0.340, 0.691, 0.768, 0.590, 0.740, 0.880, 0.770, 0.592, 0.671),
    "fltac-paper": _row(DOLLY, 0.600, 0.731, 0.855, 0.700, 0.710, 0.770, 0.610, 0.661, 0.705),
}
"""Llama-7B on Dolly by category, 0 to 1 by an LLM judge; ``zero`` is the untuned model."""

COLUMN_OF: Final[Mapping[str, str]] = {
    "qnli": "QNLI",
    "qqp": "QQP",
    "sst2": "SST-2",
    "rte": "RTE",
    "mrpc": "MRPC",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "dolly-brainstorming": "brainstorming",
    "dolly-classification": "classification",
    "dolly-closed-qa": "closed QA",
    "dolly-creative-writing": "creative writing",
    "dolly-general-qa": "general QA",
    "dolly-information-extraction": "information extraction",
    "dolly-open-qa": "open QA",
    "dolly-summarization": "summarization",
}
"""A task's preset to the column of the paper's table."""

WHOLE: Final[Mapping[str, tuple[int, int]]] = {
    "qnli": (104_743, 5_463),
    "qqp": (363_846, 40_430),
    "sst2": (67_349, 872),
    "rte": (2_490, 277),
    "mrpc": (3_668, 408),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}
"""Training and validation rows of the whole data sets on the hub."""
