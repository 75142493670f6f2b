"""The typed configuration: one record per section, every key documented."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fltac.config.aggregation import AggregationConfig, aggregation_fault
from fltac.config.answers import GenerationConfig, JudgeConfig
from fltac.config.base import Positive, Section, Share
from fltac.config.clustering import COUNTING, ClusteringConfig, clustering_fault
from fltac.config.metrics import Metric

ClientSkew = Literal["none", "labels", "length"]
Loss = Literal["plain", "logit-adjusted", "balanced"]
Device = Literal["auto", "cpu", "cuda", "mps"]


class BackboneConfig(Section):
    """The frozen pretrained model."""

    name: str
    """Hub id, local folder, ``package:<import name>/<folder>`` or ``builtin:digits-vit``; ``${VAR}`` is expanded."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    pooling: Literal["auto", "mean", "cls", "pooler"] = "auto"
    """What the head reads: the masked mean of the last hidden states, the first token's, or the checkpoint's own
    pooler. ``auto``: ``cls`` for images, else ``mean``."""
    max_length: Positive = 128
    """Text is cut after this many tokens; cut rows are counted."""
    kind: Literal["auto", "text", "image", "causal-lm"] = "auto"
    """What it is used for, where a coordinator without tasks of its own cannot read that from them."""
    device: Device = "auto"


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


class FederationConfig(Section):
    """Who takes part."""

    clients: Positive = 10
    rounds: Annotated[int, Field(ge=0)] = 5
    seed: int = 0
    participation: Share = 1.0
    """Share of the clients that are there that is asked in a round, at least ``quorum`` of them."""
    quorum: Positive = 1
    """So many clients have to be there before a round begins, and to reply for it to change anything."""
    deadline_seconds: Annotated[float, Field(gt=0)] | None = None
    """How long a round over the network waits for replies; default: until everybody who is still there has replied."""
    stale: Literal["drop", "use"] = "drop"
    """A reply after the deadline is not used, or used in the round in which it arrives."""
    partition: PartitionConfig = PartitionConfig()
    pool: Literal["none", "sum", "single"] = "none"
    """Not federated: all of a task's rows in one place, trained in one go; ``sum``: with the steps that all the
    task's slots make together over all rounds; ``single``: with the steps of one slot."""


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


class ServerConfig(Section):
    seed: int | None = None
    """Of the server's own random choices (cohorts, v0, clustering); default: ``federation.seed``."""
    clustering: ClusteringConfig = ClusteringConfig()
    aggregation: AggregationConfig = AggregationConfig()


@dataclass(frozen=True)
class ServerSettings:
    """What the server's functions are given of a configuration: it has no room for a task's name.

    Attributes:
        seed: Of the server's own choices.
        participation: Share of the clients asked in a round, in (0, 1].
        quorum: The least number of clients that must reply.
        stale: What happens to replies after their round's deadline.
        k: Number of clusters; None where the server estimates it.
        clustering: How uploads are grouped.
        aggregation: How a group becomes one adapter.
        ranks: Of clients that train a smaller rank than the clusters' adapters have, by id.
    """

    seed: int
    participation: float
    quorum: int
    stale: Literal["drop", "use"]
    k: int | None
    clustering: ClusteringConfig
    aggregation: AggregationConfig
    ranks: Mapping[str, int]


class WireConfig(Section):
    """Encoding of the payloads."""

    dtype: Literal["float32", "float16"] = "float32"
    message_mb: Positive = 1024
    """The largest message that a coordinator sends or reads over the network, in MiB."""


class EvaluationConfig(Section):
    every: Annotated[int, Field(ge=0)] = 1
    """Evaluate after every so many rounds; 0: only after the last."""
    max_rows: Positive | None = None
    """Validation rows of a task scored during the run (a fixed seeded subset); all of them at the end, except by the
    nodes of a federation, whose time is their owners'."""
    batch_size: Positive = 64
    generation: GenerationConfig | None = None
    """Of causal language models: what ``fltac evaluate`` has them write; nothing by default."""
    judge: JudgeConfig | None = None
    """Who judges it; nobody by default."""

    @model_validator(mode="after")
    def _something_to_judge(self) -> "EvaluationConfig":
        if self.judge is not None and self.generation is None:
            raise ValueError("judge needs generation: there is nothing to judge otherwise (`generation: {}` will do)")
        return self


