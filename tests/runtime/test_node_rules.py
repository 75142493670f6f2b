"""Rules of aggregation that change what a data owner's node receives or trains: as the simulation, or refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fltac.records import Adapter, Reply
from fltac.server.round import finish_round, plan_round
from fltac.wire.node_protocol import decode_answer, encode_train_question
from runtime.owners import federation
from runtime.test_node import Both, assert_same, train_error


@pytest.mark.parametrize(
    "settings",
    [
        ("server.aggregation.rule=fedex",),
        ("server.aggregation.rule=ffa",),
        ("server.aggregation.rule=rolora",),
        ("server.aggregation.rule=fedsa",),
        ("server.aggregation.rule=hetlora", "lora.rank=2", "lora.ranks={client-0: 1}"),
        ("server.aggregation.rule=flexlora", "lora.rank=2", "lora.ranks={client-0: 1}"),
        ("server.aggregation.rule=flora", "lora.rank=2", "lora.ranks={client-0: 1}"),
        ("server.aggregation.from_round=2",),
    ],
    ids=["fedex", "ffa", "rolora", "fedsa", "hetlora", "flexlora", "flora", "means from round 2"],
)
def test_nodes_train_as_the_simulation(settings: tuple[str, ...], tmp_path: Path) -> None:
    both = Both(tmp_path, federation(tmp_path, *settings))
    state, server = both.first_state(), both.config.server_settings
    nodes = {client: both.node(client) for client in both.experiment.clients}
    for _ in range(2):
        replies = []
        requests = plan_round(state, server)
        for request in requests:
            answer = decode_answer(nodes[request.client].answer(encode_train_question(request, "float32")))
            assert isinstance(answer, Reply)
            assert_same(answer, both.simulated(request, state.initial)[1])
            replies.append(answer)
        state, report = finish_round(state, requests, replies, server)
        assert report.rejections == ()


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("residual")
    return Both(folder, federation(folder, "server.aggregation.rule=fedex"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda name, base: {name + ".base_A": base}, "has no counterpart"),
        (lambda name, base: {name + ".base_A": base, name + ".base_B": base}, "is of a base [2, 16] [2, 16]"),
        (lambda name, base: {name + ".base_A": base * np.inf, name + ".base_B": base.T}, "not finite"),
        (lambda name, base: {"other.base_A": base, "other.base_B": base.T}, "tensor other.base_A is not part of"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(damage: object, message: str, residual: Both) -> None:
    state = residual.first_state()
    request = next(one for one in plan_round(state, residual.config.server_settings) if one.client == "client-0")
    name = next(iter(state.initial)).removesuffix(".lora_A")
    base: Adapter = damage(name, np.ones((2, 16), np.float32))  # type: ignore[operator]
    error = train_error(residual.node("client-0"), replace(request, initial={**state.initial, **base}))
    assert message in error
