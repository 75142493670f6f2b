"""The settings of the adapters and of one slot's local training."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fltac.config.base import Positive, Section

Loss = Literal["plain", "logit-adjusted", "balanced"]


class LoraConfig(Section):
    """Low-Rank Adaptation of the backbone's linear layers (arXiv 2106.09685)."""

    rank: Positive = 1
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[str] | None = None
    """Names of the adapted modules, matched at the end of their path; default: query and value projections."""
    layers: list[int] | None = None
    """Indices of the adapted layers; default: all."""
    ranks: dict[str, Positive] = Field(default_factory=dict)
    """Ranks of clients (by id) that train fewer than ``rank``; for the rules of aggregation that can mix ranks. The
    factor in front of B A stays that of ``rank``."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank."""

    @property
    def scaling(self) -> float:
        """The factor in front of B A."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    def rank_of(self, client: str) -> int:
        """The rank that a client trains."""
        return self.ranks.get(client, self.rank)


class TrainingConfig(Section):
    """One slot's local training in one round."""

    adapters: Literal["per-task", "shared"] = "per-task"
    """``shared``: a client trains one adapter on all its tasks, mixed batch by batch."""
    heads: Literal["per-shape", "per-task"] = "per-shape"
    """With shared adapters: one head for each number of outputs, or one for each task (the clients are told)."""
    trainable: Literal["lora", "all", "none"] = "lora"
    """``all``: full fine-tuning of the backbone, only with ``federation.pool``; ``none``: no rounds at all."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-3
    full_lr: Annotated[float, Field(gt=0)] = 5e-5
    """Learning rate where ``trainable`` is ``all``."""
    steps: Positive | None = None
    """Optimizer steps of a slot in a round (tau); 20 where neither steps nor epochs is given."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Instead of steps: passes over the slot's rows."""
    batch_size: Positive = 8
    batching: Literal["shuffled", "length"] = "length"
    """``length``: the rows that a round visits are batched by length; the same rows as ``shuffled``."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the steps of one round."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of SGD."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of one adapter's gradient."""
    loss: Loss = "plain"
    """Cross entropy. ``logit-adjusted``: the logarithm of the slot's own label shares is added to the logits
    (arXiv 2007.07314), so that the adapter need not learn them; ``balanced``: each row weighs inversely to its class's
    share. A regression's loss is always the squared error."""
    augment: Literal["none", "crop-flip"] = "none"
    """Images only. ``crop-flip``: at each visit an image is moved by up to an eighth of its size (the gap gets the mean
    colour) and, where that keeps the label, mirrored in half of all cases."""
    prox: Annotated[float, Field(ge=0)] = 0.0
    """mu of the FedProx term mu/2 |w - w_received|^2 (arXiv 1812.06127)."""
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the frozen backbone; adapters, heads and optimizer stay in float32 (float64 with ``float64``). ``auto``:
    bfloat16 on a processor that multiplies it, else float32. Stored with the run."""
    lanes: Positive | Literal["auto"] = "auto"
    """How many adapters train side by side through one pass of the backbone."""
    packing: Literal["auto"] | bool = "auto"
    """Put the rows of a pass one after the other instead of padding them; ``auto``: texts on a CPU, where the
    backbone's attention allows it. Stored with the run, since it changes rounding."""
    prefix_cache: Annotated[int, Field(ge=0)] = 1024
    """With ``lora.layers``: MiB for what the frozen layers below the first adapted one make of each row; splits of
    which all rows that a run visits fit are kept, the smallest first."""
    threads: Positive | None = None
    """CPU threads; default: as many as there are cores. Stored with the run, since it changes rounding."""

    @property
    def peak_lr(self) -> float:
        """The learning rate before schedule and warm-up."""
        return self.full_lr if self.trainable == "all" else self.lr

    @model_validator(mode="after")
    def _one_budget(self) -> "TrainingConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give training.steps or training.epochs, not both")
        return self
