"""What a coordinator can say of the adapters: the nodes' own scores by slot, and scores on public rows of its own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from fltac.data.metrics import predictions_from_logits, score
from fltac.evaluation import evaluation_rows, predict_logits, with_head
from fltac.records import ServerState
from fltac.runtime.loop import Record
from fltac.runtime.setup import Experiment
from fltac.wire.node_protocol import Scores

QUANTILES = {"min": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "max": 1.0}


def slot_scores(scores: Mapping[str, Scores]) -> Record:
    """The scores that the nodes reported, each on its own validation rows.

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
    worst = min(means, key=lambda client: means[client], default=None)
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
        task, key = tasks[name], str(tasks[name].outputs)
        labels = np.asarray(task.validation.labels[rows[name]])
        for column, cluster in enumerate(clusters):
            if f"head.{key}.weight" not in cluster.adapter:
                continue
            adapter = with_head(cluster.adapter, state.initial, key)
            logits = predict_logits(experiment.model, adapter, key, task, rows[name], config.evaluation.batch_size)
            table[row, column] = score(task.metric, predictions_from_logits(task.metric, logits), labels)
    # Scores lie in -1 to 1, so -2 is worse than any and stands for a pair that cannot be.
    chosen = linear_sum_assignment(np.where(np.isfinite(table), table, -2.0), maximize=True) if names else ((), ())
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
