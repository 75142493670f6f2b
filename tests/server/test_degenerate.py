"""Uploads that say nothing, too few of them, and slots that cannot-link keeps apart: each rule has a defined answer."""

from itertools import groupby

import numpy as np
import pytest

from fltac.records import Adapter, Reply, ServerState
from fltac.server.round import finish_round, init_server, plan_round
from server.builders import BODY, HEADS, adapter, reply, server

RULES = (
    ("method=fltac",),
    ("method=fltac", "server.clustering.k=auto"),
    ("method=fltac", "server.clustering.cannot_link=false"),
    ("method=fltac", "server.clustering.hysteresis=0.1"),
    ("method=fltac-paper",),
    ("method=cfl",),
    ("method=fedlease",),
)


def played(replies: list[Reply], overrides: tuple[str, ...], rounds: int = 2) -> ServerState:
    settings = server(*overrides)
    clients = [item.client for item in replies]
    state = init_server(settings, BODY, HEADS, clients)
    for _ in range(rounds):
        state, report = finish_round(state, plan_round(state, settings), replies, settings)
        assert not report.rejections
    return state


def first(*overrides: str) -> Adapter:
    return init_server(server(*overrides), BODY, HEADS, ["a"]).initial


@pytest.mark.parametrize("overrides", RULES, ids=" ".join)
@pytest.mark.parametrize("what", ["v0", "zero", "identical"])
def test_uploads_that_are_all_the_same(what: str, overrides: tuple[str, ...]) -> None:
    """v0 again is a change of nothing; whoever is together, everybody holds what everybody sent."""
    sent = {"v0": first(*overrides), "zero": adapter(0, 0), "identical": adapter(2, 1, 3)}[what]
    state = played([reply("a", sent, sent), reply("b", sent, sent), reply("c", sent)], overrides)
    assert set(state.assignment()) == {("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)}
    for key in state.assignment():
        held = state.received(key)
        for name, tensor in sent.items():
            np.testing.assert_allclose(held[name], tensor, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("overrides", RULES, ids=" ".join)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_one_client_alone(slots: int, overrides: tuple[str, ...]) -> None:
    """With one slot there is less to group than K = 2, and with three more than it can keep apart."""
    sent = [adapter(number + 1, 1, number) for number in range(slots)]
    state = played([reply("a", *sent)], overrides)
    held = [state.assignment()["a", slot] for slot in range(slots)]
    assert 1 <= len(set(held)) <= slots
    if overrides[0] == "method=fltac" and "server.clustering.cannot_link=false" not in overrides:
        known = "server.clustering.k=auto" not in overrides
        assert len(set(held)) == (min(slots, 2) if known else slots), "as far apart as K = 2 allows"


def test_two_slots_of_one_task_at_a_client_fall_apart_under_cannot_link() -> None:
    """A client that holds a task twice breaks the assumption; one of the two goes elsewhere, and without it neither."""
    same, other = adapter(1, 1, 1), adapter(-1, 1, -1)
    replies = [reply("a", same, same), *(reply(name, same, other) for name in "bcd")]
    linked = played(replies, ("method=fltac",)).assignment()
    assert linked["a", 0] != linked["a", 1]
    free = played(replies, ("method=fltac", "server.clustering.cannot_link=false")).assignment()
    assert free["a", 0] == free["a", 1] == free["b", 0]
    by_client = groupby(sorted(key for key in free if key[0] != "a"), key=lambda key: key[0])
    assert all(len({free[key] for key in keys}) == 2 for _, keys in by_client)
