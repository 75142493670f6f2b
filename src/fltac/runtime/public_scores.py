"""What a coordinator can say of the adapters: the nodes' own scores by slot, and scores on public rows of its own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from fltac.config.metrics import HIGHEST_LOSS, LOWER_IS_BETTER
from fltac.evaluation import evaluation_rows, measure, with_head
from fltac.records import ServerState
from fltac.runtime.loop import Record
from fltac.runtime.setup import Experiment
from fltac.wire.node_protocol import Scores

QUANTILES = {"min": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "max": 1.0}


def slot_scores(scores: Mapping[str, Scores], metric: str = "accuracy") -> Record:
    """The scores that the nodes reported, each on its own validation rows.

    Args:
        scores: By client.
        metric: Says which way is better.

    Returns:
        ``slots`` (their number), ``mean`` over slots, ``distribution``, ``worst_client`` (by the mean of its slots)
        and ``clients``: for each client id and slot its score and number of rows. Everything but ``slots`` is None
        or empty where nobody has reported.
    """
    values = [slot.score for item in scores.values() for slot in item.slots.values()]
    means = {
        client: float(np.mean([slot.score for slot in item.slots.values()]))
        for client, item in sorted(scores.items())
        if item.slots
    }
    choose = max if metric in LOWER_IS_BETTER else min
    worst = choose(means, key=lambda client: means[client], default=None)
    return {
        "slots": len(values),
        "mean": float(np.mean(values)) if values else None,
        "distribution": {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
        if values
        else None,
        "worst_client": None if worst is None else {"client": worst, "score": means[worst]},
        "clients": {
            client: {str(slot): {"score": one.score, "n_eval": one.rows} for slot, one in sorted(item.slots.items())}
            for client, item in sorted(scores.items())
        },
    }


def public_scores(experiment: Experiment, state: ServerState, max_rows: int | None) -> dict[str, dict[str, Any]]:
    """Scores the clusters on the coordinator's own tasks.

    Which slots hold a task nobody knows here, so tasks and clusters are matched one to one, at the best sum of scores.

    Returns:
        By task: metric, the matched cluster's score and id, and the number of rows; ``worst_client`` is None. A task
        without a cluster that has its head is left out.
    """
    tasks, config = experiment.tasks, experiment.config
    clusters = [cluster for cluster in state.clusters if cluster.members]
    names = list(tasks)
    table = np.full((len(names), len(clusters)), -np.inf)
    rows = {name: evaluation_rows(tasks[name], max_rows, config.federation.seed) for name in names}
    for row, name in enumerate(names):
        task, key = tasks[name], tasks[name].head_key
        for column, cluster in enumerate(clusters):
            if key and f"head.{key}.weight" not in cluster.adapter:
                continue
            adapter = with_head(cluster.adapter, state.initial, key)
            batch_size = config.evaluation.batch_size
            table[row, column] = measure(experiment.model, adapter, key, task, rows[name], batch_size)[task.metric]
    # A pair that cannot be is worse than any score, which are from -1 to 1, and losses that come to something.
    gain = np.where([[tasks[name].metric in LOWER_IS_BETTER] for name in names], -table, table) if names else table
    usable = np.where(np.isfinite(table), gain, -2.0 - HIGHEST_LOSS)
    chosen = linear_sum_assignment(usable, maximize=True) if names else ((), ())
    return {
        names[row]: {
            "metric": tasks[names[row]].metric,
            "score": float(table[row, column]),
            "worst_client": None,
            "n_eval": len(rows[names[row]]),
            "cluster": clusters[column].id,
        }
        for row, column in zip(*chosen, strict=True)
        if np.isfinite(table[row, column])
    }
