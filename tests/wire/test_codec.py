"""Round trips, sizes, precision and malformed bytes of what travels between server and clients."""

import json
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save

from fltac.records import Adapter, Reply, Request, Update
from fltac.wire import (
    WireError,
    decode_adapter,
    decode_reply,
    decode_request,
    encode_adapter,
    encode_reply,
    encode_request,
)

tensors = arrays(
    np.float32,
    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)
halves = arrays(np.float16, (2, 3), elements=st.floats(width=16)).map(lambda a: a.astype(np.float32))
names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
adapters = st.dictionaries(names, tensors, max_size=3)
small = st.integers(0, 30)


def assert_same(ours: Adapter, theirs: Adapter) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].dtype == np.float32
        assert ours[name].shape == theirs[name].shape
        assert ours[name].tobytes() == theirs[name].tobytes()


@st.composite
def requests(draw: st.DrawFn) -> Request:
    sent = draw(st.dictionaries(small, adapters, max_size=3))
    slots = draw(st.dictionaries(small, st.sampled_from(sorted(sent)), max_size=4)) if sent else {}
    initial = draw(st.none() | adapters)
    candidates = tuple(draw(st.lists(st.sampled_from(sorted(sent)), unique=True))) if sent else ()
    client, profile, gradients = draw(st.text(max_size=5)), draw(st.booleans()), draw(st.booleans())
    return Request(draw(st.integers(0, 9999)), client, slots, sent, initial, candidates, profile, gradients)


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    client = draw(st.text(max_size=5))
    slots = draw(st.lists(small, unique=True, max_size=3))
    updates = tuple(
        Update(
            client,
            slot,
            draw(adapters),
            draw(st.integers(-1, 10**9)),
            draw(st.none() | small),
            draw(st.none() | arrays(np.float32, 3)),
            draw(st.none() | adapters),
        )
        for slot in slots
    )
    return Reply(client, updates, draw(st.none() | st.text()))


@settings(deadline=None)
@given(adapters)
def test_float32_adapter_round_trip_is_exact(adapter: Adapter) -> None:
    assert_same(decode_adapter(encode_adapter(adapter, "float32")), adapter)


@settings(deadline=None)
@given(st.dictionaries(names, halves, max_size=3))
def test_values_that_float16_has_survive_it(adapter: Adapter) -> None:
    assert_same(decode_adapter(encode_adapter(adapter, "float16")), adapter)


@settings(deadline=None)
@given(requests())
def test_request_round_trip(request_: Request) -> None:
    found = decode_request(encode_request(request_, "float32"))
    assert (found.round_number, found.client, found.slots) == (
        request_.round_number,
        request_.client,
        request_.slots,
    )
    assert set(found.adapters) == set(request_.adapters)
    assert found.candidates == request_.candidates
    assert (found.profile, found.gradients) == (request_.profile, request_.gradients)
    for cluster, adapter in request_.adapters.items():
        assert_same(found.adapters[cluster], adapter)
    assert (found.initial is None) == (request_.initial is None)
    assert_same(found.initial or {}, request_.initial or {})


@settings(deadline=None)
@given(replies())
def test_reply_round_trip(reply: Reply) -> None:
    found = decode_reply(encode_reply(reply, "float32"))
    assert (found.client, found.error) == (reply.client, reply.error)
    assert [(u.key, u.examples, u.cluster) for u in found.updates] == [
        (u.key, u.examples, u.cluster) for u in reply.updates
    ]
    for ours, theirs in zip(found.updates, reply.updates, strict=True):
        assert_same(ours.adapter, theirs.adapter)
        assert (ours.gradients is None) == (theirs.gradients is None)
        assert_same(ours.gradients or {}, theirs.gradients or {})


@settings(deadline=None)
@given(replies())
def test_equal_replies_give_equal_bytes(reply: Reply) -> None:
    turned = Reply(
        reply.client,
        tuple(replace(u, adapter=dict(reversed(list(u.adapter.items())))) for u in reply.updates),
        reply.error,
    )
    assert encode_reply(turned, "float32") == encode_reply(reply, "float32")


@settings(deadline=None, max_examples=300)
@given(replies(), st.data())
def test_changed_bytes_never_raise_anything_else(reply: Reply, data: st.DataObject) -> None:
    whole = bytearray(encode_reply(reply, "float32"))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for payload in (bytes(whole), cut):
        try:
            found = decode_reply(payload)
        except WireError as error:
            assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
        else:
            assert all(tensor.dtype == np.float32 for u in found.updates for tensor in u.adapter.values())


@given(st.binary(max_size=64))
def test_random_bytes_are_refused(data: bytes) -> None:
    for decode in (decode_reply, decode_request):
        with pytest.raises(WireError):
            decode(data)


