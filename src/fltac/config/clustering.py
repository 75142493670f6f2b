"""The settings of how the server groups the uploads, and what they cannot be combined with."""

from typing import Annotated, Literal

from pydantic import Field

from fltac.config.aggregation import AggregationConfig
from fltac.config.base import Positive, Section

COUNTING = ("cfl", "fedlease")
"""Rules that find K by themselves where it is not given; the others take the number of tasks."""

Compared = Literal["gradients", "a", "products"]
"""What ``spectral`` compares."""
GRADIENT_DIRECTIONS = 3
"""Of a slot's gradients of each adapted matrix, which its client sends."""


class ClusteringConfig(Section):
    """How the server groups the uploads."""

    rule: Literal["kmeans", "spectral", "single", "none", "given", "random", "ifca", "cfl", "fedlease"] = "spectral"
    """``kmeans``: K-means over the flattened LoRA factors (the paper); ``spectral``: K-means over the leading
    eigenvectors of a similarity kernel; ``single``: one group; ``none``: every slot alone; ``given``: opaque
    group numbers from outside (the oracle); ``random``: a random group; ``ifca``: clients choose by loss
    (arXiv 2006.04088); ``cfl``: clusters are bisected (arXiv 1910.01991); ``fedlease``: once, by the cosine of B
    (arXiv 2509.15087)."""
    k: Positive | Literal["auto"] | None = None
    """Number of clusters; default: the number of tasks. ``auto`` (``spectral``): as many as the uploads support, by
    how well the means of groups found in some of the adapted matrices predict their members in the others; with
    ``cannot_link`` at least as many as one client has slots. ``cfl`` needs none; ``fedlease`` takes the best
    silhouette where it is not given."""
    features: Compared | Literal["auto"] = "auto"
    """``spectral``: what is compared of each adapted matrix. ``gradients``: those of A at the bare backbone, on a few
    batches before a slot's first training, without their sign (its client sends their leading directions, once), or
    what that training changed, as with ``a``: the server takes the one whose halves agree more on the groups. ``a``:
    the change of A in all rounds, without its sign, and half as much of the head's; ``products``: the change of the
    product B A, with its sign, and as much of the head's; ``auto``: ``gradients``, but ``products`` where whole
    backbones are trained or nothing is federated."""
    gradient_batches: Positive = 20
    """Of each of a slot's tasks, of which its gradients are made."""
    extra_eigenvectors: Annotated[int, Field(ge=0)] | None = None
    """``spectral``: so many beyond the K leading ones are clustered in, too; default: 2, none with products."""
    dual_softmax: Annotated[float, Field(ge=0)] | None = None
    """``spectral`` with ``cannot_link``: how sharply the slots of two clients compete for each other, after what
    slots are to be expected to have in common is taken away; 0: it is compared as it is. Default: 1.5, but 0 with
    products."""
    head: bool = True
    """Let the head (``kmeans``) or the change of the head (``spectral``) enter the features."""
    from_round: Positive | Literal["auto"] | None = None
    """``spectral``: the first round after which slots are grouped. After those before it all are one cluster, so that
    all go on from the same adapter: what they learn then tells their tasks apart better than what they learned from v0,
    whose B is zero. Default: 1, but 2 with ``a`` (1 there, too, where there is one round, clients choose by loss, or
    means are not sent from the start). ``auto``: after the first where groups found in one half of the adapted matrices
    agree with those of the other, else (and where there are too few slots, clients or matrices to compare) after the
    second."""
    cannot_link: bool = True
    """Slots of one client fall into different clusters: with ``kmeans`` and ``spectral``, and where clients choose by
    loss; the other rules do not look at it."""
    memory: Annotated[float, Field(ge=0, le=1)] = 1.0
    """``spectral`` with changes: weight with which what was learned in earlier rounds is kept when a new round is
    added: of the second moments of changes of A, of the sum of changes of products."""
    starts: Positive = 20
    """Number of seeded starts of K-means; the best objective wins."""
    hysteresis: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """``spectral``: the grouping of the round before stays unless another one lowers its sum of squared distances (and
    with ``k: auto`` another K the error of its prediction) by more than this share."""
    profile_rows: Annotated[int, Field(ge=0)] = 0
    """``spectral``: with the first upload of a slot its client also sends a profile, the mean of what the frozen
    backbone makes of so many of its training rows, which is compared, too. It says what the rows are about."""
    profile_noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of the Gaussian noise that the client adds to each number of a profile."""
    profile_weight: Annotated[float, Field(gt=0)] = 8.0
    """Of the cosine of profiles in the kernel; that of the body has 1. It is high because a client's label skew
    adds up over the rounds in what was learned, while a profile stays as it is."""
    assign: Literal["uploads", "loss"] = "uploads"
    """``loss``: with ``kmeans`` and ``spectral``, from the round ``assign_from`` on clients choose among the clusters'
    adapters by the loss on their own rows, as with ``ifca``."""
    assign_from: Annotated[int, Field(ge=2)] = 2
    """The first round in which ``assign: loss`` holds."""
    assignment_rows: Positive = 64
    """Rows of each task that a client scores the clusters' adapters on."""
    assignment_loss: Literal["plain", "balanced"] = "plain"
    """The mean over these rows, or over the means of the classes that occur among them."""
    held_back: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a task's training rows that a client scores on and never trains on; 0: it scores on training rows."""
    spread: Annotated[float, Field(ge=0)] = 0.02
    """``ifca``: standard deviation of the first B of each cluster; with 0 all bodies begin as the same function."""
    eps1: Annotated[float, Field(ge=0)] = 0.1
    """``cfl``: a cluster may be split once the norm of its mean update is below this share of the largest it had."""
    eps2: Annotated[float, Field(ge=0)] = 0.4
    """``cfl``: and while a member's update has a norm above this share of the same largest mean."""
    k_max: Positive = 8
    """``fedlease``: the most clusters that the silhouette chooses from."""

    def compared(self, factors: bool) -> Compared | None:
        """What ``spectral`` compares; None with other rules.

        Args:
            factors: Whether clients train low-rank factors.
        """
        if self.rule != "spectral":
            return None
        if self.features != "auto":
            return self.features
        return "gradients" if factors else "products"

    @property
    def latest_first_round(self) -> int:
        """The last round that may be the first after which slots are grouped; 1 where nothing is said."""
        return 2 if self.from_round == "auto" else self.from_round or 1

    @property
    def scores(self) -> bool:
        """Whether clients choose their clusters in any round."""
        return self.rule == "ifca" or self.assign == "loss"

    def by_loss(self, round_number: int) -> bool:
        """Whether clients choose their clusters in a round."""
        return self.rule == "ifca" or (self.assign == "loss" and round_number >= self.assign_from)


