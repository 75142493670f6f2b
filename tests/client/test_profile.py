"""Profiles against the backbone as transformers runs it, and who may have them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import fltac
from fltac.client.profile import profiles_of
from fltac.records import Reply
from fltac.runtime.setup import Experiment, prepare
from fltac.seeding import generator
from fltac.server.round import plan_round
from fltac.wire.node_protocol import decode_answer, encode_train_question
from runtime.owners import federation
from runtime.test_node import Both

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ASKS = "server.clustering.profile_rows=12"


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return prepare(fltac.load_config(QUICKSTART, [ASKS, "federation.clients=3"]))


def test_a_profile_is_the_mean_of_unit_features_of_the_frozen_backbone(experiment: Experiment) -> None:
    client, config = next(iter(experiment.clients.values())), experiment.config
    found = profiles_of(experiment.model, client, config, 0)
    assert found.keys() == client.slots.keys()
    experiment.model.restore()
    for slot, (local,) in client.slots.items():
        draw = generator(config.federation.seed, "profile-rows", client=client.id, slot=slot)
        rows = draw.permutation(local.rows)[:12]
        batch = {name: torch.from_numpy(value) for name, value in local.task.train.batch(rows).items()}
        with torch.no_grad():
            features = experiment.backbone.model(**batch).last_hidden_state[:, 0]
        expected = torch.nn.functional.normalize(features, dim=-1).mean(dim=0).numpy()
        np.testing.assert_allclose(found[slot], expected, atol=1e-5)


def test_noise_is_its_seeds_and_no_more(experiment: Experiment) -> None:
    client, config = next(iter(experiment.clients.values())), experiment.config
    rule = config.server.clustering.model_copy(update={"profile_noise": 0.1})
    noisy = config.model_copy(update={"server": config.server.model_copy(update={"clustering": rule})})
    plain = profiles_of(experiment.model, client, config, 0)
    one, same, other = (profiles_of(experiment.model, client, noisy, seed) for seed in (1, 1, 2))
    apart = np.concatenate([one[slot] - plain[slot] for slot in plain])
    assert apart.std() == pytest.approx(0.1, rel=0.3)
    for slot in plain:
        np.testing.assert_array_equal(one[slot], same[slot])
        assert not np.allclose(one[slot], other[slot], atol=0.01)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("profiled")
    return Both(folder, federation(folder, ASKS))


def answer_of(both: Both, client: str) -> Reply:
    (request,) = (r for r in plan_round(both.first_state(), both.config.server_settings) if r.client == client)
    assert request.profile
    answer = decode_answer(both.node(client).answer(encode_train_question(request, "float32")))
    assert isinstance(answer, Reply)
    assert answer.error is None
    return answer


def test_a_node_sends_what_the_simulation_sends_if_its_owner_allows_it(both: Both) -> None:
    client = next(iter(both.experiment.clients.values()))
    file = both.out / client.id / "client.yaml"
    content = yaml.safe_load(file.read_text())
    assert content["limits"]["profile"], "the written folders are those of the simulation"
    expected = profiles_of(both.experiment.model, client, both.config, 0)
    for item in answer_of(both, client.id).updates:
        assert item.profile is not None
        np.testing.assert_allclose(item.profile, expected[item.slot], atol=1e-6)
    file.write_text(yaml.safe_dump({**content, "limits": {}}))
    assert [item.profile for item in answer_of(both, client.id).updates] == [None] * len(expected)


def test_the_noise_of_a_node_is_its_own(both: Both) -> None:
    rule = both.coordinator.server.clustering.model_copy(update={"profile_noise": 0.1})
    settings = both.coordinator.server.model_copy(update={"clustering": rule})
    client = sorted(both.experiment.clients)[1]
    both.coordinator, before = both.coordinator.model_copy(update={"server": settings}), both.coordinator
    one, other = answer_of(both, client), answer_of(both, client)
    both.coordinator = before
    first, second = (next(iter(reply.updates)) for reply in (one, other))
    assert first.profile is not None
    assert second.profile is not None
    assert not np.allclose(first.profile, second.profile, atol=0.01)
    np.testing.assert_array_equal(*(replace(item, profile=None).adapter["head.2.bias"] for item in (first, second)))
