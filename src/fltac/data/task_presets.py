"""Tasks that a config can name: GLUE, CIFAR, Dolly and the built-in digits.

GLUE: arXiv 1804.07461. The paper (arXiv 2404.15384) scores SST-2, MRPC, QQP, QNLI, RTE and CIFAR by accuracy.
"""

from typing import Any

from fltac.config import TaskConfig
from fltac.config.metrics import Metric

GLUE = "nyu-mll/glue"
DOLLY = "databricks/databricks-dolly-15k"
DOLLY_HELD_OUT = 0.1
FOLDERS = {DOLLY: "dolly"}
"""Names of data sets' folders below ``data_root``, where that is not the last part of the hub id."""
DIGITS = "builtin:digits"


def _glue(
    subset: str, columns: list[str], metric: Metric = "accuracy", validation_split: str = "validation"
) -> TaskConfig:
    return TaskConfig(
        kind="text",
        hub=GLUE,
        subset=subset,
        validation_split=validation_split,
        columns=columns,
        label="label",
        metric=metric,
    )


def _cifar(name: str, label: str | None, **settings: Any) -> TaskConfig:
    return TaskConfig(
        kind="image",
        hub=f"uoft-cs/{name}",
        validation_split="test",
        columns=["img"],
        label=label,
        metric="accuracy",
        **settings,
    )


def _digits() -> TaskConfig:
    return TaskConfig(
        kind="image",
        path=DIGITS,
        validation=0.25,
        columns=["image"],
        label="label",
        metric="accuracy",
        mirror=False,
    )


CIFAR10_GROUPS: dict[str, list[str | int]] = {
    "animal": ["bird", "cat", "deer", "dog", "frog", "horse"],
    "vehicle": ["airplane", "automobile", "ship", "truck"],
}


def _dolly(category: str) -> TaskConfig:
    return TaskConfig(
        kind="causal-lm",
        hub=DOLLY,
        filter={"category": category},
        columns=["instruction", "context", "response"],
        validation=DOLLY_HELD_OUT,
        metric="loss",
    )


TASK_PRESETS: dict[str, TaskConfig] = {
    "sst2": _glue("sst2", ["sentence"]),
    "mrpc": _glue("mrpc", ["sentence1", "sentence2"]),
    "qqp": _glue("qqp", ["question1", "question2"]),
    "qnli": _glue("qnli", ["question", "sentence"]),
    "rte": _glue("rte", ["sentence1", "sentence2"]),
    "cola": _glue("cola", ["sentence"], metric="matthews"),
    "mnli": _glue("mnli", ["premise", "hypothesis"], validation_split="validation_matched"),
    "stsb": _glue("stsb", ["sentence1", "sentence2"], metric="pearson"),
    "cifar10": _cifar("cifar10", "label"),
    "cifar10-animal": _cifar("cifar10", "label", classes=CIFAR10_GROUPS),
    "cifar10-rotation": _cifar("cifar10", None, transform="rotate4"),
    "cifar100": _cifar("cifar100", "fine_label"),
    "dolly-brainstorming": _dolly("brainstorming"),
    "dolly-classification": _dolly("classification"),
    "dolly-closed-qa": _dolly("closed_qa"),
    "dolly-creative-writing": _dolly("creative_writing"),
    "dolly-general-qa": _dolly("general_qa"),
    "dolly-information-extraction": _dolly("information_extraction"),
    "dolly-open-qa": _dolly("open_qa"),
    "dolly-summarization": _dolly("summarization"),
    "digits-parity": _digits(),
    "digits-high": _digits(),
    "digits-loop": _digits(),
    "digits-three": _digits(),
}
"""Settings that a task of this name gets where its config says nothing else."""