def bert_adapter(layers: int = 12, rank: int = 1) -> Adapter:
    rng = np.random.default_rng(0)
    out = {}
    for layer in range(layers):
        for target in ("query", "value"):
            path = f"encoder.layer.{layer}.attention.self.{target}"
            out[f"{path}.lora_A"] = rng.normal(size=(rank, 768)).astype(np.float32)
            out[f"{path}.lora_B"] = rng.normal(size=(768, rank)).astype(np.float32)
    out["head.2.weight"] = rng.normal(size=(2, 768)).astype(np.float32)
    out["head.2.bias"] = np.zeros(2, np.float32)
    return out


def test_sizes_are_close_to_the_tensors() -> None:
    # 36,864 LoRA values and a 2-way head of 1,538, as in the paper: 153,608 bytes in float32.
    adapter = bert_adapter()
    assert sum(tensor.size for tensor in adapter.values()) == 36_864 + 1_538
    for dtype, size in (("float32", 4), ("float16", 2)):
        reply = Reply("client-3", tuple(Update("client-3", slot, adapter, 100) for slot in range(5)))
        payload = len(encode_reply(reply, dtype))
        values = 5 * 38_402 * size
        header_per_tensor = (payload - values) / (5 * len(adapter))
        assert 0 < header_per_tensor < 130
        assert payload < values * (1.05 if dtype == "float32" else 1.1)


def test_float16_rounds_to_half_precision() -> None:
    adapter = {"a": np.array([1 / 3, 1e-3, -2049.0], np.float32)}
    decoded = decode_adapter(encode_adapter(adapter, "float16"))["a"]
    assert decoded.dtype == np.float32
    # 1/3 and 1e-3 at 11 significant bits; 2049 lies halfway between 2048 and 2050 and goes to the even one.
    assert decoded.tolist() == [0.333251953125, 0.0010004043579101562, -2048.0]


def test_float16_overflow_names_the_tensor() -> None:
    fine = {"a": np.array([65504.0, np.inf, np.nan], np.float32)}
    assert decode_adapter(encode_adapter(fine, "float16"))["a"][:2].tolist() == [65504.0, np.inf]
    reply = Reply("c", (Update("c", 4, {"x.lora_B": np.array([0.0, -1e5, 7e4], np.float32)}, 1),))
    message = r"^tensor '4/x.lora_B': the value 100000 is beyond float16, whose largest is 65504; set wire.dtype"
    with pytest.raises(WireError, match=message):
        encode_reply(reply, "float16")
    assert decode_reply(encode_reply(reply, "float32")).updates[0].adapter["x.lora_B"][1] == np.float32(-1e5)


def test_strides_and_other_float_types_are_encoded_by_value() -> None:
    turned = np.arange(6, dtype=np.float64).reshape(2, 3).T
    decoded = decode_adapter(encode_adapter({"a": turned}, "float32"))["a"]  # type: ignore[dict-item]
    assert decoded.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert decoded.dtype == np.float32
    assert decoded.flags.writeable
    assert decoded.flags.owndata


def reply_bytes(record: object, tensors: Adapter | None = None) -> bytes:
    text = record if isinstance(record, str) else json.dumps(record)
    return save(dict(tensors or {}), {"fltac": text})


GOOD_REPLY = {"format": "reply-1", "client": "c", "slots": [[0, 5]], "error": None}
GOOD_REQUEST = {
    **{"format": "request-1", "round": 1, "client": "c"},
    **{"slots": [[0, 2]], "clusters": [2], "initial": False},
}

