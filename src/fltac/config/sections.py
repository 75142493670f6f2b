"""The typed configuration: one record per section, every key documented."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fltac.config.aggregation import AggregationConfig, aggregation_fault
from fltac.config.answers import GenerationConfig, JudgeConfig
from fltac.config.base import Positive, Section, Share
from fltac.config.clustering import COUNTING, ClusteringConfig, clustering_fault
from fltac.config.data import PartitionConfig, TaskConfig
from fltac.config.training import LoraConfig, TrainingConfig

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
        merging, rounds = self.server.aggregation.from_round, max(1, self.rounds)
        if merging > rounds:
            raise ValueError(f"server.aggregation.from_round: got {merging}; at most federation.rounds={self.rounds}")
        if grouping.latest_first_round > rounds:
            said = f"{grouping.from_round}" + (" (1 or 2)" if grouping.from_round == "auto" else "")
            raise ValueError(f"server.clustering.from_round: got {said}; at most federation.rounds={self.rounds}")
        fault = clustering_fault(grouping, self.server.aggregation, self.pooled)
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
        grouping, aggregation = self.server.clustering, self.server.aggregation
        at_once = self.rounds < 2 or grouping.assign == "loss" or aggregation.from_round > 1
        if grouping.from_round is None and at_once:
            grouping = grouping.model_copy(update={"from_round": 1})
        if self.pooled and grouping.features == "auto":
            grouping = grouping.model_copy(update={"features": "products"})
        return ServerSettings(
            seed=self.federation.seed if self.server.seed is None else self.server.seed,
            participation=1.0 if self.pooled else self.federation.participation,
            quorum=1 if self.pooled else self.federation.quorum,
            stale=self.federation.stale,
            k=self.clusters,
            clustering=grouping,
            aggregation=aggregation,
            ranks=self.lora.ranks,
        )

    @property
    def gradient_batches(self) -> int:
        """Batches of each task whose gradients are made before a slot's first training."""
        grouping = self.server_settings.clustering
        compared = grouping.compared(self.training.trainable == "lora")
        return grouping.gradient_batches if compared == "gradients" else 0

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
