"""Profiles against the backbone as transformers runs it, and who may have them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import fltac
from fltac.client.profile import multiplier, profiles_of
from fltac.paths import cache_folder
from fltac.records import Reply
from fltac.runtime.profile_noise import KEY
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


@contextmanager
def asked_for(both: Both, **changes: float) -> Iterator[None]:
    """The coordinator's config with other settings of profiles."""
    before = both.coordinator
    rule = before.server.clustering.model_copy(update=changes)
    both.coordinator = before.model_copy(update={"server": before.server.model_copy(update={"clustering": rule})})
    try:
        yield
    finally:
        both.coordinator = before


def profiles(both: Both, client: str) -> np.ndarray:
    found = [item.profile for item in answer_of(both, client).updates]
    return np.stack([profile for profile in found if profile is not None])


def test_the_noise_of_a_node_is_its_own_and_the_same_whenever_it_is_asked(both: Both) -> None:
    """Else the mean over questions, or over restarts of the node, would be the profile without noise."""
    client = sorted(both.experiment.clients)[1]
    with asked_for(both, profile_noise=0.1):
        one, again = profiles(both, client), profiles(both, client)
        (cache_folder() / KEY).unlink()
        other = profiles(both, client)
        simulated = profiles_of(both.experiment.model, both.experiment.clients[client], both.coordinator, 0)
    np.testing.assert_array_equal(one, again)
    assert (cache_folder() / KEY).stat().st_mode & 0o077 == 0
    for found in (other, np.stack([simulated[slot] for slot in sorted(simulated)])):
        assert not np.allclose(one, found, atol=0.01)


def test_other_rows_and_other_configs_get_other_noise(both: Both) -> None:
    """Else the difference of two profiles would be that of the means, without noise."""
    client = sorted(both.experiment.clients)[2]
    plain = profiles(both, client)
    with asked_for(both, profile_noise=0.1):
        first = profiles(both, client) - plain
        file = both.out / client / "slot-0-train.parquet"
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        touched = profiles(both, client) - plain
    with asked_for(both, profile_noise=0.2):
        louder = profiles(both, client) - plain
    assert abs(np.corrcoef(first.ravel(), touched.ravel())[0, 1]) < 0.5
    assert abs(np.corrcoef(touched.ravel(), louder.ravel())[0, 1]) < 0.5


def test_an_owner_may_ask_for_noise_that_hides_a_row(both: Both) -> None:
    client = sorted(both.experiment.clients)[2]
    slots = both.experiment.clients[client].slots
    sizes = {slot: min(len(local.rows), 12) for slot, (local,) in slots.items()}
    with asked_for(both, profile_noise=0.5):
        assert {slot: multiplier(own, both.coordinator) for slot, own in slots.items()} == {
            slot: 0.25 * count for slot, count in sizes.items()
        }
        several = [local for own in slots.values() for local in own]
        shared = 0.25 * min(sizes.values()) * len(several)
        assert multiplier(several, both.coordinator) == shared, "a row is in the mean of its task, which is one of many"
    file = both.out / client / "client.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "limits": {"profile": True, "profile_multiplier": 3.0}}))
    for noise, sent in ((0.49, []), (0.5, [slot for slot, count in sizes.items() if count == 12])):
        with asked_for(both, profile_noise=noise):
            assert [item.slot for item in answer_of(both, client).updates if item.profile is not None] == sent
    file.write_text(yaml.safe_dump(content))


def test_a_node_whose_config_asks_for_none_sends_none(both: Both) -> None:
    client = sorted(both.experiment.clients)[2]
    with asked_for(both, profile_rows=0):
        assert all(item.profile is None for item in answer_of(both, client).updates)