class OutputConfig(Section):
    dir: str | None = None
    """Run directory; default ``runs/<config name>-<method>``."""
    keep_checkpoints: Positive = 2
    adapters: bool = True
    """Export each cluster's adapter as a PEFT folder at the end."""


class Config(Section):
    """A run: one method on one partition of some tasks with one seed."""

    method: str = "fltac"
    backbone: BackboneConfig
    tasks: dict[str, TaskConfig] = Field(default_factory=dict)
    """Empty for the coordinator of a federation whose tasks only the data owners know."""
    data_root: str | None = None
    """Folder with parquet files ``<data set>/<task>/<split>.parquet`` that presets read instead of the hub."""
    federation: FederationConfig = FederationConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    server: ServerConfig = ServerConfig()
    wire: WireConfig = WireConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings that hold for one method only, e.g. ``methods: {fedit: {lora: {rank: 4}}}``."""

    @model_validator(mode="before")
    @classmethod
    def _task_list(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("tasks"), list):
            names = [str(name) for name in data["tasks"]]
            if len(set(names)) < len(names):
                raise ValueError(f"tasks: got {names}; each task may stand there once")
            data = {**data, "tasks": {str(name): {"preset": str(name)} for name in data["tasks"]}}
        if isinstance(data, dict) and isinstance(data.get("tasks"), dict):
            data = {**data, "tasks": {name: task or {"preset": name} for name, task in data["tasks"].items()}}
        return data

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        grouping = self.server.clustering
        if not self.tasks and grouping.k is None and grouping.rule not in COUNTING:
            raise ValueError("tasks: there are none; without tasks server.clustering.k has to be given")
        if self.training.trainable == "all" and not self.pooled:
            raise ValueError("training.trainable=all needs federation.pool=sum or single")
        if self.pooled and self.training.adapters == "shared":
            raise ValueError("federation.pool needs training.adapters=per-task")
        if self.federation.partition.rule == "table" and not self.federation.partition.table:
            raise ValueError("federation.partition.rule=table needs federation.partition.table")
        if self.federation.quorum > self.federation.clients:
            raise ValueError(
                f"federation.quorum: got {self.federation.quorum}; at most federation.clients={self.federation.clients}"
            )
        fault = clustering_fault(grouping, self.server.aggregation.rule, self.pooled)
        if fault is not None:
            raise ValueError(fault)
        lora, trainable = self.lora, self.training.trainable
        fault = aggregation_fault(self.server.aggregation, lora.rank, lora.ranks, trainable, self.pooled)
        if fault is not None:
            raise ValueError(fault)
        return self

    @property
    def clusters(self) -> int | None:
        """K: as configured, else the number of tasks; None where the server estimates it."""
        k = self.server.clustering.k
        return None if k == "auto" else k or len(self.tasks)

    @property
    def server_settings(self) -> ServerSettings:
        """The part of the configuration that the server may see."""
        return ServerSettings(
            seed=self.federation.seed if self.server.seed is None else self.server.seed,
            participation=1.0 if self.pooled else self.federation.participation,
            quorum=1 if self.pooled else self.federation.quorum,
            stale=self.federation.stale,
            k=self.clusters,
            clustering=self.server.clustering,
            aggregation=self.server.aggregation,
            ranks=self.lora.ranks,
        )

    @property
    def pooled(self) -> bool:
        """Nothing is federated: all of a task's rows lie in one place."""
        return self.federation.pool != "none"

    @property
    def rounds(self) -> int:
        """Rounds that are run: a pooled training is one round with all the steps."""
        if self.training.trainable == "none":
            return 0
        return min(1, self.federation.rounds) if self.pooled else self.federation.rounds

    @property
    def communicates(self) -> bool:
        """False where every slot keeps its own adapter, so that nothing needs to be sent."""
        return self.server.clustering.rule != "none"

    @property
    def wire_dtype(self) -> Literal["float32", "float16"]:
        """What adapters are rounded to between the parties."""
        return self.wire.dtype if self.communicates else "float32"