def clustering_fault(config: ClusteringConfig, merging: AggregationConfig, pooled: bool) -> str | None:
    """Says in one line which other setting a rule cannot be used with; None if all is well.

    Args:
        config: The rule.
        merging: How the members of a cluster become one adapter.
        pooled: Whether nothing is federated.
    """
    rule, aggregation = config.rule, merging.rule
    if merging.weighting == "confidence" and rule not in ("kmeans", "spectral"):
        return f"server.aggregation.weighting: got 'confidence' with rule={rule}; allowed with kmeans and spectral"
    if merging.shrinkage and rule not in ("kmeans", "spectral"):
        return (
            f"server.aggregation.shrinkage: got {merging.shrinkage} with rule={rule}; allowed with kmeans and spectral"
        )
    if merging.from_round > 1 and (
        rule == "ifca" or (config.assign == "loss" and config.assign_from <= merging.from_round)
    ):
        return (
            f"server.aggregation.from_round: got {merging.from_round}, but clients are sent clusters to choose from "
            "earlier (rule=ifca, or assign=loss with assign_from up to it)"
        )
    if config.k == "auto" and rule in ("kmeans", "random", "ifca"):
        return f"server.clustering.k: got auto, but rule {rule} needs a number; allowed with spectral"
    if config.assign == "loss" and rule not in ("kmeans", "spectral"):
        return f"server.clustering.assign: got 'loss' with rule={rule}; allowed with kmeans and spectral"
    if config.latest_first_round > 1:
        if merging.from_round > 1:
            return (
                f"server.clustering.from_round: got {config.from_round}, but with server.aggregation.from_round="
                f"{merging.from_round} slots do not go on from one mean; allowed: 1"
            )
        if rule != "spectral":
            return f"server.clustering.from_round: got {config.from_round} with rule={rule}; allowed with spectral"
        if config.assign == "loss" and config.assign_from <= config.latest_first_round:
            return (
                f"server.clustering.from_round: got {config.from_round}, but clients choose among clusters from round "
                f"assign_from={config.assign_from} on; allowed: up to {config.assign_from - 1}"
            )
    if config.held_back and not config.scores:
        return "server.clustering.held_back needs rule=ifca or assign=loss, which score these rows"
    if config.profile_rows and rule != "spectral":
        return f"server.clustering.profile_rows: got {config.profile_rows} with rule={rule}; allowed with spectral"
    if config.dual_softmax and rule != "spectral":
        return f"server.clustering.dual_softmax: got {config.dual_softmax:g} with rule={rule}; allowed with spectral"
    if config.dual_softmax and not config.cannot_link:
        return (
            f"server.clustering.dual_softmax: got {config.dual_softmax:g}, but without cannot_link slots of one client "
            "do not compete; allowed: 0"
        )
    if rule == "spectral" and config.features == "gradients" and pooled:
        return "server.clustering.features: got 'gradients', but with federation.pool nobody is asked; allowed: auto"
    if rule == "spectral" and config.features == "a" and not merging.trains_a:
        return (
            f"server.clustering.features: got 'a', but {aggregation} does not always train A; allowed: auto, "
            "gradients, products"
        )
    if config.profile_noise and not config.profile_rows:
        return "server.clustering.profile_noise needs profile_rows, to whose profiles it is added"
    if pooled and config.scores:
        return "federation.pool: there is nothing to choose by loss (rule=ifca, assign=loss)"
    if config.scores and aggregation == "fedsa":
        return (
            "server.aggregation.rule: got 'fedsa', with which each slot has a B of its own, so that there is no "
            "cluster's adapter to score (rule=ifca, assign=loss); all others can"
        )
    if rule == "ifca" and aggregation == "ffa":
        return (
            "server.aggregation.rule: got 'ffa', which keeps the A of v0, but with ifca each cluster has its own; "
            "all but ffa and fedsa can"
        )
    return None
