"""Questions and answers between a coordinator and a data owner: round trips, and what is refused by which words."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fltac.records import Reply, Request, Update
from fltac.wire.blob import WireError
from fltac.wire.node_protocol import (
    Answer,
    HelloQuestion,
    NodeHello,
    ScoreQuestion,
    Scores,
    SlotScore,
    TrainQuestion,
    decode_answer,
    decode_question,
    encode_answer,
    encode_hello_question,
    encode_score_question,
    encode_train_question,
    one_line,
)

ADAPTER = {"m.lora_A": np.arange(3, dtype=np.float32).reshape(1, 3), "head.2.bias": np.zeros(2, np.float32)}
REQUEST = Request(3, "hospital-a", {0: 4}, {4: ADAPTER}, None)
HELLO = NodeHello(
    client="hospital-a",
    examples={7: 12, 0: 5},
    heads={7: {"2": (2, 16)}, 0: {"3": (3, 16), "1": (1, 16)}},
    backbone="0" * 64,
    tokenizer="a" * 64,
    body_shapes={"m.lora_A": (1, 3), "m.lora_B": (4, 1)},
)


def test_the_bytes_of_a_message() -> None:
    """Fixed by the protocol's version: a change of these needs another one."""
    assert encode_hello_question() == b'{"fltac-node":1,"kind":"hello"}\n'
    scores = Scores("a", {1: SlotScore(0.5, 8)})
    assert encode_answer(scores) == (b'{"fltac-node":1,"kind":"scores"}\n{"client":"a","slots":[[1,0.5,8]]}')
    line, body = encode_answer(HELLO).split(b"\n")
    assert line == b'{"fltac-node":1,"kind":"node"}'
    assert json.loads(body) == {
        "client": "hospital-a",
        "slots": [[0, 5, [["1", 1, 16], ["3", 3, 16]]], [7, 12, [["2", 2, 16]]]],
        "backbone": "0" * 64,
        "tokenizer": "a" * 64,
        "body": {"m.lora_A": [1, 3], "m.lora_B": [4, 1]},
    }


def test_questions_round_trip() -> None:
    assert decode_question(encode_hello_question()) == HelloQuestion()
    train = decode_question(encode_train_question(REQUEST, "float16"))
    assert isinstance(train, TrainQuestion)
    assert train.request.slots == {0: 4}
    np.testing.assert_array_equal(train.request.adapters[4]["m.lora_A"], ADAPTER["m.lora_A"])
    for max_rows in (None, 50):
        score = decode_question(encode_score_question(REQUEST, "float32", max_rows))
        assert isinstance(score, ScoreQuestion)
        assert score.max_rows == max_rows
        assert score.request.client == "hospital-a"


def test_answers_round_trip() -> None:
    assert decode_answer(encode_answer(HELLO)) == HELLO
    assert HELLO.slots == (0, 7)
    scores = Scores("hospital-a", {3: SlotScore(1 / 3, 9), 0: SlotScore(-0.25, 1)})
    assert decode_answer(encode_answer(scores)) == scores
    reply = decode_answer(encode_answer(Reply("hospital-a", (Update("hospital-a", 2, ADAPTER, 9),)), "float16"))
    assert isinstance(reply, Reply)
    assert [(update.slot, update.examples) for update in reply.updates] == [(2, 9)]
    assert decode_answer(encode_answer(Reply("", error="no file"))) == Reply("", error="no file")


def message(kind: str, record: Any, version: Any = 1) -> bytes:
    line = {"fltac-node": version, "kind": kind}
    return json.dumps(line).encode() + b"\n" + (record if isinstance(record, bytes) else json.dumps(record).encode())


def hello(**changes: Any) -> bytes:
    record = json.loads(encode_answer(HELLO).split(b"\n")[1])
    return message("node", {**record, **changes})


