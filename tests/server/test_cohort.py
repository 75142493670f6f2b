"""Clients that come, slots that go, heads that nobody had before; replies that come late; a quorum."""

import numpy as np
import pytest

from fltac.records import LateReply, Presence, Rejection, Reply, Request, ServerState
from fltac.server.cohort import admit, draw_cohort
from fltac.server.round import finish_round, plan_delivery, plan_round
from server.builders import adapter, reply, server, state

KMEANS = "method=fltac-paper"
TWO = {"2": (2, 3)}
THREE = {"3": (3, 3)}


def there(client: str, *heads: dict[str, tuple[int, int]]) -> Presence:
    return Presence(client, dict(enumerate(heads)))


def after_a_round(*overrides: str) -> ServerState:
    first = state("a", "b")
    settings = server(*overrides)
    replies = [reply("a", adapter(1, 1), adapter(2, -2)), reply("b", adapter(3, 3))]
    return finish_round(first, plan_round(first, settings), replies, settings)[0]


def test_everybody_known_and_nothing_new_is_the_same_state() -> None:
    before = after_a_round("method=fltac")
    assert admit(before, [there("a", TWO, TWO), there("b", TWO)], server()) is before
    assert admit(before, [there("b", TWO)], server()) is before, "who is away stays known"


def test_a_late_joiner_is_known_and_begins_from_v0() -> None:
    before, settings = after_a_round("method=fltac"), server("method=fltac")
    present = [there("a", TWO, TWO), there("b", TWO), there("c", TWO)]
    after = admit(before, present, settings)
    assert after.clients == ("a", "b", "c")
    assert after.clusters == before.clusters
    requests = {request.client: request for request in plan_round(after, settings, present)}
    assert requests["a"].initial is None
    assert requests["c"].initial is after.initial
    assert requests["c"].slots == {}


@pytest.mark.parametrize("overrides", [("method=fedit",), ("method=fltac", "server.clustering.from_round=3")])
def test_as_long_as_all_are_together_a_late_joiner_begins_from_what_they_share(overrides: tuple[str, ...]) -> None:
    before, settings = after_a_round(*overrides), server(*overrides)
    present = [there("a", TWO, TWO), there("b", TWO), there("c", TWO)]
    after = admit(before, present, settings)
    (together,) = after.clusters
    requests = {request.client: request for request in plan_round(after, settings, present)}
    assert requests["c"].initial is None
    assert requests["c"].slots == {0: together.id}
    assert requests["c"].adapters[together.id] is together.adapter
    joined, report = finish_round(after, list(requests.values()), [reply("c", adapter(9, 9))], settings)
    assert report.updates == 1
    assert ("c", 0) in joined.assignment()
    if joined.memory:  # what it learned counts from what it was sent
        learned = np.abs(joined.memory["c", 0]["body"]).max()
        assert learned == pytest.approx(9 - together.adapter["m.lora_A"].max())


def test_before_means_are_sent_a_late_joiner_begins_from_v0() -> None:
    overrides = ("method=fedit", "server.aggregation.from_round=3")
    before, settings = after_a_round(*overrides), server(*overrides)
    present = [there("a", TWO, TWO), there("b", TWO), there("c", TWO)]
    requests = {item.client: item for item in plan_round(admit(before, present, settings), settings, present)}
    assert requests["c"].slots == {}
    assert requests["c"].initial is not None


def test_a_new_head_is_drawn_for_itself_whoever_brings_it_and_when() -> None:
    settings = server("method=fedit")
    early = admit(state("a"), [there("c", THREE)], settings)
    later = admit(after_a_round("method=fedit"), [there("d", {"7": (7, 3)}, THREE)], settings)
    np.testing.assert_array_equal(early.initial["head.3.weight"], later.initial["head.3.weight"])
    assert later.initial["head.7.weight"].shape == (7, 3)
    assert not later.initial["head.3.bias"].any()
    assert 0 < np.abs(later.initial["head.7.weight"]).max() < 0.2
    for name, tensor in state("a").initial.items():
        np.testing.assert_array_equal(early.initial[name], tensor)
    other = admit(state("a"), [there("c", THREE)], server("federation.seed=1"))
    assert not np.array_equal(other.initial["head.3.weight"], early.initial["head.3.weight"])


def test_a_slot_with_a_head_that_its_cluster_lacks_is_sent_v0_too() -> None:
    settings = server("method=fedit")
    present = [there("a", TWO, THREE), there("b", TWO)]
    after = admit(after_a_round("method=fedit"), present, settings)
    one, other = plan_round(after, settings, present)
    assert one.slots == {0: 0, 1: 0}
    assert one.initial is after.initial
    assert other.initial is None


def test_a_slot_that_was_given_up_is_forgotten_and_begins_anew_if_it_comes_back() -> None:
    settings = server("method=fltac")
    before = after_a_round("method=fltac")
    assert ("a", 1) in before.memory
    after = admit(before, [there("a", TWO), there("b", TWO)], settings)
    assert set(after.assignment()) == {("a", 0), ("b", 0)}
    assert set(after.memory) == {("a", 0), ("b", 0)}
    assert [cluster.id for cluster in after.clusters] == [cluster.id for cluster in before.clusters]
    back = [there("a", TWO, TWO)]
    (request,) = plan_round(admit(after, back, settings), settings, back)
    assert 1 not in request.slots
    assert request.initial is after.initial


