"""Methods by name: a method is nothing but settings."""

from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]

OWNED: Tree = {
    "federation": {"pool": "none"},
    "training": {"adapters": "per-task", "heads": "per-shape", "trainable": "lora", "prox": 0.0},
    "server": {
        "clustering": {
            "rule": "spectral",
            "features": "auto",
            "extra_eigenvectors": None,
            "dual_softmax": None,
            "from_round": None,
            "head": True,
            "cannot_link": True,
            "starts": 20,
            "profile_rows": 0,
            "profile_noise": 0.0,
            "assign": "uploads",
            "assignment_loss": "plain",
            "held_back": 0.0,
        },
        "aggregation": {
            "rule": "mean",
            "weighting": "examples",
            "from_round": 1,
            "shrinkage": 0.0,
            "optimizer": "none",
        },
    },
}
"""The settings that make a method. Every preset sets all of them, so that nothing of another method is left over."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Returns ``base`` with the leaves of ``over`` put over it; a mapping merges, anything else replaces."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def _shared(**aggregation: str) -> Tree:
    """One adapter for everybody, as FedIT, with other rules of aggregation."""
    return {
        "training": {"adapters": "shared"},
        "server": {"clustering": {"rule": "single"}, "aggregation": aggregation},
    }


_OWN: dict[str, Tree] = {
    # The best default known so far.
    "fltac": {},
    # The paper's rules: K-means over flattened factors, unweighted mean.
    "fltac-paper": {
        "server": {
            "clustering": {"rule": "kmeans", "head": False, "cannot_link": False, "starts": 10},
            "aggregation": {"weighting": "uniform"},
        }
    },
    # FedIT (arXiv 2305.05644): one shared adapter, one head per shape.
    "fedit": _shared(),
    # The same, told the tasks: one head per task.
    "fedit-heads": {
        "training": {"adapters": "shared", "heads": "per-task"},
        "server": {"clustering": {"rule": "single"}},
    },
    # Published federated methods with one shared adapter, by their rule of aggregation or optimization.
    "ffa-lora": _shared(rule="ffa"),
    "rolora": _shared(rule="rolora"),
    "fedsa-lora": _shared(rule="fedsa"),
    "hetlora": _shared(rule="hetlora", weighting="uniform"),
    "flexlora": _shared(rule="flexlora"),
    "flora": _shared(rule="flora"),
    "fedex-lora": _shared(rule="fedex", weighting="uniform"),
    "fedprox": merge(_shared(), {"training": {"prox": 0.01}}),
    "fedavgm": _shared(optimizer="fedavgm"),
    "fedadam": _shared(optimizer="fedadam"),
    # Every slot trains alone.
    "local": {"server": {"clustering": {"rule": "none"}}},
    # Averages by true task.
    "oracle": {"server": {"clustering": {"rule": "given"}}},
    # Averages random groups.
    "random": {"server": {"clustering": {"rule": "random"}}},
    # IFCA (arXiv 2006.04088): each slot takes the cluster with the least loss on its rows, unweighted mean.
    "ifca": {
        "server": {
            "clustering": {"rule": "ifca", "cannot_link": False},
            "aggregation": {"weighting": "uniform"},
        }
    },
    # Clustered federated learning (arXiv 1910.01991): one cluster, bisected again and again.
    "cfl": {"server": {"clustering": {"rule": "cfl", "cannot_link": False}}},
    # The allocation of FedLEASE (arXiv 2509.15087) alone: once, by the cosine of B, unweighted mean.
    "fedlease": {
        "server": {
            "clustering": {"rule": "fedlease", "head": False, "cannot_link": False},
            "aggregation": {"weighting": "uniform"},
        }
    },
    # All of a task's rows in one place, LoRA, the steps of all its slots together.
    "central": {"federation": {"pool": "sum"}, "server": {"clustering": {"rule": "none"}}},
    # The same with the steps of one slot.
    "central-single": {"federation": {"pool": "single"}, "server": {"clustering": {"rule": "none"}}},
    # Full fine-tuning of the backbone on all of a task's rows.
    "central-full": {
        "federation": {"pool": "sum"},
        "training": {"trainable": "all"},
        "server": {"clustering": {"rule": "none"}},
    },
    # The adapter that everybody starts from.
    "zero": {"training": {"trainable": "none"}, "server": {"clustering": {"rule": "none"}}},
}

PRESETS: dict[str, Tree] = {name: merge(OWNED, own) for name, own in _OWN.items()}
"""A method is nothing but settings."""
