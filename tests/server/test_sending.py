"""What the rules of aggregation change in a round: what is expected, what is sent, what the server keeps."""

import numpy as np
import pytest

from fltac.config import ServerSettings, load_config
from fltac.records import Adapter, Presence, Reply, Request, ServerState, Update, base_of, is_head
from fltac.server.round import finish_round, init_server, plan_round

BODY = {"m.lora_A": (2, 3), "m.lora_B": (4, 2)}
HEADS = {"2": (2, 3)}


def server(*overrides: str) -> ServerSettings:
    tree = {"backbone": {"name": "x"}, "tasks": ["sst2", "rte"], "lora": {"rank": 2}}
    return load_config(tree, ["server.clustering.features=a", *overrides]).server_settings


def learned(request: Request, seed: int, settings: ServerSettings, slot: int = 0) -> Update:
    """What a client uploads: all that is trained in the round, moved away from what it was sent."""
    draw = np.random.default_rng(seed)
    frozen = settings.aggregation.frozen(request.round_number) or "?"
    sent = request.sent(slot) or request.initial or {}
    adapter = {
        name: (tensor + draw.normal(size=tensor.shape)).astype(np.float32)
        for name, tensor in sent.items()
        if name not in base_of(sent) and (is_head(name) or not name.endswith(frozen))
    }
    return Update(request.client, slot, adapter, 1)


def start(settings: ServerSettings, *clients: str) -> ServerState:
    return init_server(settings, BODY, HEADS, clients)


def play(state: ServerState, settings: ServerSettings, seed: int = 0) -> tuple[ServerState, list[Update]]:
    """One round in which everybody trains one slot."""
    requests = plan_round(state, settings)
    updates = [learned(request, seed + number, settings) for number, request in enumerate(requests)]
    replies = [Reply(update.client, (update,)) for update in updates]
    after, report = finish_round(state, requests, replies, settings)
    assert report.rejections == ()
    return after, updates


def total(adapter: Adapter) -> np.ndarray:
    out = adapter["m.lora_B"].astype(np.float64) @ adapter["m.lora_A"]
    return out + adapter["m.base_B"].astype(np.float64) @ adapter["m.base_A"] if "m.base_A" in adapter else out


def test_ffa_keeps_the_first_a_and_sends_it_once() -> None:
    settings = server("method=ffa-lora")
    first = start(settings, "a", "b")
    assert "m.lora_A" in (plan_round(first, settings)[0].initial or {})
    after, updates = play(first, settings)
    assert all("m.lora_A" not in update.adapter for update in updates)
    (cluster,) = after.clusters
    np.testing.assert_array_equal(cluster.adapter["m.lora_A"], first.initial["m.lora_A"])
    mean = np.mean([update.adapter["m.lora_B"] for update in updates], axis=0)
    np.testing.assert_allclose(cluster.adapter["m.lora_B"], mean, rtol=1e-6)
    (again,) = plan_round(after, settings, [Presence("a", {0: {"2": (2, 3)}}, keeps_initial=True)])
    assert set(again.adapters[0]) == {"m.lora_B", "head.2.weight", "head.2.bias"}
    (forgetful,) = plan_round(after, settings, [Presence("a", {0: {"2": (2, 3)}})])
    assert "m.lora_A" in forgetful.adapters[0]
    play(after, settings)


def test_a_factor_that_is_not_trained_is_refused_in_an_upload() -> None:
    settings = server("method=ffa-lora")
    first = start(settings, "a")
    (request,) = plan_round(first, settings)
    replies = [Reply("a", (Update("a", 0, dict(first.initial), 1),))]
    _, report = finish_round(first, [request], replies, settings)
    assert [item.reason for item in report.rejections] == ["tensor m.lora_A is not part of the adapter"]


def test_rolora_trains_b_then_a() -> None:
    settings = server("method=rolora")
    first = start(settings, "a", "b")
    one, updates = play(first, settings)
    assert {name for update in updates for name in update.adapter if not is_head(name)} == {"m.lora_B"}
    np.testing.assert_array_equal(one.clusters[0].adapter["m.lora_A"], first.initial["m.lora_A"])
    two, updates = play(one, settings)
    assert {name for update in updates for name in update.adapter if not is_head(name)} == {"m.lora_A"}
    np.testing.assert_array_equal(two.clusters[0].adapter["m.lora_B"], one.clusters[0].adapter["m.lora_B"])
    mean = np.mean([update.adapter["m.lora_A"] for update in updates], axis=0)
    np.testing.assert_allclose(two.clusters[0].adapter["m.lora_A"], mean, rtol=1e-5, atol=1e-6)


def test_momentum_does_not_move_the_factor_whose_turn_it_is_not() -> None:
    settings = server("method=rolora", "server.aggregation.optimizer=fedavgm")
    one, _ = play(start(settings, "a", "b"), settings)
    two, _ = play(one, settings)
    np.testing.assert_array_equal(two.clusters[0].adapter["m.lora_B"], one.clusters[0].adapter["m.lora_B"])


