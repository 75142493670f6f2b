"""Every cluster's adapter as a PEFT folder."""

from pathlib import Path

from fltac.model.lora import detach
from fltac.model.peft_format import CardFacts, export_adapter
from fltac.records import HEAD, Adapter, Cluster, ServerState, head_keys
from fltac.runtime.setup import Experiment


def export_clusters(experiment: Experiment, state: ServerState, out: Path) -> list[Path]:
    """One folder for each cluster; one for each head where a cluster's adapter has several.

    The backbone in memory may be rounded to bfloat16 and carries lanes, so both are undone first; the run is over.
    """
    model, config = experiment.model, experiment.config
    detach(experiment.backbone.model, model.layers)
    try:
        folders = []
        for cluster in state.clusters or (Cluster(0, state.initial, ()),):
            keys = head_keys(cluster.adapter)
            for key in keys:
                name = f"cluster-{cluster.id}" + (f"-head-{key}" if len(keys) > 1 else "")
                card = CardFacts(
                    method=config.method, rounds=state.round_number, members=len(cluster.members), cluster=cluster.id
                )
                adapter = _with_one_head(cluster.adapter, key)
                backbone, targets = experiment.backbone, list(experiment.modules)
                export_adapter(out / name, adapter, key, backbone, config.lora, targets, card)
                folders.append(out / name)
        return folders
    finally:
        for path, layer in model.layers.items():
            parent, _, name = path.rpartition(".")
            setattr(experiment.backbone.model.get_submodule(parent), name, layer)


def _with_one_head(adapter: Adapter, key: str) -> Adapter:
    other = [name for name in adapter if name.startswith(HEAD) and not name.startswith(f"{HEAD}{key}.")]
    return {name: tensor for name, tensor in adapter.items() if name not in other}
