"""Probes on the server: what is learned from them, which are refused, and what they cannot be combined with."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from fltac.config import ServerSettings, load_config
from fltac.errors import InputError
from fltac.records import LORA_B, Adapter, Reply, RoundReport, ServerState, Update
from fltac.server.changes import remember
from fltac.server.round import finish_round, init_server, plan_round
from server.builders import planted, server

PROBES = ("server.clustering.probes=2",)


def without_b(adapter: Adapter) -> Adapter:
    return {name: tensor for name, tensor in adapter.items() if not name.endswith(LORA_B)}


def start(updates: list[Update], settings: ServerSettings) -> ServerState:
    body = {name: tensor.shape for name, tensor in updates[0].adapter.items() if "lora" in name}
    return init_server(settings, body, {"2": (2, 12)}, sorted({item.client for item in updates}))


def probed() -> tuple[list[Update], list[int]]:
    """Own trainings that say nothing of the tasks, with probes that do; one of the two is the other way round."""
    updates, truth = planted(8, 3, seed=1, noise=30.0)
    told, same = planted(8, 3, seed=1, noise=0.2)
    assert truth == same
    initial = start(updates, server(*PROBES)).initial
    out = []
    for item, clear in zip(updates, told, strict=True):
        learned = without_b(clear.adapter)
        probes = tuple({name: initial[name] + sign * learned[name] for name in learned} for sign in (1, -1))
        out.append(replace(item, probes=probes))
    return out, truth


def play(state: ServerState, updates: list[Update], settings: ServerSettings) -> tuple[ServerState, RoundReport]:
    clients = sorted({item.client for item in updates})
    replies = [Reply(client, tuple(item for item in updates if item.client == client)) for client in clients]
    return finish_round(state, plan_round(state, settings), replies, settings)


def ari(state: ServerState, updates: list[Update], truth: list[int]) -> float:
    assigned = state.assignment()
    return float(adjusted_rand_score(truth, [assigned[item.key] for item in updates]))


def test_slots_are_grouped_by_their_probes() -> None:
    updates, truth = probed()
    settings = server(*PROBES, "server.clustering.k=3")
    after, report = play(start(updates, settings), updates, settings)
    assert not report.rejections
    assert ari(after, updates, truth) == 1.0
    blind = server("server.clustering.k=3")
    alone = [replace(item, probes=()) for item in updates]
    assert ari(play(start(alone, blind), alone, blind)[0], alone, truth) < 0.5


def test_each_probe_counts_as_a_round_and_the_own_training_not() -> None:
    updates, _ = probed()
    settings = server(*PROBES, "server.clustering.k=3")
    state = start(updates, settings)
    after, _ = play(state, updates, settings)
    expected, began = state, {item.key: state.initial for item in updates}
    for number in (0, 1):
        rounds = [replace(item, adapter={**state.initial, **item.probes[number]}) for item in updates]
        learned = remember(expected, rounds, began, 1.0, settings.seed, of_a=True)
        expected = replace(expected, memory=learned.memory())
    for key, held in expected.memory.items():
        assert held.keys() == after.memory[key].keys()
        for name, tensor in held.items():
            np.testing.assert_array_equal(after.memory[key][name], tensor)


def test_a_slot_that_comes_later_brings_its_probes_then() -> None:
    updates, _ = probed()
    settings = server(*PROBES, "server.clustering.k=3")
    state = start(updates, settings)
    last = [item for item in updates if item.client == "client-7"]
    state, report = play(state, [item for item in updates if item.client != "client-7"], settings)
    assert [item.client for item in report.rejections] == ["client-7"]
    begun = state
    again = [replace(item, probes=()) for item in updates if item.client != "client-7"]
    state, report = play(state, sorted([*again, *last], key=lambda item: item.key), settings)
    assert not report.rejections
    assert begun.memory.keys() < state.memory.keys() == {item.key for item in updates}
    assigned, early = state.assignment(), [item.key for item in again]
    assert len({assigned[key] for key in early}) == 3


def test_where_clients_choose_by_loss_a_late_slot_is_not_probed() -> None:
    """It chooses among clusters that are there already, as all others do."""
    updates, _ = probed()
    settings = server(*PROBES, "server.clustering.k=3", "server.clustering.assign=loss")
    state = start(updates, settings)
    state, _ = play(state, [item for item in updates if item.client != "client-7"], settings)
    requests = plan_round(state, settings)
    assert all(request.candidates for request in requests)
    ids = [cluster.id for cluster in state.clusters]
    chosen = [replace(item, probes=(), cluster=ids[item.slot]) for item in updates]
    clients = sorted({item.client for item in updates})
    replies = [Reply(client, tuple(item for item in chosen if item.client == client)) for client in clients]
    after, report = finish_round(state, requests, replies, settings)
    assert not report.rejections
    assert after.assignment().keys() == {item.key for item in updates}
    beside = [replace(item, cluster=ids[item.slot]) for item in updates if item.client == "client-7"]
    _, report = finish_round(state, requests, [Reply("client-7", tuple(beside))], settings)
    assert {item.reason for item in report.rejections if item.client == "client-7"} == {"has 2 probes; expected 0"}


FAULTS = {
    "none": ((), "has 0 probes; expected 2"),
    "one": ((0,), "has 1 probes; expected 2"),
    "B": ((0, "m.lora_B"), "probe 2: tensor m.lora_B is not part of the adapter"),
    "shape": ((0, "m.lora_A"), r"probe 2: tensor m.lora_A has shape [3]; expected [1, 12]"),
    "headless": ((0, "head"), "probe 2: it has no head"),
    "nan": ((0, "nan"), "probe 2: tensor m.lora_A has values that are not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_probes_that_cannot_be_used_are_named(fault: str) -> None:
    updates, _ = probed()
    settings = server(*PROBES, "server.clustering.k=3")
    (keep, *what), told = FAULTS[fault][0] or (None,), FAULTS[fault][1]
    good = updates[0].probes
    bad = {
        "m.lora_B": {**good[1], "m.lora_B": updates[0].adapter["m.lora_B"]},
        "m.lora_A": {**good[1], "m.lora_A": np.zeros(3, np.float32)},
        "head": {name: tensor for name, tensor in good[1].items() if "head" not in name},
        "nan": {**good[1], "m.lora_A": np.full((1, 12), np.nan, np.float32)},
    }
    probes = () if keep is None else (good[0], *(bad[str(name)] for name in what))
    after, report = play(start(updates, settings), [replace(updates[0], probes=probes), *updates[1:]], settings)
    (rejection,) = report.rejections
    assert (rejection.client, rejection.slot, rejection.reason) == (updates[0].client, updates[0].slot, told)
    assert updates[0].key not in after.assignment()


def test_probes_of_another_head_are_refused() -> None:
    updates, _ = probed()
    settings = server(*PROBES, "server.clustering.k=3")
    state = start(updates, settings)
    more = {"head.3.weight": np.zeros((3, 12), np.float32), "head.3.bias": np.zeros(3, np.float32)}
    state = replace(state, initial={**state.initial, **more})
    other = {name: tensor for name, tensor in updates[0].probes[1].items() if "head" not in name}
    first = replace(updates[0], probes=(updates[0].probes[0], {**other, **more}))
    _, report = play(state, [first, *updates[1:]], settings)
    assert [item.reason for item in report.rejections] == ["probe 2: its heads are 3; the update's 2"]


def test_probes_that_nobody_asked_for_are_refused() -> None:
    updates, _ = probed()
    settings = server("server.clustering.k=3")
    _, report = play(start(updates, settings), updates, settings)
    assert {item.reason for item in report.rejections} == {"has 2 probes; expected 0"}


def test_with_probes_slots_are_grouped_after_the_first_round() -> None:
    base = {"backbone": {"name": "x"}, "tasks": ["sst2", "rte"]}
    assert load_config(base, PROBES).server_settings.clustering.from_round == 1
    assert load_config(base, [*PROBES, "server.clustering.from_round=1"]).server_settings.clustering.from_round == 1
    assert load_config(base).server_settings.clustering.from_round is None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("method=fltac-paper",), "server.clustering.probes: got 2 with rule=kmeans; allowed with spectral"),
        (("server.clustering.features=products",), "probes: got 2 with features=products; allowed with a and auto"),
        (("server.aggregation.rule=ffa",), "probes: got 2, but ffa does not always train A; allowed: 0"),
        (("federation.pool=sum",), "probes: got 2, but with federation.pool nothing is grouped; allowed: 0"),
        (("server.clustering.from_round=2",), "probes: got 2 with from_round=2, but by probes .*; allowed: 1"),
        (("server.clustering.from_round=auto",), "probes: got 2 with from_round=auto, but by probes .*; allowed: 1"),
        (("server.clustering.probes=-1",), "server.clustering.probes: got -1"),
        (("server.clustering.probes=65",), "server.clustering.probes: got 65"),
        (("server.clustering.probe_steps=0",), "server.clustering.probe_steps: got 0"),
    ],
)
def test_what_they_cannot_be_combined_with(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_config({"backbone": {"name": "x"}, "tasks": ["sst2", "rte"]}, [*PROBES, *overrides])
