"""Checkpoints: exact round trip, every kind of damage, kills in the middle of a write."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fltac.errors import InputError
from fltac.records import Adapter, Cluster, ServerState
from fltac.runtime import checkpoint
from fltac.runtime.checkpoint import latest_checkpoint, save_checkpoint

tensors = arrays(
    np.float32,
    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)
adapters = st.dictionaries(st.text(min_size=1, max_size=6), tensors, max_size=3)
keys = st.tuples(st.text(max_size=4), st.integers(0, 5))


@st.composite
def states(draw: st.DrawFn) -> ServerState:
    ids = draw(st.lists(st.integers(0, 20), unique=True, max_size=3))
    clusters = tuple(Cluster(i, draw(adapters), tuple(draw(st.lists(keys, max_size=3)))) for i in ids)
    return ServerState(
        round_number=draw(st.integers(0, 12000)),
        initial=draw(adapters),
        clients=tuple(draw(st.lists(st.text(max_size=4), max_size=3))),
        clusters=clusters,
        memory=draw(st.dictionaries(keys, adapters, max_size=3)),
        next_cluster_id=draw(st.integers(0, 99)),
        own=draw(st.dictionaries(keys, adapters, max_size=2)),
        optimizer=draw(st.dictionaries(st.integers(0, 20), adapters, max_size=2)),
    )


def state_of_round(number: int) -> ServerState:
    adapter = {"a.lora_A": np.arange(6, dtype=np.float32).reshape(2, 3) * np.float32(0.1 + number)}
    return ServerState(number, adapter, ("c0", "c1"), (Cluster(0, adapter, (("c0", 1),)),), {("c0", 1): adapter}, 1)


def assert_same_adapter(ours: Adapter, theirs: Adapter) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].shape == theirs[name].shape
        assert ours[name].tobytes() == theirs[name].tobytes()


def assert_same_state(ours: ServerState, theirs: ServerState) -> None:
    assert (ours.round_number, ours.clients, ours.next_cluster_id) == (
        theirs.round_number,
        theirs.clients,
        theirs.next_cluster_id,
    )
    assert_same_adapter(ours.initial, theirs.initial)
    assert [(c.id, c.members) for c in ours.clusters] == [(c.id, c.members) for c in theirs.clusters]
    for cluster, its in zip(ours.clusters, theirs.clusters, strict=True):
        assert_same_adapter(cluster.adapter, its.adapter)
    for mine, other in ((ours.memory, theirs.memory), (ours.own, theirs.own)):
        assert list(mine) == list(other)
        for key in mine:
            assert_same_adapter(mine[key], other[key])
    assert list(ours.optimizer) == list(theirs.optimizer)
    for number, moments in ours.optimizer.items():
        assert_same_adapter(moments, theirs.optimizer[number])


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@settings(max_examples=60, deadline=None)
@given(states(), st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False, allow_infinity=False)))
def test_round_trip_is_exact_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, state: ServerState, extra: dict[str, float]
) -> None:
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(run, state, extra)
    found = latest_checkpoint(run)
    assert found is not None
    assert_same_state(found[0], state)
    assert found[1] == extra


def test_other_dtypes_and_strides_are_kept(tmp_path: Path) -> None:
    odd = {"x": np.arange(6, dtype=np.float64).reshape(2, 3).T, "y": np.array([1, 2], dtype=np.int64)}
    save_checkpoint(tmp_path, ServerState(1, odd, ()), {})
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].initial["x"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert found[0].initial["x"].dtype == np.float64
    assert found[0].initial["y"].dtype == np.int64


def test_layout_and_pruning(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for number in (6, 7, 8, 9):
        path = save_checkpoint(tmp_path, state_of_round(number), {}, keep=2)
    assert path == tmp_path / "checkpoints" / "round-0009"
    assert folders(tmp_path) == ["round-0008", "round-0009"]
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "state.safetensors"]
    save_checkpoint(tmp_path, state_of_round(10), {}, keep=3)
    assert folders(tmp_path) == ["round-0008", "round-0009", "round-0010"]


def test_rounds_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    for number in (9999, 10000):
        save_checkpoint(tmp_path, state_of_round(number), {})
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].round_number == 10000


def test_the_same_round_may_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of_round(3), {"n": 1})
    save_checkpoint(tmp_path, state_of_round(3), {"n": 2})
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[1] == {"n": 2}
    assert folders(tmp_path) == ["round-0003"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_of_round(3), {"n": 1})
    path.rename(path.with_name("round-0003.replaced"))
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[1] == {"n": 1}
    save_checkpoint(tmp_path, state_of_round(3), {"n": 2})
    assert folders(tmp_path) == ["round-0003"]


def test_leftovers_of_a_killed_write_are_ignored_then_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of_round(1), {})
    left = tmp_path / "checkpoints" / ".tmp-abc"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].round_number == 1
    assert left.exists()
    save_checkpoint(tmp_path, state_of_round(2), {})
    assert folders(tmp_path) == ["round-0001", "round-0002"]


def test_a_failed_write_leaves_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state_of_round(1), {})

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_new", full)
    with pytest.raises(OSError, match=r"No space left"):
        save_checkpoint(tmp_path, state_of_round(2), {})
    assert folders(tmp_path) == ["round-0001"]
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].round_number == 1


SAVER = """
import sys
from pathlib import Path
import numpy as np
from fltac.records import ServerState
from fltac.runtime.checkpoint import save_checkpoint
for number in range(1, 100000):
    adapter = {"a": np.full((64, 64), number, dtype=np.float32)}
    save_checkpoint(Path(sys.argv[1]), ServerState(number, adapter, ()), {"number": number})
    print(number, flush=True)