def scores(*entries: list[Any], client: Any = "a") -> bytes:
    return message("scores", {"client": client, "slots": list(entries)})


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "0 bytes that are no fltac-node message"),
        (b"x" * 2000 + b"\n", "2001 bytes that are no fltac-node message"),
        (b"[1]\n", "no fltac-node message"),
        (b"{}\n", "no fltac-node message"),
        (b"\xff\n", "first line: 1 bytes that are not JSON"),
        (message("node", {}, version=2), "protocol version is 2; this side speaks 1"),
        (message("node", {}, version=True), "no fltac-node message"),
        (message("hi", {}), "answer: kind is 'hi'; allowed are reply, node, scores"),
        (message("reply", b"junk"), "not safetensors"),
        (message("scores", b"[" * 100_000), "not JSON"),
        (message("scores", [1]), "scores is '[1]'; expected a record"),
        (scores(client="../etc"), "client is '../etc'"),
        (scores(client=3), "client is '3'"),
        (scores([0, 0.5]), "scores of client 'a': slots holds '[0, 0.5]'; expected 3 values"),
        (scores([0, 0.5, 1], [0, 0.5, 1]), "slot 0; each may occur once"),
        (scores([10_000, 0.5, 1]), "slot 10000; each may occur once, below 10000"),
        (scores([-1, 0.5, 1]), "slot is '-1'; expected a whole number from 0"),
        (scores([0, "0.5", 1]), "slot 0: score is '0.5'; expected a finite number"),
        (message("scores", b'{"client":"a","slots":[[0,NaN,1]]}'), "slot 0: score is nan"),
        (scores([0, -1.5, 1]), "slot 0: score is -1.5; allowed are -1 to 100"),
        (scores([0, 0.5, 0]), "slot 0: rows is '0'"),
        (hello(backbone="A" * 64), "hello of client 'hospital-a': backbone is"),
        (hello(tokenizer=None), "tokenizer is 'None'; expected 64 hexadecimal digits"),
        (hello(body=[]), "body is []"),
        (hello(body={"m\nx": [1]}), "tensor 'm\\nx'; expected"),
        (hello(body={"m": []}), "'m': shape is '[]'"),
        (hello(body={"m": [0]}), "'m': shape is '0'"),
        (hello(slots={}), "slots is '{}'"),
        (hello(slots=[[0, 2**53, []]]), "slot 0: examples is '9007199254740992'"),
        (hello(slots=[[0, True, []]]), "slot 0: examples is 'True'"),
        (hello(slots=[[0, 1, [["sst2", 2, 16]]]]), "slot 0: head 'sst2' has 2 outputs; a key is that number"),
        (hello(slots=[[0, 1, [["2", 2, 16], ["2", 2, 16]]]]), "a key is that number, once"),
        (hello(slots=[[0, 1, [["2", 2]]]]), "expected a key, outputs and hidden"),
    ],
)
def test_answers_that_are_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        decode_answer(payload)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (message("node", {}), "question: kind is 'node'; allowed are hello, train, score"),
        (message("train", b""), "0 bytes that are not safetensors"),
        (
            b'{"fltac-node":1,"kind":"score","max_rows":0}\n'
            + encode_train_question(REQUEST, "float32").split(b"\n", 1)[1],
            "question: max_rows is '0'; expected a whole number from 1",
        ),
        (b'{"fltac-node":1}\n', "kind is None; expected text"),
        (message("hello", b"", version=7), "protocol version is 7"),
    ],
)
def test_questions_that_are_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        decode_question(payload)
    assert reason in str(caught.value)


def test_large_messages_are_not_read() -> None:
    payload = encode_train_question(REQUEST, "float32")
    decode_question(payload, len(payload))
    for decode in (decode_question, decode_answer):
        with pytest.raises(WireError, match=f"message of {len(payload)} bytes; allowed are {len(payload) - 1}"):
            decode(payload, len(payload) - 1)


def test_a_reply_from_a_stranger() -> None:
    with pytest.raises(WireError, match=r"client is 'a b'; expected a client's id"):
        decode_answer(encode_answer(Reply("a b", error="x")))
    for slot, examples, reason in [(-1, 1, "slot is '-1'"), (10**4, 1, "slot 10000"), (0, 10**400, "slot 0: examples")]:
        with pytest.raises(WireError, match=reason):
            decode_answer(encode_answer(Reply("a", (Update("a", slot, ADAPTER, examples),))))
    answer = decode_answer(encode_answer(Reply("a", error="two\nlines \x1b[31m" + "x" * 10_000)))
    assert isinstance(answer, Reply)
    assert (answer.error or "").startswith("two lines [31mxxx")
    assert len(answer.error or "") == 500
    assert one_line("plain text") == "plain text"


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=80), st.integers(0, 300))
def test_damaged_messages_are_refused_or_read_never_worse(junk: bytes, place: int) -> None:
    good = encode_answer(HELLO)
    for payload in (junk, good[:place] + junk + good[place:], good[:place]):
        try:
            found: Answer = decode_answer(payload)
        except WireError:
            continue
        assert isinstance(found, NodeHello | Reply | Scores)
