"""Runs with published rules of aggregation: what travels, what is exported, and resuming to the same bits."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fltac
from fltac.errors import InputError, RunError
from fltac.model.peft_format import import_adapter
from fltac.model.peft_import import CONFIG as PEFT_CONFIG
from fltac.records import Cluster, lora_modules
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.loop import as_sent
from fltac.runtime.progress import Silent
from fltac.server import agreement, grouping
from runtime.test_run import scores_of, small
from server.builders import adapter, state

HALF = ("federation.participation=0.5", "evaluation.every=0", "federation.rounds=2")


class Stop(Silent):
    def round_finished(self, record: Any) -> None:
        if record["round"] == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "settings",
    [
        ("method=ffa-lora",),
        ("server.aggregation.rule=flora", "lora.rank=2", "lora.ranks={client-1: 1}"),
        ("server.aggregation.rule=fedsa", "server.aggregation.optimizer=fedadam", "wire.dtype=float16"),
        ("server.aggregation.from_round=2",),
        ("server.clustering.from_round=auto",),
    ],
    ids=["ffa", "flora with ranks", "fedsa with fedadam", "means from round 2", "grouped where halves agree"],
)
def test_a_stopped_run_resumes_to_the_same_bits(settings: tuple[str, ...], tmp_path: Path) -> None:
    fltac.run(small(*HALF, *settings), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fltac.run(small(*HALF, *settings), tmp_path / "stopped", Stop())
    fltac.resume(tmp_path / "stopped")
    assert scores_of(tmp_path / "stopped") == scores_of(tmp_path / "whole")


def test_until_the_first_mean_a_run_is_that_of_clients_alone(tmp_path: Path) -> None:
    """Every slot goes on from its own upload, as with ``local``; the first mean changes its score."""
    rounds = ("federation.rounds=3", "evaluation.every=1")
    fltac.run(small("method=local", *rounds), tmp_path / "local")
    fltac.run(small("method=fltac", "server.aggregation.from_round=3", *rounds), tmp_path / "later")
    local, later = (scores_of(tmp_path / name)[0] for name in ("local", "later"))
    assert [record["tasks"] for record in local[:2]] == [record["tasks"] for record in later[:2]]
    assert local[2]["tasks"] != later[2]["tasks"]
    assert all(record["clustering"]["k"] for record in later), "groups are reported from the first round on"


def test_a_round_that_groups_nobody_says_how_well_halves_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "FEWEST", 2)
    monkeypatch.setattr(grouping, "ENOUGH", 2.0)  # more than any agreement
    fltac.run(small("method=fltac", "server.clustering.from_round=auto", "federation.rounds=2"), tmp_path)
    first, second = scores_of(tmp_path)[0]
    assert first["clustering"] is None
    assert first["agreement"].keys() == {"gradients", "changes"}
    assert all(-1 <= value <= 1 for value in first["agreement"].values())
    assert second["clustering"]["k"]


def test_the_export_of_a_residual_computes_what_was_trained(tmp_path: Path) -> None:
    """Exported factors have a higher rank and the same factor in front of them."""
    import json

    fltac.run(small("method=fedex-lora", *HALF), tmp_path)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    (cluster,) = checkpoint.state.clusters
    exported = import_adapter(tmp_path / "adapters" / "cluster-0")
    settings = json.loads((tmp_path / "adapters" / "cluster-0" / PEFT_CONFIG).read_text())
    assert settings["r"] > 1
    held = cluster.adapter
    for module in lora_modules(held):
        ours = held[f"{module}.lora_B"] @ held[f"{module}.lora_A"]
        if f"{module}.base_A" in held:
            ours = ours + held[f"{module}.base_B"] @ held[f"{module}.base_A"]
        theirs = exported[f"{module}.lora_B"] @ exported[f"{module}.lora_A"]
        np.testing.assert_allclose(settings["lora_alpha"] / settings["r"] * theirs, 8.0 * ours, atol=1e-5)


def test_bytes_and_errors_of_the_rules(tmp_path: Path) -> None:
    """A is half of the factors; the record says what averaging factors misses."""
    records = {}
    for method in ("fedit", "ffa-lora", "flexlora"):
        extra = ("lora.ranks={client-0: 1, client-1: 1}", "lora.rank=2") if method == "flexlora" else ("lora.rank=2",)
        fltac.run(small(f"method={method}", "federation.rounds=2", "evaluation.every=0", *extra), tmp_path / method)
        records[method] = scores_of(tmp_path / method)[0]
    assert records["ffa-lora"][1]["bytes"]["up"] < 0.75 * records["fedit"][1]["bytes"]["up"]
    assert records["flexlora"][1]["bytes"]["up"] < records["fedit"][1]["bytes"]["up"]
    errors = {method: [record["aggregation"]["product_error"] for record in own] for method, own in records.items()}
    assert max(errors["ffa-lora"]) < 1e-6
    assert min(errors["fedit"]) > 1e-3
    assert 0 < max(errors["flexlora"]) < max(errors["fedit"])


def test_slots_that_nobody_asked_hold_no_cluster_and_are_counted_in_no_folder(tmp_path: Path) -> None:
    """With ifca there are clusters before anybody has chosen one; v0 is none of them."""
    settings = ("federation.participation=0.5", "federation.rounds=1", "training.steps=1", "output.adapters=false")
    result = fltac.run(small("method=ifca", *settings), tmp_path)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    members = {cluster.id: len(cluster.members) for cluster in checkpoint.state.clusters}
    counted = Counter[str]()
    for folders in result.summary["adapters"].values():
        counted.update(folders)
    assert counted == {f"cluster-{number}": count for number, count in members.items() if count}


def test_the_parameters_of_a_smaller_rank_are_said_apart(tmp_path: Path) -> None:
    """A body of rank 1 is half of one of rank 2; the head is the same."""
    mixed = ("server.aggregation.rule=flexlora", "lora.rank=2", "lora.ranks={client-0: 1}", "federation.rounds=1")
    counts = fltac.run(small("method=fedit", *mixed, "training.steps=1"), tmp_path).summary["trainable_parameters"]
    (whole,) = [label for label in counts if "rank" not in label]
    outputs, hidden = map(int, whole.split("x"))
    head = outputs * hidden + outputs
    assert counts == {whole: counts[whole], f"{whole} rank 1": head + (counts[whole] - head) // 2}
    assert counts[whole] > head


def test_a_rank_for_a_client_that_there_is_not_is_refused(tmp_path: Path) -> None:
    config = small("server.aggregation.rule=flora", "lora.rank=2", "lora.ranks={client-9: 1}")
    with pytest.raises(InputError, match=r"lora\.ranks\.client-9: no client has this id; there are client-0, client-1"):
        fltac.run(config, tmp_path)


def test_numbers_that_the_wire_cannot_carry_end_the_run_in_one_line() -> None:
    grown = replace(state("a"), round_number=4, clusters=(Cluster(0, adapter(1, 1e5), (("a", 0),)),))
    assert as_sent(grown, small()) is grown
    with pytest.raises(RunError, match=r"^round 4: tensor 'm\.lora_B': .*beyond float16.*wire\.dtype=float32$"):
        as_sent(grown, small("wire.dtype=float16"))
