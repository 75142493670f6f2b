"""Every cluster's adapter as a PEFT folder, and which tasks it is for: the evaluator's knowledge, not the server's."""

from collections import Counter
from pathlib import Path

from fltac.data.prompts import alpaca
from fltac.errors import InputError
from fltac.model.lora import detached
from fltac.model.merging import merged
from fltac.model.peft_format import CardFacts, export_adapter
from fltac.records import HEAD, Adapter, Cluster, ServerState, head_keys
from fltac.runtime.setup import Experiment
from fltac.server.sending import Outbox

EXAMPLE = alpaca("Name three colours.", "").text
"""For the model cards of language models; with the chat template a user makes the prompt with the tokenizer."""


def adapter_folders(state: ServerState) -> dict[tuple[int, str], str]:
    """The folder's name for each (cluster id, head key); without clusters v0 stands for cluster 0.

    The head key is empty where there is no head.
    """
    out = {}
    for cluster in _clusters(state):
        keys = head_keys(cluster.adapter) or [""]
        for key in keys:
            out[cluster.id, key] = f"cluster-{cluster.id}" + (f"-head-{key}" if len(keys) > 1 else "")
    return out


def folders_of_tasks(experiment: Experiment, state: ServerState) -> dict[str, dict[str, int]]:
    """For each task the folders of the adapters that its clients received, with the number of clients."""
    names, outbox = adapter_folders(state), Outbox(state, experiment.config.server_settings)
    # Without clusters v0 is exported for all; else a slot that is sent no cluster's holds v0, which is in no folder.
    first = None if state.clusters else 0
    out: dict[str, Counter[str]] = {name: Counter() for name in experiment.tasks}
    for holding in experiment.holdings:
        cluster = outbox.cluster(holding.key) if state.clusters else first
        if cluster is not None and (cluster, holding.head_key) in names:
            out[holding.task][names[cluster, holding.head_key]] += 1
    return {task: dict(counts.most_common()) for task, counts in out.items()}


def export_clusters(experiment: Experiment, state: ServerState, out: Path) -> list[Path]:
    """Writes one folder for each cluster; one for each head where a cluster's adapter has several.

    The backbone in memory may be rounded to bfloat16 and carries lanes, so both are undone first; the run is over.

    Raises:
        InputError: ``out`` cannot be written.
    """
    model, config = experiment.model, experiment.config
    clusters = {cluster.id: cluster for cluster in _clusters(state)}
    tasks = folders_of_tasks(experiment, state)
    max_length = max((task.max_length for task in experiment.tasks.values() if task.max_length), default=None)
    folders = []
    try:
        with detached(experiment.backbone.model, model.layers):
            for (number, key), name in adapter_folders(state).items():
                held = {task: counts[name] for task, counts in tasks.items() if name in counts}
                card = CardFacts(
                    method=config.method,
                    rounds=state.round_number,
                    members=len(clusters[number].members),
                    cluster=number,
                    max_length=max_length,
                    tasks={task: (count, experiment.tasks[task].label_names) for task, count in held.items()},
                    prompt=EXAMPLE if experiment.backbone.kind == "causal-lm" else None,
                )
                adapter, lora = merged(_with_one_head(clusters[number].adapter, key), config.lora)
                backbone, targets = experiment.backbone, list(experiment.modules)
                export_adapter(out / name, adapter, key or None, backbone, lora, targets, card)
                folders.append(out / name)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    return folders


def _clusters(state: ServerState) -> tuple[Cluster, ...]:
    return state.clusters or (Cluster(0, state.initial, ()),)


def _with_one_head(adapter: Adapter, key: str) -> Adapter:
    other = [name for name in adapter if name.startswith(HEAD) and not name.startswith(f"{HEAD}{key}.")]
    return {name: tensor for name, tensor in adapter.items() if name not in other}
