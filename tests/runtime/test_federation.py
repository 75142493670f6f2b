"""Rounds over a network, without one: late, stale, twice, gone, refused, too large, and who is waited for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fltac.config import Config, load_config
from fltac.records import Reply, RoundReport, ServerState, Update
from fltac.runtime.federation import HELLO_SECONDS, REMINDER_SECONDS, Federation
from fltac.runtime.loop import Record, federate
from fltac.runtime.post import Kind
from fltac.runtime.roll import Roll
from fltac.server.round import init_server
from fltac.wire.node_protocol import NodeHello, decode_answer, encode_answer
from runtime.fake_post import REFERENCE, FakePost, nan_adapter
from server.builders import BODY, HEADS, adapter

TREE: dict[str, Any] = {
    "method": "fedit",
    "backbone": {"name": "x"},
    "federation": {"rounds": 2},
    "server": {"clustering": {"k": 2}},
}


def coordinator(*overrides: str) -> Config:
    return load_config(TREE, overrides)


class Game:
    """A federation over a fake post: its rounds, what it says, its records."""

    def __init__(self, post: FakePost, *overrides: str) -> None:
        self.post, self.config = post, coordinator(*overrides)
        self.said: list[str] = []
        self.records: list[Record] = []
        self.federation = Federation(post, self.config, REFERENCE, self.said.append, post.clock, post.sleep)
        self.state = ServerState(0, {}, ())

    def play(self, before_round: Callable[[int], None] = lambda _number: None) -> ServerState:
        present = self.federation.present()
        self.state = init_server(self.config.server_settings, BODY, HEADS, [item.client for item in present])

        def judge(_state: ServerState, _report: RoundReport, _last: bool) -> Record:
            return {"tasks": None, "mean_score": None, "clustering": None}

        def keep(state: ServerState, record: Record) -> None:
            self.state = state
            self.records.append(record)
            before_round(state.round_number + 1)

        before_round(1)
        return federate(self.state, self.config.rounds, self.config, self.federation, judge, keep)

    def reasons(self, number: int) -> dict[str, str]:
        return {item["client"]: item["reason"] for item in self.records[number - 1].get("rejections", [])}

    def network(self, number: int) -> Record:
        return dict(self.records[number - 1]["network"])


def trio(**settings: object) -> FakePost:
    post = FakePost()
    for client in ("a", "b", "c"):
        post.join(client, **settings)  # type: ignore[arg-type]
    return post


def test_everybody_there_replies_in_every_round_and_gets_the_result() -> None:
    post = trio()
    game = Game(post, "federation.quorum=3")
    state = game.play()
    assert state.assignment() == {("a", 0): 0, ("b", 0): 0, ("c", 0): 0}
    assert [record["updates"] for record in game.records] == [3, 3]
    for node in post.nodes_by_address.values():
        assert node.asked == ["query", "train", "train", "evaluate"]
    assert set(game.federation.scores) == {"a", "b", "c"}
    assert "client a is there (rows by slot: 0: 5)" in game.said


def test_bytes_are_counted_as_payload_and_on_the_wire_both_ways() -> None:
    post = trio()
    game = Game(post)
    game.play()
    first, last = game.network(1), game.network(2)
    assert first["wire"]["down"] == first["payload"]["down"] + 7 * 6, "three hellos and three trainings"
    assert first["wire"]["up"] == first["payload"]["up"] + 7 * 6
    assert last["wire"]["down"] == last["payload"]["down"] + 7 * 6, "three trainings and three deliveries"
    assert game.records[1]["bytes"]["down"] == last["payload"]["down"]
    assert game.records[0]["bytes"]["down"] < first["payload"]["down"], "hellos are no payload of a round"


def test_a_round_waits_for_the_quorum_and_says_so() -> None:
    post = FakePost()
    post.join("a")
    post.happen(2 * REMINDER_SECONDS, lambda: post.join("b") and None)
    game = Game(post, "federation.quorum=2", "federation.rounds=1")
    game.play()
    assert game.records[0]["clients"] == 2
    assert post.now >= 2 * REMINDER_SECONDS
    assert "waiting for 2 clients; there are 1: a" in game.said


def test_a_late_joiner_is_in_the_next_round_with_a_head_that_nobody_had() -> None:
    post = trio()
    game = Game(post, "federation.rounds=3")
    state = game.play(lambda number: post.join("d", "3") and None if number == 2 else None)
    assert [record["clients"] for record in game.records] == [3, 4, 4]
    assert state.clients == ("a", "b", "c", "d")
    assert state.initial["head.3.weight"].shape == (3, 3)
    assert ("d", 0) in state.assignment()


@pytest.mark.parametrize(("stale", "used"), [("drop", 0), ("use", 1)])
def test_a_client_past_the_deadline_is_left_out_until_its_reply_comes(stale: str, used: int) -> None:
    post = trio()
    post.nodes_by_address["c@1"].spoil = lambda kind, payload: payload
    slow = post.nodes_by_address["c@1"]
    slow.value = 4.0

    def slow_in_round_one(number: int) -> None:
        slow.seconds = 15.0 if number == 1 else 0.0
        for node in post.nodes_by_address.values():
            if node is not slow and number == 2:
                node.seconds = 6.0

    game = Game(post, "federation.deadline_seconds=10", f"federation.stale={stale}", "federation.rounds=3")
    state = game.play(slow_in_round_one)
    assert game.reasons(1) == {"c": "no reply within 10 s"}
    assert game.records[1]["clients"] == 2, "it is still busy when round 2 begins"
    assert game.records[1]["stale"] == used
    dropped = {"c": "its reply to round 1 came after the deadline"}
    assert game.reasons(2) == ({} if used else dropped)
    assert game.records[1]["updates"] == 2 + used
    assert game.records[2]["clients"] == 3
    assert (("c", 0) in state.assignment()) is True
    assert "client c: its reply to round 1 came late" in game.said


def test_a_reply_that_never_comes_costs_its_own_update_alone() -> None:
    post = trio()
    post.nodes_by_address["c@1"].spoil = lambda kind, payload: None if kind == "train" else payload
    game = Game(post, "federation.deadline_seconds=10")
    game.play()
    assert game.reasons(1) == {"c": "no reply within 10 s"}
    assert [record["updates"] for record in game.records] == [2, 2]
    assert [record["clients"] for record in game.records] == [3, 2]


def test_a_node_that_leaves_in_mid_round_is_not_waited_for_and_keeps_its_memory() -> None:
    post = trio()
    game = Game(post, "method=fltac", "server.clustering.features=a", "federation.rounds=3")
    lost = post.nodes_by_address["c@1"]

    def before(number: int) -> None:
        if number == 2:
            lost.spoil = lambda kind, payload: None if kind == "train" else payload
            post.happen(post.now + 5, lambda: post.leave("c@1"))
        if number == 3:
            post.join("c", address="c@2")

    state = game.play(before)
    assert game.reasons(2) == {"c": "its node has left"}
    assert [record["updates"] for record in game.records] == [3, 2, 3]
    (again,) = [node for address, node in post.nodes_by_address.items() if address == "c@2"]
    assert again.asked == ["query", "train", "evaluate"]
    assert ("c", 0) in state.memory


def test_two_nodes_with_one_client_id() -> None:
    post = trio()
    post.join("a", address="z@9", value=100.0)
    game = Game(post, "federation.rounds=3")
    state = game.play(lambda number: post.leave("a@1") if number == 3 else None)
    reason = "client a: another node that is connected has this client id"
    assert game.network(1)["refused"] == game.network(2)["refused"] == [reason]
    assert game.said.count(f"refused: {reason}") == 1, "said once, though asked again in every round"
    assert [record["clients"] for record in game.records] == [3, 3, 3]
    assert "refused" not in game.network(3), "the first has left, so the second may come in"
    assert state.clients == ("a", "b", "c")


def changed(**values: object) -> Callable[[NodeHello], NodeHello]:
    return lambda hello: replace(hello, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changed(backbone="c" * 64), "its backbone's weights are others (fingerprint cccccccccccc, the coordinator's"),
        (changed(tokenizer="d" * 64), "its tokenizer or image settings are others (fingerprint dddddddddddd"),
        (
            changed(body_shapes={**BODY, "m.lora_A": (4, 3)}),
            "its adapter differs: m.lora_A is 4x3, the coordinator's 1x3",
        ),
        (changed(body_shapes={"m.lora_A": (1, 3)}), "its adapter differs: m.lora_B is missing, the coordinator's 2x1"),
        (changed(heads={0: {"2": (2, 9)}}), "the head 2 of its slot 0 reads 9 values, the backbone gives 3"),
        (changed(heads={}, examples={}), "it has no slots"),
    ],
)
def test_a_node_that_does_not_fit_is_refused_by_name(change: Callable[[NodeHello], NodeHello], expected: str) -> None:
    post = trio()
    node = post.nodes_by_address["b@1"]
    node.hello = change(node.hello)
    game = Game(post)
    game.play()
    (reason,) = game.network(1)["refused"]
    assert reason.startswith(f"client b: {expected}")
    assert [record["clients"] for record in game.records] == [2, 2]


def test_another_protocol_version_or_no_sense_at_all_is_refused_by_the_nodes_name() -> None:
    post = trio()
    post.nodes_by_address["b@1"].spoil = lambda _kind, payload: payload.replace(b'"fltac-node":1', b'"fltac-node":2')
    post.nodes_by_address["c@1"].spoil = lambda _kind, _payload: b"\x80\x04hello"
    game = Game(post)
    game.play()
    assert game.network(1)["refused"] == [
        "node b@1: protocol version is 2; this side speaks 1",
        "node c@1: 7 bytes that are no fltac-node message",
    ]
    assert game.records[0]["clients"] == 1


def test_a_refused_node_is_asked_again_and_comes_in_once_it_is_mended() -> None:
    post = trio()
    node = post.nodes_by_address["b@1"]
    right = node.hello
    node.hello = replace(right, backbone="c" * 64)

    def mend(number: int) -> None:
        if number == 2:
            node.hello = right

    game = Game(post, "federation.rounds=3")
    game.play(mend)
    clients = [record["clients"] for record in game.records]
    assert (clients[0], clients[-1]) == (2, 3)


def test_a_refused_node_that_is_mended_while_the_round_waits_for_it_comes_in() -> None:
    post = trio()
    node = post.nodes_by_address["b@1"]
    right = node.hello
    node.hello = replace(right, backbone="c" * 64)
    post.happen(REMINDER_SECONDS / 2, lambda: setattr(node, "hello", right))
    game = Game(post, "federation.quorum=3", "federation.rounds=1")
    game.play()
    assert game.records[0]["clients"] == 3
    assert post.now < 2 * REMINDER_SECONDS


def test_a_node_that_answers_with_an_error_is_named_and_asked_again_who_it_is() -> None:
    post = trio()
    node = post.nodes_by_address["b@1"]
    node.spoil = lambda kind, payload: encode_answer(Reply("b", error="disk full")) if kind == "train" else payload
    game = Game(post)
    game.play()
    assert game.reasons(1) == {"b": "disk full"}
    assert node.asked == ["query", "train", "query", "train", "evaluate"]
    assert "client b: disk full" in game.said


def test_uploads_that_are_not_numbers_or_of_another_shape_are_left_out_by_name() -> None:
    post = trio()
    post.nodes_by_address["b@1"].trained = lambda _slot: nan_adapter()  # type: ignore[method-assign]
    wrong = {**adapter(1, 1), "m.lora_B": np.zeros((3, 1), np.float32)}
    post.nodes_by_address["c@1"].trained = lambda _slot: wrong  # type: ignore[method-assign]
    game = Game(post)
    game.play()
    for number in (1, 2):
        assert game.reasons(number) == {
            "b": "tensor m.lora_A has values that are not finite",
            "c": "tensor m.lora_B has shape [3, 1]; expected [2, 1]",
        }
        assert game.records[number - 1]["updates"] == 1


def test_a_reply_that_arrives_twice_counts_once() -> None:
    post = trio()
    post.repeat = 1
    game = Game(post)
    state = game.play()
    assert [record["updates"] for record in game.records] == [3, 3]
    assert game.network(1)["answered_twice"] == 6
    assert state.clusters[0].adapter["m.lora_A"][0, 0] == 1.0


def test_a_node_that_answers_for_another_client() -> None:
    post = trio()
    impostor = encode_answer(Reply("a", (Update("a", 0, adapter(9, 9), 5),)))
    post.nodes_by_address["b@1"].spoil = lambda kind, payload: impostor if kind == "train" else payload
    game = Game(post)
    state = game.play()
    assert game.reasons(1) == {"b": "its node answers as client 'a'"}
    assert state.clusters[0].adapter["m.lora_A"][0, 0] == 1.0


def test_a_score_where_adapters_are_asked_for() -> None:
    post = trio()
    node = post.nodes_by_address["b@1"]

    def scores(kind: Kind, payload: bytes) -> bytes:
        return encode_answer(Reply("b")) if kind == "evaluate" else payload

    node.spoil = scores
    game = Game(post, "federation.rounds=1")
    game.play()
    assert game.network(1)["unscored"] == ["client b: answers with adapters, not with scores"]


def test_messages_beyond_the_limit_are_neither_sent_nor_read() -> None:
    post = trio()
    game = Game(post)
    game.federation._limit = 700  # A hello fits in, a reply with an adapter does not.
    game.play()
    assert all("bytes; allowed are 700" in reason for reason in game.reasons(1).values())
    post = trio()
    post.refuse_larger_than = 300
    game = Game(post)
    game.play()
    assert all("bytes are too many" in reason for reason in game.reasons(1).values())
    assert [record["updates"] for record in game.records] == [0, 0]


def test_a_slot_that_is_added_or_given_up_is_noticed_by_the_reply() -> None:
    post = trio()
    node = post.nodes_by_address["b@1"]
    one = node.hello
    post.join("b", "2", "3", address="tmp")
    two = post.nodes_by_address.pop("tmp").hello

    def change(number: int) -> None:
        node.hello = two if number in (2, 3) else one

    game = Game(post, "federation.rounds=4")
    state = game.play(change)
    assert [record["updates"] for record in game.records] == [3, 3, 4, 3]
    assert game.records[1]["network"]["undeclared"] == ["client b: slot 1 is not used: its node has not said it has it"]
    assert node.asked == ["query", "train", "train", "query", "train", "train", "evaluate"]
    assert "head.3.weight" in state.initial


def test_a_node_that_never_says_who_it_is_delays_but_does_not_stop() -> None:
    post = trio()
    post.nodes_by_address["c@1"].spoil = lambda _kind, _payload: None
    game = Game(post)
    game.play()
    assert [record["clients"] for record in game.records] == [2, 2]
    assert HELLO_SECONDS <= post.now < 2 * HELLO_SECONDS, "it is waited for once, not in every round"


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        ({0: {"1000000": (1000000, 3)}}, "the head 1000000 of its slot 0 has 1000000 outputs; allowed are 10000"),
        ({slot: {"2": (2, 3)} for slot in range(257)}, "it has 257 slots; allowed are 256"),
        ({0: {str(n): (n, 3) for n in range(2, 67)}}, "with its heads there would be 65 kinds; allowed are 64"),
    ],
)
def test_nobody_may_bloat_what_all_are_sent(heads: dict[int, dict[str, tuple[int, int]]], reason: str) -> None:
    roll = Roll(REFERENCE)
    hello = replace(trio().nodes_by_address["a@1"].hello, heads=heads, examples=dict.fromkeys(heads, 5))
    assert roll.enter("a@1", hello) == f"client a: {reason}"


def test_nobody_counts_for_more_examples_or_slots_than_it_said() -> None:
    post = trio()

    def greedy(kind: Kind, payload: bytes) -> bytes:
        if kind != "train":
            return payload
        update = Update("c", 0, adapter(9, 9), 2**52)
        return encode_answer(Reply("c", (update, replace(update, slot=7))))

    post.nodes_by_address["c@1"].spoil = greedy
    game = Game(post, "federation.rounds=1")
    state = game.play()
    assert game.records[0]["updates"] == 3
    assert game.network(1)["undeclared"] == ["client c: slot 7 is not used: its node has not said it has it"]
    others = post.nodes_by_address["a@1"].value
    assert state.clusters[0].adapter["m.lora_A"][0, 0] == pytest.approx((others + others + 9) / 3)


def test_the_roll_takes_what_a_node_says_now() -> None:
    roll = Roll(REFERENCE)
    post = trio()
    hello = post.nodes_by_address["a@1"].hello
    assert roll.enter("a@1", hello) is None
    assert roll.enter("a@1", replace(hello, examples={0: 7})) is None
    assert roll.hellos["a@1"].examples == {0: 7}
    assert roll.enter("a@1", replace(hello, backbone="0" * 64)) is not None
    assert roll.clients() == {}
    roll.keep([])
    assert roll.refused == {}
    assert isinstance(decode_answer(encode_answer(hello)), NodeHello)