BAD_REPLIES = [
    (b"", "0 bytes that are not safetensors"),
    (b"\x80\x04pickle-like bytes", "bytes that are not safetensors"),
    (struct.pack("<Q", 2**40), "8 bytes that are not safetensors"),
    (encode_adapter({"a": np.zeros(3, np.float32)}, "float32")[:-1], "bytes that are not safetensors"),
    (save({}), "message format is None; expected 'reply-1'"),
    (reply_bytes("{oops"), "the header's 'fltac' entry is not JSON"),
    (reply_bytes("[" * 100_000), "the header's 'fltac' entry is not JSON"),
    (reply_bytes([1]), r"message format is \[1\]; expected 'reply-1'"),
    (reply_bytes(GOOD_REQUEST), "message format is 'request-1'; expected 'reply-1'"),
    (reply_bytes({**GOOD_REPLY, "client": 3}), "client is 3; expected text"),
    (reply_bytes({**GOOD_REPLY, "error": 3}), "reply of client 'c': error is 3; expected text or null"),
    (reply_bytes({**GOOD_REPLY, "slots": None}), "slots is None; expected a list"),
    (reply_bytes({**GOOD_REPLY, "slots": [[1]]}), r"slots holds \[1\]; expected pairs"),
    (reply_bytes({**GOOD_REPLY, "slots": [[1, 2.5]]}), "slots holds 2.5; expected an integer"),
    (reply_bytes({**GOOD_REPLY, "slots": [[True, 2]]}), "slots holds True; expected an integer"),
    (reply_bytes({**GOOD_REPLY, "slots": [[1, 2], [1, 3]]}), "slots names a slot twice"),
    (reply_bytes(GOOD_REPLY, {"1/a": np.zeros(1, np.float32)}), "tensor '1/a': belongs to none .* groups 0"),
    (reply_bytes({**GOOD_REPLY, "chosen": [[3, 1]]}), "chosen names slot 3, of which there is no update"),
    (
        reply_bytes({**GOOD_REPLY, "profiles": True}, {"profile/3": np.zeros(2, np.float32)}),
        "a profile of slot 3, of which there is no update",
    ),
    (reply_bytes(GOOD_REPLY, {"profile/0": np.zeros(2, np.float32)}), "tensor 'profile/0': belongs to none"),
    (reply_bytes({**GOOD_REPLY, "gradients": [3]}), "gradients of slot 3, of which there is no update"),
    (reply_bytes({**GOOD_REPLY, "gradients": [0, 0]}), "slot or cluster 0.gradients occurs twice"),
    (reply_bytes({**GOOD_REPLY, "gradients": True}), "gradients is True; expected a list"),
    (reply_bytes({**GOOD_REPLY, "gradients": ["0"]}), "gradients holds '0'; expected an integer"),
    (
        reply_bytes(GOOD_REPLY, {"0.gradients/a": np.zeros(1, np.float32)}),
        "tensor '0.gradients/a': belongs to none of the declared groups 0",
    ),
    (reply_bytes({**GOOD_REPLY, "chosen": [[0, None]]}), "chosen holds None; expected an integer"),
    (reply_bytes({**GOOD_REPLY, "chosen": [[0, 1], [0, 2]]}), "chosen names a slot twice"),
    (reply_bytes({**GOOD_REPLY, "chosen": None}), "chosen is None; expected a list"),
    (reply_bytes(GOOD_REPLY, {"a": np.zeros(1, np.float32)}), "tensor 'a': belongs to none"),
    (
        reply_bytes(GOOD_REPLY, {"0/a": np.zeros(1, np.int32)}),
        "tensor '0/a': dtype I32; allowed are F32, F16",
    ),
]


@pytest.mark.parametrize(("data", "message"), BAD_REPLIES, ids=[message for _, message in BAD_REPLIES])
def test_malformed_replies_are_named(data: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message) as caught:
        decode_reply(data)
    assert "\n" not in str(caught.value)


BAD_REQUESTS = [
    (reply_bytes(GOOD_REPLY), "message format is 'reply-1'; expected 'request-1'"),
    (reply_bytes({**GOOD_REQUEST, "round": "1"}), "round holds '1'; expected an integer"),
    (reply_bytes({**GOOD_REQUEST, "clusters": 2}), "clusters is 2; expected a list"),
    (reply_bytes({**GOOD_REQUEST, "clusters": [2, 2]}), "slot or cluster 2 occurs twice"),
    (
        reply_bytes({**GOOD_REQUEST, "clusters": []}),
        "request to client 'c': slot 0 refers to cluster 2, not sent",
    ),
    (reply_bytes({**GOOD_REQUEST, "initial": 1}), "request: initial is 1; expected true or false"),
    (reply_bytes({**GOOD_REQUEST, "candidates": [2, 3]}), "cluster 3 is a candidate, not sent"),
    (reply_bytes({**GOOD_REQUEST, "candidates": [2, 2]}), "candidates names a cluster twice"),
    (reply_bytes({**GOOD_REQUEST, "candidates": ["2"]}), "candidates holds '2'; expected an integer"),
    (reply_bytes({**GOOD_REQUEST, "candidates": 2}), "candidates is 2; expected a list"),
    (
        reply_bytes(GOOD_REQUEST, {"initial/a": np.zeros(1, np.float32)}),
        "tensor 'initial/a': belongs to none",
    ),
]


@pytest.mark.parametrize(("data", "message"), BAD_REQUESTS, ids=[message for _, message in BAD_REQUESTS])
def test_malformed_requests_are_named(data: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode_request(data)


def test_records_that_contradict_themselves_are_not_encoded() -> None:
    update = Update("c", 0, {}, 1)
    with pytest.raises(WireError, match=r"reply of client 'd': holds an update of client 'c'"):
        encode_reply(Reply("d", (update,)), "float32")
    with pytest.raises(WireError, match=r"slot or cluster 0 occurs twice"):
        encode_reply(Reply("c", (update, update)), "float32")
    with pytest.raises(WireError, match=r"slot 1 refers to cluster 3, not sent"):
        encode_request(Request(1, "c", {1: 3}, {}, None), "float32")


def test_the_wire_does_not_import_torch() -> None:
    code = "import sys, fltac.wire; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
