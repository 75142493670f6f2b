"""What is compared: how large all runs are, and the methods by name, each nothing but settings."""

from dataclasses import dataclass
from pathlib import Path

from record import FOLDER

OUT = FOLDER.parent / "comparison"


@dataclass(frozen=True)
class Size:
    """How large all runs of a comparison are.

    Attributes:
        folder: Where the results lie.
        settings: What all runs have in common, beside the regime's own config.
        rows: Validation rows of a task that are scored after the last round.
        chosen: Methods whose learning rate is chosen; variants take that of their method, ``fltac`` and the oracle that
            of ``fltac-products``, so that what lies between them is the grouping alone; ``central`` the config's own.
        wide: Of published rules with one adapter for all tasks: the rank of all tasks' adapters together, at the same
            scale, as the configs say for FedIT.
        about: Tasks, backbone and what is adapted, in words.
        even: Where gradients are compared: fewer steps, so that with their batches they are as many as others'.
        rate_regime: In which learning rates are chosen.
        tried: Learning rates.
    """

    folder: Path
    settings: list[str]
    rows: int
    chosen: tuple[str, ...]
    wide: list[str]
    about: str
    rate_regime: str = "I"
    tried: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    even: tuple[str, ...] = ("training.steps=46",)

    @property
    def rates(self) -> Path:
        """Where runs lie that only the learning rate is chosen by."""
        return self.folder / "rates"

    @property
    def runs(self) -> Path:
        """Where all others lie."""
        return self.folder / "runs"


COMMON = ["federation.rounds=5", "training.steps=50", "training.threads=1"]
# Two of six layers: what the four below make of a row is made once for all runs, which takes a third of the time.
LIGHTER = ["lora.layers=[4,5]", "training.batch_size=4", "training.prefix_cache=16384"]
BASELINES = ("local", "fedit", "fltac-paper", "fltac-products")
GROUPINGS = ("ifca", "cfl", "fedlease")
SHARED = ("ffa-lora", "rolora", "fedsa-lora", "hetlora", "flexlora", "flora", "fedex-lora", "fedprox")
SHARED = (*SHARED, "fedavgm", "fedadam")
"""With one adapter for all tasks, as FedIT has."""
PUBLISHED = BASELINES + GROUPINGS + SHARED
GLUE = "Five GLUE tasks on all-MiniLM-L6-v2, 10 clients; LoRA of rank 1 (of methods with one adapter: 5) in "
DIGITS = (
    "Four questions about the same digits on the quickstart's small ViT, 8 clients; LoRA of rank 2 (of methods "
    "with one adapter: 8) in all layers"
)
WIDE = ["lora.rank=5", "lora.alpha=80"]
SIZES = {
    "small": Size(OUT, [*COMMON, *LIGHTER], 400, BASELINES, WIDE, GLUE + "the last two of six layers"),
    "full": Size(OUT / "full", COMMON, 1000, PUBLISHED, WIDE, GLUE + "all six layers"),
    "digits": Size(
        OUT / "digits", [], 1000, PUBLISHED, ["lora.rank=8", "lora.alpha=32"], DIGITS, "V", (2.5e-3, 5e-3, 1e-2), ()
    ),
}

PROFILES = ["server.clustering.profile_rows=64", "server.clustering.profile_noise=0.01"]
LIGHT = [*PROFILES, "server.clustering.profile_weight=2"]
ADJUSTED = ["training.loss=logit-adjusted"]
BY_LOSS = [
    "server.clustering.assign=loss",
    "server.clustering.assign_from=3",
    "server.clustering.assignment_loss=balanced",
    "server.clustering.held_back=0.1",
]
HALF = "federation.participation=0.5"
RANK4 = ["lora.rank=4", "lora.alpha=64"]
KINDS = ("+half", "+rank4")
"""Of federation: methods of one are compared with the oracle and FedIT of the same."""
MIXED = "lora.ranks={client-0: 2, client-2: 2, client-4: 4, client-6: 4}"
"""Half of the digits' clients train a smaller rank than 8, for the rules that can average these."""

VARIANTS: dict[str, list[str]] = {
    "": [],
    "+auto": ["server.clustering.k=auto"],
    "+profiles": PROFILES,
    "+adjusted": ADJUSTED,
    "+profiles+adjusted": [*PROFILES, *ADJUSTED],
    "+profiles2": LIGHT,
    "+profiles2+adjusted": [*LIGHT, *ADJUSTED],
    "+confidence": ["server.aggregation.weighting=confidence"],
    "+shrinkage": ["server.aggregation.shrinkage=0.5"],
    "+later": ["server.aggregation.from_round=3"],
    "+loss": BY_LOSS,
    "+single": ["server.clustering.rule=single"],
    "+hysteresis": ["server.clustering.hysteresis=0.1"],
    "+at-once": ["server.clustering.from_round=1"],
    "+no-softmax": ["server.clustering.from_round=1", "server.clustering.dual_softmax=0"],
    "+if-clear": ["server.clustering.from_round=auto"],
}
"""Of ``fltac``, and of the same with changes of A or of products instead of gradients."""
METHODS: dict[str, list[str]] = {
    "zero": ["method=zero"],
    "local": ["method=local"],
    "fedit": ["method=fedit"],
    "fedit+adjusted": ["method=fedit", *ADJUSTED],
    "fltac-paper": ["method=fltac-paper"],
    **{f"fltac-products{name}": ["server.clustering.features=products", *own] for name, own in VARIANTS.items()},
    **{f"fltac-a{name}": ["server.clustering.features=a", *own] for name, own in VARIANTS.items()},
    **{f"fltac{name}": own for name, own in VARIANTS.items() if name != "+at-once"},  # as it is
    "fltac+all-steps": [COMMON[1]],  # the batches of gradients on top of what all others make
    "fltac+half": [HALF, "training.steps=42"],  # a client's batches are once in two or three rounds, not in five
    **{f"{name}+half": [f"method={name}", HALF] for name in ("fedit", "fltac-paper", "oracle")},
    "fltac+rank4": RANK4,
    **{f"{name}+rank4": [f"method={name}", *RANK4] for name in ("fltac-paper", "oracle")},
    "fedit+rank4": ["method=fedit", "lora.rank=20", "lora.alpha=320"],  # as the config's 5 for 1
    "oracle": ["method=oracle"],
    "oracle+adjusted": ["method=oracle", *ADJUSTED],
    "central": ["method=central"],
    **{f"{name}+ranks": [f"method={name}", MIXED] for name in ("hetlora", "flexlora", "flora")},
    **{name: [f"method={name}"] for name in GROUPINGS + SHARED},
}
"""Name in the table to settings."""


def settings_of(method: str, size: Size) -> list[str]:
    """What a method changes, in runs of a size."""
    base = method.partition("+")[0]
    own = METHODS[method]
    counted = base == "fltac" and not any(setting.startswith("training.steps=") for setting in own)
    return [*(size.even if counted else ()), *own, *(size.wide if base in SHARED else ())]