"""


def test_sigkill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for attempt in range(4):
        run = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(run)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        reported = [3, *(int(line) for line in process.stdout.read().split())]
        process.wait()
        process.stdout.close()
        found = latest_checkpoint(run)
        assert found is not None
        state, extra = found
        assert state.round_number >= reported[-1]
        assert extra == {"number": state.round_number}
        assert (state.initial["a"] == state.round_number).all()


def truncate_tensors(folder: Path) -> None:
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(folder: Path) -> None:
    path = folder / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def remove_tensors(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


def truncate_text(folder: Path) -> None:
    path = folder / "state.json"
    path.write_bytes(path.read_bytes()[:-9])


def edit(folder: Path, **values: object) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_key(folder: Path) -> None:
    path = folder / "state.json"
    tree = json.loads(path.read_text())
    del tree["tensors_sha256"]
    path.write_text(json.dumps(tree))


def drop_inner_key(folder: Path) -> None:
    content = json.loads((folder / "state.json").read_text())["content"]
    del content["clusters"]
    edit(folder, content=content, content_sha256=checkpoint._sha256(checkpoint.to_json(content).encode()))


def change_content(folder: Path) -> None:
    content = json.loads((folder / "state.json").read_text())["content"]
    edit(folder, content={**content, "round": 8})


DAMAGE = [
    (truncate_tensors, "state.safetensors: its 299 bytes do not match the SHA-256"),
    (flip_a_bit, "state.safetensors: its .* bytes do not match the SHA-256"),
    (remove_tensors, "state.safetensors: No such file"),
    (truncate_text, "state.json: not the JSON of a checkpoint"),
    (drop_key, "state.json: the key 'tensors_sha256' is missing"),
    (drop_inner_key, "round-0007: the key 'clusters' is missing"),
    (change_content, "state.json: its content does not match its SHA-256"),
    (
        lambda folder: edit(folder, format=99),
        "format 99 of another version of fltac; this one reads and writes format 7",
    ),
    (lambda folder: (folder / "state.json").write_text("[]"), "state.json: not the JSON of a checkpoint"),
    (
        lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe\x00"),
        "state.json: not the JSON of a checkpoint",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message[:40] for _, message in DAMAGE])
def test_damage_is_named_and_nothing_is_changed(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    save_checkpoint(tmp_path, state_of_round(6), {})
    folder = save_checkpoint(tmp_path, state_of_round(7), {})
    damage(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message) as caught:
        latest_checkpoint(tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    assert f"{tmp_path / 'checkpoints' / 'round-0006'} is intact: remove {folder}" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_damage_without_an_older_checkpoint(tmp_path: Path) -> None:
    for number in (6, 7):
        truncate_text(save_checkpoint(tmp_path, state_of_round(number), {}))
    with pytest.raises(InputError, match=r"round-0007.*no older checkpoint is intact"):
        latest_checkpoint(tmp_path)