def test_fedsa_averages_a_and_gives_each_slot_its_own_b_back() -> None:
    settings = server("method=fedsa-lora")
    after, updates = play(start(settings, "a", "b"), settings)
    for request, update in zip(plan_round(after, settings), updates, strict=True):
        sent = request.sent(0)
        assert sent is not None
        np.testing.assert_array_equal(sent["m.lora_B"], update.adapter["m.lora_B"])
        mean = np.mean([item.adapter["m.lora_A"] for item in updates], axis=0)
        np.testing.assert_allclose(sent["m.lora_A"], mean, rtol=1e-5, atol=1e-6)
    play(after, settings)


@pytest.mark.parametrize("method", ["flexlora", "hetlora", "flora"])
def test_a_client_of_a_smaller_rank_is_sent_and_uploads_no_more(method: str) -> None:
    settings = server(f"method={method}", "lora.ranks={b: 1}")
    first = start(settings, "a", "b")
    for state in (first, play(first, settings)[0]):
        large, small = plan_round(state, settings)
        for request, rank in ((large, 2), (small, 1)):
            sent = request.sent(0) or request.initial or {}
            assert sent["m.lora_A"].shape == (rank, 3)
            assert sent["m.lora_B"].shape == (4, rank)
    after, updates = play(play(first, settings)[0], settings, seed=7)
    assert updates[1].adapter["m.lora_A"].shape == (1, 3)
    assert after.clusters[0].adapter["m.lora_A"].shape == (2, 3)


def test_an_upload_of_another_rank_than_the_clients_is_refused() -> None:
    settings = server("method=flexlora", "lora.ranks={b: 1}")
    first = start(settings, "a", "b")
    requests = plan_round(first, settings)
    whole = first.initial
    replies = [Reply(client, (Update(client, 0, whole, 1),)) for client in ("a", "b")]
    after, report = finish_round(first, requests, replies, settings)
    assert [(item.client, item.reason) for item in report.rejections] == [
        ("b", "tensor m.lora_A has shape [2, 3]; expected [1, 3]")
    ]
    assert after.clusters[0].members == (("a", 0),)


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_the_frozen_weights_gain_what_was_learned_round_after_round(method: str) -> None:
    settings = server(f"method={method}")
    state = start(settings, "a", "b", "c")
    for number in range(3):
        before = base_of(state.clusters[0].adapter) if state.clusters else {}
        after, updates = play(state, settings, seed=10 * number)
        expected = np.mean([total({**update.adapter, **before}) for update in updates], axis=0)
        np.testing.assert_allclose(total(after.clusters[0].adapter), expected, atol=1e-4)
        state = after
    if method == "flora":
        assert not state.clusters[0].adapter["m.lora_B"].any()
        assert not np.array_equal(state.clusters[0].adapter["m.lora_A"], state.initial["m.lora_A"])


@pytest.mark.parametrize("rule", ["flora", "fedex"])
@pytest.mark.parametrize("clustering", ["kmeans", "spectral", "none"])
def test_residuals_work_with_clusters(rule: str, clustering: str) -> None:
    """Six clients, two clusters, several rounds: whoever comes together, the product is the exact mean."""
    settings = server(
        f"server.aggregation.rule={rule}", f"server.clustering.rule={clustering}", "server.clustering.k=2"
    )
    state = start(settings, *"abcdef")
    for number in range(3):
        requests = plan_round(state, settings)
        updates = [learned(request, 100 * number + index, settings) for index, request in enumerate(requests)]
        sent = {request.client: request.sent(0) or state.initial for request in requests}
        after, report = finish_round(state, requests, [Reply(update.client, (update,)) for update in updates], settings)
        assert report.rejections == ()
        assert report.product_error is not None
        assert report.product_error < 1e-4
        for cluster in after.clusters:
            own = [update for update in updates if (update.client, 0) in cluster.members]
            expected = np.mean([total({**item.adapter, **base_of(sent[item.client])}) for item in own], axis=0)
            np.testing.assert_allclose(total(cluster.adapter), expected, atol=1e-4)
        state = after


def test_the_optimizers_moments_belong_to_the_cluster() -> None:
    settings = server("method=fedavgm", "server.aggregation.momentum=0.5")
    first = start(settings, "a")
    one, (update,) = play(first, settings)
    np.testing.assert_allclose(one.clusters[0].adapter["m.lora_B"], update.adapter["m.lora_B"], rtol=1e-5)
    two, (after,) = play(one, settings)
    held, mean = one.clusters[0].adapter["m.lora_B"], after.adapter["m.lora_B"]
    expected = held + 0.5 * (update.adapter["m.lora_B"] - first.initial["m.lora_B"]) + (mean - held)
    np.testing.assert_allclose(two.clusters[0].adapter["m.lora_B"], expected, rtol=1e-4, atol=1e-5)
    assert set(two.optimizer) == {0}
