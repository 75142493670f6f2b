"""The settings of what is learned from: data sets, and who holds which of their rows."""

from typing import Annotated, Literal

from pydantic import Field

from fltac.config.base import Positive, Section
from fltac.config.metrics import Metric

ClientSkew = Literal["none", "labels", "length"]


class TaskConfig(Section):
    """One data set. A preset fills what is not given; see ``fltac.data.tasks``."""

    preset: str | None = None
    """Name of a preset (sst2, mrpc, qqp, qnli, rte, cola, mnli, stsb, cifar10, cifar10-animal, cifar10-rotation,
    cifar100, digits-..., dolly-...)."""
    kind: Literal["text", "image", "causal-lm"] | None = None
    """``causal-lm``: a language model learns to answer; it has no head, and the loss is on the response alone."""
    hub: str | None = None
    """Hub id of a data set; ``subset`` is its configuration."""
    subset: str | None = None
    path: str | None = None
    """A parquet, csv or jsonl file, or a folder (image folder, or ``<split>.parquet`` files); ``${VAR}`` is
    expanded."""
    train_split: str = "train"
    validation_split: str | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows kept for validation where the data has no validation split."""
    validation_path: str | None = None
    """File with the validation rows, where they lie apart."""
    columns: list[str] | None = None
    """One or two text columns, one image column, or (``causal-lm``) instruction, perhaps context, and response."""
    filter: dict[str, str] | None = None
    """Only rows that hold these values, by column: ``{category: open_qa}``."""
    template: Literal["alpaca", "chat"] | None = None
    """``causal-lm``: how instruction and context become a prompt. ``alpaca``: headed sections; ``chat``: the
    tokenizer's own chat template. Default: alpaca."""
    prompt_cut: Literal["left", "right"] | None = None
    """``causal-lm``: where instruction and context of a row that is too long lose tokens. Default: right."""
    long_response: Literal["drop", "cut"] | None = None
    """``causal-lm``: what happens to a row whose response does not fit by itself. Default: drop."""
    label: str | None = None
    """Label column."""
    labels: list[str] | None = None
    """Class names in the order of their numbers, where the label column holds names."""
    classes: dict[str, list[str | int]] | None = None
    """Another label space from the same column: ``{animal: [bird, cat], vehicle: [ship]}`` makes of each group one
    class, in this order. Every class of the column stands in one group."""
    transform: Literal["rotate4"] | None = None
    """``rotate4``: every image is turned by 0, 90, 180 or 270 degrees, a fixed function of split and row, and the turn
    is its label; the label column is not read."""
    mirror: bool | None = None
    """Whether a mirrored image has the same label, so that ``training.augment`` may mirror it; default: yes, but with
    ``transform``."""
    metric: Metric | None = None
    """``pearson`` makes the task a regression with one output; ``loss`` is that of ``causal-lm`` tasks."""
    max_rows: Positive | None = None
    """Use the first so many rows of the seeded order of the training rows."""
    max_validation_rows: Positive | None = None
    """The same of the validation rows: the rest is never read, nor scored at the end."""


class PartitionConfig(Section):
    """How each task's training rows are split over the clients."""

    rule: Literal["dirichlet", "iid", "label-skew", "table"] = "dirichlet"
    """``dirichlet``: shares of a task over clients ~ Dirichlet(alpha); ``iid``: equal shares; ``label-skew``:
    Dirichlet(alpha) for each class of a task; ``table``: the shares in ``table``."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """A client whose share of a task is below this gets none of it."""
    max_tasks_per_client: Positive | None = None
    client_skew: ClientSkew = "none"
    """What a client's rows have in common over all its tasks. ``labels``: it keeps each class with a probability of
    its own, by class number; ``length``: it keeps one quarter of each task's rows, by their length. Other rows are in
    nobody's hands."""
    table: dict[str, dict[str, float]] | None = None
    """``{client: {task: share of that task's rows}}``; the shares of a task sum to at most 1."""
