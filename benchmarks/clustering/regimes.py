"""The regimes of the clustering lab: a committed config and what is changed in it."""

from pathlib import Path

from fltac import load_config
from fltac.config import Config

CONFIGS = Path(__file__).parents[2] / "configs"
GLUE, DIGITS = CONFIGS / "glue-minilm.yaml", CONFIGS / "quickstart.yaml"
IMAGES, DOLLY = CONFIGS / "paper" / "cifar-vit-small.yaml", CONFIGS / "paper" / "dolly-llama-small.yaml"

REGIMES: dict[str, tuple[Path, list[str]]] = {
    # Dirichlet 0.5, about four of five tasks at a client.
    "I": (GLUE, []),
    # The same, and a client's label shares are skewed alike in all its tasks.
    "II": (GLUE, ["federation.partition.client_skew=labels"]),
    # Two or three tasks at a client.
    "III": (GLUE, ["federation.partition.max_tasks_per_client=3"]),
    # Domain shift: a client has one quarter of each task's rows, by length.
    "IV": (GLUE, ["federation.partition.client_skew=length"]),
    # Four questions about the same digits.
    "V": (DIGITS, []),
    # Three tasks of different label spaces from the same images; nothing was ever chosen by this one and the next.
    "VI": (IMAGES, []),
    # The eight categories of Dolly: a language model without a head. Other lengths of rows, hardly another language.
    "VII": (DOLLY, []),
}
"""By name."""


def regime_config(regime: str, seed: int, overrides: list[str]) -> Config:
    """The configuration of a regime with a seed and further settings."""
    path, own = REGIMES[regime]
    return load_config(path, [*own, f"federation.seed={seed}", *overrides])
