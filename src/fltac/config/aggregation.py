"""The settings of how the members of a cluster become one adapter, and what they cannot be combined with."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from fltac.config.base import Section

MIXING = ("hetlora", "flexlora", "flora")
"""Rules that can average adapters of different ranks."""
STEPPING = ("mean", "ffa", "rolora", "fedsa", "hetlora")
"""Rules whose factors are means, so that a server optimizer can step towards them."""


class AggregationConfig(Section):
    """How the members of a cluster become one adapter."""

    rule: Literal["mean", "ffa", "rolora", "fedsa", "hetlora", "flexlora", "flora", "fedex"] = "mean"
    """``mean``: of the factors, tensor by tensor (FedIT, arXiv 2305.05644); ``ffa``: A stays v0's (FFA-LoRA,
    2403.12313); ``rolora``: B in odd rounds, A in even ones (RoLoRA, 2409.02346); ``fedsa``: A is averaged, B stays
    each slot's own (FedSA-LoRA, 2410.01463); ``hetlora``: ranks that differ, weights by the products' norms (after
    HetLoRA, 2401.06432); ``flexlora``: SVD of the mean product (FlexLoRA, 2402.11505); ``flora``: stacking into the
    frozen weights (FLoRA, 2409.05976); ``fedex``: mean, and what it misses into the frozen weights (FedEx-LoRA,
    2410.09432). What each sends and costs: ``server.aggregation.rules``."""
    weighting: Literal["examples", "uniform", "confidence"] = "examples"
    """``examples``: by data size (Eq. 2 of the paper); ``uniform``: unweighted (its Algorithm 3); ``confidence``
    (``kmeans`` and ``spectral``): by data size times how sure a slot's cluster is: doubtful members say less."""
    from_round: Annotated[int, Field(ge=1)] = 1
    """The first round whose means are sent; before it each slot goes on from its own upload, so that more is learned
    before slots are grouped by it for good. With the rule ``mean``."""
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far a cluster that nobody is sure of is moved towards the mean of all updates; one with a mean confidence c
    goes (1 - c) times as far. With the rule ``mean``, and ``kmeans`` or ``spectral``."""
    optimizer: Literal["none", "fedavgm", "fedadam"] = "none"
    """What takes a cluster from what it held towards its members' mean: ``none``: there at once; ``fedavgm``: with
    momentum (arXiv 1909.06335); ``fedadam``: Adam on the server (arXiv 2003.00295)."""
    server_lr: Annotated[float, Field(gt=0)] | None = None
    """Of the server's optimizer; default: 1 for ``fedavgm``, 0.01 for ``fedadam``."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of ``fedavgm``."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of ``fedadam``: how much of the first moment is kept."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of ``fedadam``: how much of the second moment is kept."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """Of ``fedadam``: added to the root of the second moment, which begins at its square."""

    @property
    def trains_a(self) -> bool:
        """Whether A is trained in every round."""
        return self.rule not in ("ffa", "rolora")

    def frozen(self, round_number: int) -> str | None:
        """The ending of the factors that nobody trains or uploads in a round; None where both are trained."""
        # Not above: it brings NumPy along, and `fltac --help` is to answer at once.
        from fltac.records import LORA_A, LORA_B

        if self.rule == "ffa":
            return LORA_A
        if self.rule == "rolora":
            return LORA_A if round_number % 2 else LORA_B
        return None


def aggregation_fault(
    config: AggregationConfig,
    rank: int,
    ranks: Mapping[str, int],
    trainable: Literal["lora", "all", "none"],
    pooled: bool,
) -> str | None:
    """Says in one line which other setting a rule cannot be used with; None if all is well.

    Args:
        config: The rule.
        rank: Of the clusters' adapters.
        ranks: Of clients with fewer, by id.
        trainable: What clients train.
        pooled: Whether nothing is federated: one round, in which nothing is averaged.
    """
    rule = config.rule
    if pooled and ranks:
        return "lora.ranks: there are no clients to have them with federation.pool"
    if pooled and config.optimizer != "none":
        return f"server.aggregation.optimizer: got {config.optimizer!r}; federation.pool averages nothing, so only none"
    if pooled and rule == "rolora":
        return "server.aggregation.rule: got 'rolora', which would train B alone in the one round of federation.pool"
    if ranks and rule not in MIXING:
        return f"lora.ranks: the rule {rule!r} cannot mix ranks; {', '.join(MIXING)} can"
    for client, own in ranks.items():
        if own > rank:
            return f"lora.ranks.{client}: got {own}; allowed are 1 to lora.rank={rank}"
    if config.from_round > 1 and (rule != "mean" or config.optimizer != "none"):
        return (
            f"server.aggregation.from_round: got {config.from_round} with rule={rule} and "
            f"optimizer={config.optimizer}; allowed with mean and none"
        )
    if config.shrinkage and (rule != "mean" or config.optimizer != "none"):
        return (
            f"server.aggregation.shrinkage: got {config.shrinkage} with rule={rule} and "
            f"optimizer={config.optimizer}; allowed with mean and none"
        )
    if config.optimizer != "none" and rule not in STEPPING:
        return (
            f"server.aggregation.optimizer: got {config.optimizer!r}, which the rule {rule!r} has no use for; "
            f"{', '.join(STEPPING)} have"
        )
    if trainable == "all" and rule != "mean":
        return f"server.aggregation.rule: got {rule!r}; training.trainable=all trains no factors, so only mean"
    return None