def test_the_cohort_is_drawn_among_those_who_are_there_and_never_below_the_quorum() -> None:
    names = tuple("abcdefgh")
    assert len(draw_cohort(names, 0.25, 0, 1)) == 2
    assert len(draw_cohort(names, 0.25, 0, 1, least=5)) == 5
    assert draw_cohort(("a",), 0.25, 0, 1, least=5) == ("a",)
    settings = server(KMEANS, "federation.participation=0.5")
    present = [there("b", TWO), there("d", TWO)]
    before = admit(state("a", "b", "c", "d"), present, settings)
    for number in range(10):
        (request,) = plan_round(ServerState(number, before.initial, before.clients), settings, present)
        assert request.client in ("b", "d")
    assert [request.client for request in plan_delivery(before, settings, present)] == ["b", "d"]


def test_fewer_replies_than_the_quorum_change_nothing() -> None:
    settings = server(KMEANS, "federation.quorum=2")
    before = after_a_round(KMEANS)
    replies = [reply("a", adapter(9, 9)), Reply("b", error="disk full")]
    after, report = finish_round(before, plan_round(before, settings), replies, settings)
    assert after.clusters == before.clusters
    assert after.round_number == 2
    assert report.updates == 0
    few = "1 clients replied, fewer than the quorum of 2; the round changes nothing"
    assert set(report.rejections) == {Rejection("b", None, "disk full"), Rejection("a", None, few)}


def late(before: ServerState, client: str, value: float) -> LateReply:
    """A reply to a request of round 1, which began from v0."""
    return LateReply(Request(1, client, {}, {}, before.initial), reply(client, adapter(value, value)))


def test_a_reply_after_the_deadline_is_dropped_and_named() -> None:
    settings = server("method=fedit")
    before = after_a_round("method=fedit")
    arrived = [late(before, "c", 100)]
    after, report = finish_round(
        before, plan_round(before, settings), [reply("a", adapter(4, 4))], settings, None, arrived
    )
    assert after.clusters[0].adapter["m.lora_A"][0, 0] == 4.0
    assert Rejection("c", None, "its reply to round 1 came after the deadline") in report.rejections
    assert (report.updates, report.stale) == (1, 0)


def test_a_stale_reply_counts_as_it_is_where_that_is_wanted() -> None:
    settings = server("method=fedit", "federation.stale=use")
    before = after_a_round("method=fedit")
    arrived = [late(before, "c", 10)]
    after, report = finish_round(
        before, plan_round(before, settings), [reply("a", adapter(4, 4))], settings, None, arrived
    )
    assert after.clusters[0].adapter["m.lora_A"][0, 0] == 7.0
    assert (report.updates, report.stale) == (2, 1)
    assert ("c", 0) in after.assignment()


def test_a_newer_update_of_the_same_slot_goes_first() -> None:
    settings = server("method=fedit", "federation.stale=use")
    before = after_a_round("method=fedit")
    arrived = [late(before, "a", 10)]
    after, report = finish_round(
        before, plan_round(before, settings), [reply("a", adapter(4, 4))], settings, None, arrived
    )
    assert after.clusters[0].adapter["m.lora_A"][0, 0] == 4.0
    assert Rejection("a", 0, "its update of round 1 came after a newer one") in report.rejections
    assert report.stale == 0


def test_what_a_stale_update_learned_counts_from_where_it_began() -> None:
    """Both clients hold the cluster's adapter (2, 2); the stale one began from (1, 3) of an earlier round."""
    settings = server(
        "method=fltac", "server.clustering.features=products", "server.clustering.k=1", "federation.stale=use"
    )
    first = state("a", "b")
    older = adapter(1, 3)
    before, _ = finish_round(
        first, plan_round(first, settings), [reply("a", adapter(2, 2)), reply("b", adapter(2, 2))], settings
    )
    arrived = [LateReply(Request(1, "b", {0: 5}, {5: older}, None), reply("b", adapter(1, 4)))]
    after, _ = finish_round(before, plan_round(before, settings), [reply("a", adapter(2, 3))], settings, None, arrived)
    # Matrices this small are kept whole.
    np.testing.assert_allclose(
        after.memory["b", 0]["body"].reshape(2, 3), np.full((2, 3), (2 * 2) + (1 * 4 - 1 * 3)), atol=1e-5
    )


@pytest.mark.parametrize("stale", ["drop", "use"])
def test_a_late_error_says_what_it_was(stale: str) -> None:
    settings = server("method=fedit", f"federation.stale={stale}")
    before = after_a_round("method=fedit")
    arrived = [LateReply(Request(1, "c", {}, {}, before.initial), Reply("c", error="disk full"))]
    _, report = finish_round(before, plan_round(before, settings), [reply("a", adapter(4, 4))], settings, None, arrived)
    assert Rejection("c", None, "late, of round 1: disk full") in report.rejections


@pytest.mark.parametrize("bad", [float("nan"), 1e9])
def test_late_replies_are_checked_like_others(bad: float) -> None:
    settings = server("method=fedit", "federation.stale=use")
    before = after_a_round("method=fedit")
    _, report = finish_round(
        before, plan_round(before, settings), [reply("a", adapter(4, 4))], settings, None, [late(before, "c", bad)]
    )
    assert report.stale == 0
    assert [item.client for item in report.rejections if item.slot == 0] == ["c"]


def test_the_server_may_have_a_seed_of_its_own() -> None:
    assert server("federation.seed=3").seed == 3
    assert server("federation.seed=3", "server.seed=0").seed == 0


def test_late_replies_to_a_round_below_its_quorum_are_recorded() -> None:
    settings = server("method=fedit", "federation.stale=use", "federation.quorum=2")
    before = after_a_round("method=fedit")
    after, report = finish_round(
        before, plan_round(before, settings), [reply("a", adapter(4, 4))], settings, None, [late(before, "c", 1)]
    )
    assert after.clusters == before.clusters
    assert any(item.client == "c" and "came late" in item.reason for item in report.rejections)
