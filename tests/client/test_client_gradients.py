"""Gradients at the client against autograd on the backbone's own weights; who makes them, of which rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fltac
from fltac.client.client import plan_jobs
from fltac.client.gradients import OUTPUTS, gradients, leading_directions, plan_gradients
from fltac.client.schedule import LanePlan
from fltac.config import GRADIENT_DIRECTIONS
from fltac.model.lora import detached
from fltac.records import LORA_A, LORA_B, Request, is_head
from fltac.runtime.setup import Experiment, prepare
from fltac.server.round import init_server, plan_round

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ALONE, TOGETHER = LanePlan(1, 2**62), LanePlan(8, 2**62)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    settings = ["federation.clients=3", "server.clustering.gradient_batches=3", "training.precision=float32"]
    return prepare(fltac.load_config(QUICKSTART, settings))


def asked(experiment: Experiment) -> list[Request]:
    settings, shapes = experiment.config.server_settings, experiment.model.body_shapes
    return plan_round(init_server(settings, shapes, experiment.head_shapes, experiment.clients), settings)


def test_they_are_those_of_the_backbones_own_weights(experiment: Experiment) -> None:
    """Of each batch ``scaling B^T dL/dW``: by hand, one layer's weight after the other's."""
    request, model, config = asked(experiment)[0], experiment.model, experiment.config
    initial = request.initial or {}
    jobs = plan_gradients(experiment.clients[request.client], request, initial, config)
    found = gradients(model, jobs, config.training, ALONE)
    assert [(one.client, one.slot) for one in found] == [job.key for job in jobs]
    model.restore()
    names = [name for name in initial if name.endswith(LORA_A)]
    plain = experiment.backbone.model
    for job, one in zip(jobs, found, strict=True):
        assert one.directions.keys() == set(names)
        seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
        (head,) = {step.head_key for step in job.steps}
        weight, bias = (torch.from_numpy(job.start[f"head.{head}.{part}"]) for part in ("weight", "bias"))
        with detached(plain, model.layers):
            layers = {name: plain.get_submodule(name.removesuffix(LORA_A)) for name in names}
            for layer in layers.values():
                layer.weight.requires_grad_(True)
            for step in job.steps:
                batch = {name: torch.from_numpy(value) for name, value in step.task.train.batch(step.rows).items()}
                features = plain(**batch).last_hidden_state[:, 0]
                labels = torch.from_numpy(np.asarray(step.task.train.labels[step.rows], dtype=np.int64))
                loss = torch.nn.functional.cross_entropy(features @ weight.T + bias, labels)
                wanted = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
                for name, gradient in zip(names, wanted, strict=True):
                    seen[name].append(job.start[name.replace(LORA_A, LORA_B)].T @ gradient.numpy())
            for layer in layers.values():
                layer.weight.requires_grad_(False)
        for name in names:
            rows = np.concatenate(seen[name])
            assert rows.shape[0] == 3 * OUTPUTS
            expected = np.linalg.svd(rows, full_matrices=False)
            best = expected.S[:GRADIENT_DIRECTIONS, None] * expected.Vh[:GRADIENT_DIRECTIONS]
            best /= np.linalg.norm(best)
            np.testing.assert_allclose(one.directions[name].T @ one.directions[name], best.T @ best, atol=1e-4)


def test_lanes_change_rounding_alone_and_leave_the_model_as_it_is(experiment: Experiment) -> None:
    requests, model, config = asked(experiment), experiment.model, experiment.config
    jobs = [
        job
        for request in requests
        for job in plan_gradients(experiment.clients[request.client], request, request.initial or {}, config)
    ]
    model.load([jobs[0].start | requests[0].initial] if requests[0].initial else [])
    before = (dict(model.body_shapes), model.values.clone())
    alone, together = (gradients(model, jobs, config.training, plan) for plan in (ALONE, TOGETHER))
    workers = gradients(model, jobs[::-1], config.training, replace(TOGETHER, workers=2))
    assert model.body_shapes == before[0]
    assert torch.equal(model.values, before[1])
    for one, two, three in zip(alone, together, workers, strict=True):
        assert (one.client, one.slot) == (two.client, two.slot) == (three.client, three.slot)
        for name, rows in one.directions.items():
            for other in (two, three):
                np.testing.assert_allclose(rows.T @ rows, other.directions[name].T @ other.directions[name], atol=1e-4)


def test_only_slots_without_a_cluster_and_only_where_asked(experiment: Experiment) -> None:
    request, config = asked(experiment)[0], experiment.config
    client, initial = experiment.clients[request.client], request.initial or {}
    every = plan_gradients(client, request, initial, config)
    assert [job.slot for job in every] == sorted(client.slots)
    assert all(len(job.steps) == 3 for job in every)
    assert not plan_gradients(client, replace(request, gradients=False), initial, config)
    known = replace(request, slots={every[0].slot: 7}, adapters={7: initial})
    assert [job.slot for job in plan_gradients(client, known, initial, config)] == [job.slot for job in every[1:]]


def test_they_have_batches_of_their_own_and_take_none_from_the_training(experiment: Experiment) -> None:
    request, config = asked(experiment)[0], experiment.config
    client, initial = experiment.clients[request.client], request.initial or {}
    seen = plan_gradients(client, request, initial, config)
    trained = plan_jobs(client, request, initial, config)
    without = plan_jobs(client, replace(request, gradients=False), initial, config)
    for job, own, same in zip(seen, trained, without, strict=True):
        rows = [step.rows.tolist() for step in job.steps]
        assert rows != [step.rows.tolist() for step in own.steps[:3]]
        assert set(np.concatenate(rows)) <= {row for local in client.slots[job.slot] for row in local.rows.tolist()}
        assert [step.rows.tolist() for step in own.steps] == [step.rows.tolist() for step in same.steps]


def test_all_clients_see_through_the_same_outputs(experiment: Experiment) -> None:
    starts = [
        job.start
        for request in asked(experiment)
        for job in plan_gradients(experiment.clients[request.client], request, request.initial or {}, experiment.config)
    ]
    for name, tensor in starts[0].items():
        if not is_head(name):
            assert all(np.array_equal(tensor, start[name]) for start in starts)
            assert tensor.any() != name.endswith(LORA_A)


@pytest.mark.parametrize("rows", [np.zeros((5, 4), np.float32), np.zeros((2, 4), np.float32)])
def test_nothing_has_no_direction(rows: np.ndarray) -> None:
    found = leading_directions(rows)
    assert found.shape == (GRADIENT_DIRECTIONS, 4)
    assert not found.any()


def test_fewer_rows_than_directions() -> None:
    found = leading_directions(np.array([[3.0, 0, 0, 0], [0, 4.0, 0, 0]], np.float32))
    np.testing.assert_allclose(np.abs(found), [[0, 0.8, 0, 0], [0.6, 0, 0, 0], [0, 0, 0, 0]], atol=1e-6)
