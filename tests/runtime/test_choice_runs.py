"""The published clustering rules in whole runs on the quickstart, and choice by loss in simulation and node alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fltac
from fltac.client.assignment import choose, row_losses, slot_losses
from fltac.client.client import Client, plan_jobs, reply_of, start_adapter
from fltac.client.losses import Step, lane_losses
from fltac.client.training import train
from fltac.records import Reply, Request, is_head
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.lane_setup import choose_plan
from fltac.runtime.progress import Silent
from fltac.runtime.setup import Experiment, prepare
from fltac.server.round import init_server, plan_round
from fltac.wire.codec import encode_request
from fltac.wire.node_protocol import decode_answer, encode_train_question
from runtime.owners import federation
from runtime.test_node import Both, train_error
from runtime.test_run import scores_of

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FAST = (
    "training.steps=3",
    "evaluation.every=0",
    "output.adapters=false",
    "federation.clients=4",
    "server.clustering.assignment_rows=16",
)
LEVER = (
    "server.clustering.assign=loss",
    "server.clustering.assignment_loss=balanced",
    "server.clustering.held_back=0.2",
)
SPLITS = ("server.clustering.eps1=2", "server.clustering.eps2=0")
RULES = {
    "ifca": ("method=ifca",),
    "cfl": ("method=cfl", *SPLITS),
    "fedlease": ("method=fedlease",),
    "lever": LEVER,
    "profiles": ("server.clustering.profile_rows=8", "server.clustering.profile_noise=0.01"),
    # With rules of aggregation that send less than an adapter, one cut to a rank, or one with a frozen part.
    "lever-ffa": (*LEVER, "server.aggregation.rule=ffa"),
    "lever-hetlora": (*LEVER, "server.aggregation.rule=hetlora", "lora.rank=3", "lora.ranks.client-1=1"),
    "lever-flora": (*LEVER, "server.aggregation.rule=flora"),
    "ifca-rolora": ("method=ifca", "server.aggregation.rule=rolora"),
    "cfl-flora": (
        "method=cfl",
        "server.clustering.eps1=2",
        "server.clustering.eps2=0",
        "server.aggregation.rule=flora",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_runs_on_the_quickstart_and_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    config = fltac.load_config(QUICKSTART, [*FAST, *RULES[name], "federation.rounds=2"])
    fltac.run(config, tmp_path / "whole")

    class Stop(Silent):
        def round_finished(self, record: Any) -> None:
            if record["round"] == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fltac.run(config, tmp_path / "stopped", Stop())
    fltac.resume(tmp_path / "stopped")
    assert scores_of(tmp_path / "stopped") == scores_of(tmp_path / "whole")
    rounds, _, _ = scores_of(tmp_path / "whole")
    assert [record["rejected"] for record in rounds] == [0, 0]
    ks = [record["clustering"]["k"] for record in rounds if record["clustering"]]
    assert len(ks) == 2
    one, other = latest_checkpoint(tmp_path / "whole"), latest_checkpoint(tmp_path / "stopped")
    assert one is not None
    assert other is not None
    for ours, theirs in zip(one.state.clusters, other.state.clusters, strict=True):
        for tensor in ours.adapter:
            np.testing.assert_array_equal(ours.adapter[tensor], theirs.adapter[tensor])
    if name.startswith("cfl"):
        assert ks == [2, 4], "with an eps1 above 1 every cluster is split in every round"
    if name == "fedlease":
        assert ks[0] == ks[1]
        assert rounds[0]["clustering"]["silhouette"] > 0
    if name == "ifca":
        size = sum(tensor.nbytes for tensor in one.state.initial.values())
        assert rounds[0]["bytes"]["down"] > 4 * 4 * size, "four clients are sent four clusters"


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return prepare(fltac.load_config(QUICKSTART, [*FAST, "method=ifca", "server.clustering.spread=0.3"]))


def first_request(experiment: Experiment) -> Request:
    settings = experiment.config.server_settings
    state = init_server(settings, experiment.model.body_shapes, experiment.head_shapes, experiment.clients)
    return plan_round(state, settings)[0]


def test_losses_are_those_of_training_on_the_same_rows(experiment: Experiment) -> None:
    """Of a slot with 40 rows, all of which are scored, so that it does not matter which are drawn."""
    request, model, config = first_request(experiment), experiment.model, experiment.config
    slot, (held,) = next(iter(experiment.clients[request.client].slots.items()))
    local = replace(held, rows=held.rows[:40])
    expected = []
    for candidate in request.candidates:
        model.load([start_adapter(replace(request, slots={slot: candidate}), slot, [local.head_key], {})])
        expected.append(float(lane_losses(model, [Step(local.task, local.head_key, local.rows)])[0]))
        assert row_losses(model, local, local.rows, 17).mean() == pytest.approx(expected[-1], rel=1e-5)
    clustering = config.server.clustering.model_copy(update={"assignment_rows": 64})
    every = config.model_copy(update={"server": config.server.model_copy(update={"clustering": clustering})})
    found = slot_losses(model, Client("x", {slot: (local,)}), slot, request, {}, every)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(set(np.round(found, 6))) == len(found), "the first clusters are different functions"


def test_a_planted_cluster_is_chosen(experiment: Experiment) -> None:
    """A cluster that was trained on a slot's task is what that slot chooses, and no other slot's is."""
    request, config = first_request(experiment), experiment.config
    client = experiment.clients[request.client]
    plan = choose_plan(config.training, experiment.model, next(iter(experiment.tasks.values())), 1)
    more = config.model_copy(update={"training": config.training.model_copy(update={"steps": 40})})
    slots = sorted(client.slots)
    assert len(slots) > 1
    longer = replace(
        client, slots={slot: tuple(replace(local, steps=40) for local in own) for slot, own in client.slots.items()}
    )
    start = replace(request, slots=dict.fromkeys(slots, request.candidates[0]), candidates=())
    trained = train(experiment.model, plan_jobs(longer, start, {}, more), more.training, 0.0, plan)
    planted = {10 + result.job.slot: result.adapter for result in trained}
    asked = replace(request, slots={}, adapters=planted, candidates=tuple(planted))
    assert choose(experiment.model, client, asked, {}, config).slots == {slot: 10 + slot for slot in slots}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("chosen")
    held = ("server.clustering.held_back=0.3", "server.clustering.assignment_rows=5")
    return Both(folder, federation(folder, "method=ifca", *held, "server.clustering.cannot_link=true"))


def test_a_node_chooses_and_trains_as_the_simulation(both: Both) -> None:
    found, config = both.experiment, both.config
    plan = choose_plan(config.training, found.model, next(iter(found.tasks.values())), 1)
    for request in plan_round(both.first_state(), config.server_settings):
        client = found.clients[request.client]
        mine = choose(found.model, client, request, {}, config)
        trained = train(found.model, plan_jobs(client, mine, {}, config), config.training, config.lora.dropout, plan)
        expected = reply_of(client, trained, mine)
        answer = decode_answer(both.node(request.client).answer(encode_train_question(request, "float32")))
        assert isinstance(answer, Reply)
        assert answer.error is None
        assert [(item.slot, item.cluster, item.examples) for item in answer.updates] == [
            (item.slot, item.cluster, item.examples) for item in expected.updates
        ]
        chosen = [item.cluster for item in answer.updates]
        assert len(set(chosen)) == len(chosen), "cannot-link"
        for ours, theirs in zip(answer.updates, expected.updates, strict=True):
            for name in theirs.adapter:
                np.testing.assert_array_equal(ours.adapter[name], theirs.adapter[name])


def test_a_node_refuses_candidates_that_are_missing_or_do_not_fit(both: Both) -> None:
    request = plan_round(both.first_state(), both.config.server_settings)[0]
    node = both.node(request.client)
    name = next(name for name in request.adapters[1] if not is_head(name))
    wrong = {**request.adapters[1], name: request.adapters[1][name] * np.float32("nan")}
    broken = replace(request, adapters={**request.adapters, 1: wrong})
    assert train_error(node, broken) == f"slot 0: cluster 1: tensor {name} has values that are not finite"
    bare = {key: tensor for key, tensor in request.adapters[2].items() if not is_head(key)}
    error = train_error(node, replace(request, adapters={**request.adapters, 2: bare}))
    assert "cluster 2: tensor head." in error
    assert error.endswith("is missing")
    none = replace(request, candidates=(), initial=request.adapters[0])
    assert train_error(node, none) == "the request brings no clusters to choose from, which the rule ifca needs"


def test_bytes_of_a_request_are_those_of_all_clusters(experiment: Experiment) -> None:
    request = first_request(experiment)
    one = len(encode_request(replace(request, adapters={0: request.adapters[0]}, candidates=()), "float32"))
    assert len(encode_request(request, "float32")) == pytest.approx(len(request.candidates) * one, rel=0.05)
