"""fltac: federated fine-tuning with low-rank, task-specific adapters that the server clusters.

The whole public API::

    config = fltac.load_config("configs/quickstart.yaml", ["federation.rounds=3"])
    result = fltac.run(config, out="runs/quickstart")
    result.summary["mean_score"]

Importing this package does not import torch; ``run`` and its companions do.
"""

from typing import TYPE_CHECKING, Any

from fltac.config import Config, load_config
from fltac.errors import InputError, RunError

if TYPE_CHECKING:
    from fltac.runtime.experiment import RunResult, evaluate, export, resume, run

__version__ = "0.1.0"

__all__ = [
    "Config",
    "InputError",
    "RunError",
    "RunResult",
    "evaluate",
    "export",
    "load_config",
    "resume",
    "run",
]

_LAZY = {"RunResult", "evaluate", "export", "resume", "run"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from fltac.runtime import experiment

        return getattr(experiment, name)
    raise AttributeError(f"module 'fltac' has no attribute {name!r}")
