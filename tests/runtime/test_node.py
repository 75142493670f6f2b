"""A node on its own rows against the simulation on the same rows, what it refuses, and what must not leave it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml

from fltac.client.client import plan_jobs, reply_of
from fltac.client.training import TrainJob, train
from fltac.config import Config, load_config
from fltac.errors import InputError
from fltac.evaluation import score_state
from fltac.records import Adapter, Reply, Request, ServerState
from fltac.runtime.lane_setup import choose_plan
from fltac.runtime.node import Node, StandingNode, owner_jobs
from fltac.runtime.owner import Owner, load_owner
from fltac.runtime.partition_files import write_partition
from fltac.runtime.setup import Experiment, prepare
from fltac.server.round import finish_round, init_server, plan_delivery, plan_round
from fltac.wire.node_protocol import (
    NodeHello,
    Scores,
    decode_answer,
    encode_hello_question,
    encode_score_question,
    encode_train_question,
)
from runtime.owners import SECRETS, federation


class Both:
    """The same rows as a simulation and as client folders."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.config, self.out = config, folder / "federation"
        write_partition(config, self.out)
        self.experiment: Experiment = prepare(config)
        self.coordinator = load_config(self.out / "coordinator.yaml")

    def node(self, client: str) -> Node:
        return Node.open(self.coordinator, self.out / client / "client.yaml")

    def first_state(self) -> ServerState:
        found = self.experiment
        return init_server(self.config.server_settings, found.model.body_shapes, found.head_shapes, found.clients)

    def simulated(self, request: Request, initial: Adapter) -> tuple[list[TrainJob], Reply]:
        """As the simulation trains, with this client's adapters alone in the passes."""
        found, config = self.experiment, self.config
        torch.set_num_threads(1)
        client = found.clients[request.client]
        jobs = plan_jobs(client, request, initial, config)
        plan = choose_plan(config.training, found.model, next(iter(found.tasks.values())), 1)
        return jobs, reply_of(client, train(found.model, jobs, config.training, config.lora.dropout, plan))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("both")
    return Both(folder, federation(folder))


@pytest.fixture
def owner(tmp_path: Path, both: Both) -> Callable[..., Path]:
    """Copies a client's folder with some settings of its file replaced."""

    def make(client: str = "client-0", **changes: object) -> Path:
        source, folder = both.out / client, tmp_path / client
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tree = yaml.safe_load((folder / "client.yaml").read_text()) | changes
        (folder / "client.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return folder / "client.yaml"

    return make


def assert_same(ours: Reply, theirs: Reply) -> None:
    assert ours.error is None
    assert [(update.client, update.slot, update.examples) for update in ours.updates] == [
        (update.client, update.slot, update.examples) for update in theirs.updates
    ]
    for mine, other in zip(ours.updates, theirs.updates, strict=True):
        assert set(mine.adapter) == set(other.adapter)
        for name in mine.adapter:
            np.testing.assert_array_equal(mine.adapter[name], other.adapter[name], strict=True)


def first_request(both: Both, client: str = "client-0") -> Request:
    return next(r for r in plan_round(both.first_state(), both.config.server_settings) if r.client == client)


def train_error(node: Node, request: Request) -> str:
    answer = decode_answer(node.answer(encode_train_question(request, "float32")))
    assert isinstance(answer, Reply)
    assert answer.updates == ()
    assert answer.error is not None
    return answer.error


def test_the_same_batches_and_adapters_as_the_simulation_for_two_rounds(both: Both) -> None:
    state, settings = both.first_state(), both.config.server_settings
    nodes = {client: both.node(client) for client in both.experiment.clients}
    assert len(nodes) == 3
    slots = 0
    for _ in range(2):
        requests = plan_round(state, settings)
        replies = []
        for request in requests:
            node = nodes[request.client]
            jobs, expected = both.simulated(request, state.initial)
            owner = load_owner(both.coordinator, both.out / request.client / "client.yaml")
            own = owner_jobs(owner, request, state.initial)
            assert [job.slot for job in own] == [job.slot for job in jobs]
            for mine, other in zip(own, jobs, strict=True):
                assert mine.dropout_seed == other.dropout_seed
                for ours, theirs in zip(mine.steps, other.steps, strict=True):
                    batch, wanted = ours.task.train.batch(ours.rows), theirs.task.train.batch(theirs.rows)
                    assert set(batch) == set(wanted) >= {"input_ids", "attention_mask"}
                    for name in batch:
                        np.testing.assert_array_equal(batch[name], wanted[name])
                    np.testing.assert_array_equal(
                        ours.task.train.labels[ours.rows], theirs.task.train.labels[theirs.rows]
                    )
                slots += 1
            answer = decode_answer(node.answer(encode_train_question(request, "float32")))
            assert isinstance(answer, Reply)
            assert_same(answer, expected)
            replies.append(answer)
        state, report = finish_round(state, requests, replies, settings)
        assert report.rejections == ()
    assert slots == 2 * len(both.experiment.holdings)


def test_scores_are_those_of_the_evaluator(both: Both) -> None:
    """For the adapters that each client received; the evaluator's mean is over the clients that hold the task."""
    found, state = both.experiment, both.first_state()
    by_key = {}
    for request in plan_delivery(state, found.config.server_settings):
        answer = decode_answer(both.node(request.client).answer(encode_score_question(request, "float32")))
        assert isinstance(answer, Scores)
        by_key |= {(answer.client, slot): score for slot, score in answer.slots.items()}
    assert set(by_key) == {holding.key for holding in found.holdings}
    expected = score_state(found.model, state, found.holdings, found.tasks, both.config, None)
    for name, task in expected.items():
        own = [by_key[holding.key] for holding in found.holdings if holding.task == name]
        assert np.mean([score.score for score in own]) == task.score
        assert {score.rows for score in own} == {task.n_eval}


def test_at_most_so_many_rows_are_scored(both: Both) -> None:
    payload = encode_score_question(first_request(both), "float32", max_rows=5)
    answer = decode_answer(both.node("client-0").answer(payload))
    assert isinstance(answer, Scores)
    assert {score.rows for score in answer.slots.values()} == {5}


def test_hello_says_what_the_simulation_holds(both: Both) -> None:
    found = both.experiment
    for client in found.clients:
        answer = decode_answer(both.node(client).answer(encode_hello_question()))
        assert isinstance(answer, NodeHello)
        slots = found.clients[client].slots
        assert answer.client == client
        assert answer.examples == {slot: len(locals_[0].rows) for slot, locals_ in slots.items()}
        assert answer.heads == {
            slot: {locals_[0].head_key: (locals_[0].task.outputs, 16)} for slot, locals_ in slots.items()
        }
        assert answer.backbone == found.backbone.fingerprint
        assert answer.tokenizer == found.tasks["mood"].encoder
        assert answer.body_shapes == found.model.body_shapes


def test_no_task_column_class_or_path_leaves_the_node(both: Both, owner: Callable[..., Path]) -> None:
    node, request = both.node("client-0"), first_request(both)
    broken = owner()
    (broken.parent / "slot-0-train.parquet").write_bytes(b"")
    unusable = StandingNode((both.out / "coordinator.yaml").read_text(), broken)
    questions = [
        encode_hello_question(),
        encode_train_question(request, "float32"),
        encode_score_question(request, "float32"),
        encode_train_question(replace(request, initial=None), "float32"),
        b"nonsense",
    ]
    answers = [*(node.answer(question) for question in questions), unusable.answer(encode_hello_question())]
    for answer in answers:
        for secret in [*SECRETS, "slot-0", "parquet", "jsonl", str(both.out.parent)]:
            assert secret.encode() not in answer
    refused = decode_answer(answers[-1])
    assert isinstance(refused, Reply)
    assert refused.client == "client-0"
    assert "cannot be used" in (refused.error or "")


def test_a_shared_adapter_trains_all_tasks_in_one_slot_as_the_simulation(tmp_path: Path) -> None:
    both = Both(tmp_path, federation(tmp_path, "method=fedit"))
    state = both.first_state()
    for request in plan_round(state, both.config.server_settings):
        node = both.node(request.client)
        answer = decode_answer(node.answer(encode_train_question(request, "float32")))
        assert isinstance(answer, Reply)
        assert [update.slot for update in answer.updates] == [0]
        assert_same(answer, both.simulated(request, state.initial)[1])
        scored = decode_answer(node.answer(encode_score_question(request, "float32")))
        assert isinstance(scored, Scores)
        assert list(scored.slots) == [0]


def test_images_of_the_digits_come_back_as_they_were(tmp_path: Path) -> None:
    tree = {
        "backbone": {"name": "builtin:digits-vit", "device": "cpu"},
        "tasks": ["digits-parity", "digits-high"],
        "federation": {"clients": 2, "partition": {"alpha": 1.0}},
        "training": {"steps": 2, "batch_size": 8, "threads": 1},
    }
    both = Both(tmp_path, load_config(tree))
    state = both.first_state()
    for request in plan_round(state, both.config.server_settings):
        answer = decode_answer(both.node(request.client).answer(encode_train_question(request, "float32")))
        assert isinstance(answer, Reply)
        assert_same(answer, both.simulated(request, state.initial)[1])


def test_a_request_for_another_client(both: Both) -> None:
    node = both.node("client-1")
    error = train_error(node, first_request(both, "client-0"))
    assert error == "the request is for client 'client-0'; this is 'client-1'"


def changed(adapter: Adapter, **tensors: np.ndarray | None) -> Adapter:
    out = {name.replace("__", "."): tensor for name, tensor in {**adapter, **tensors}.items()}
    return {name: tensor for name, tensor in out.items() if tensor is not None}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.full((1, 16), np.nan, np.float32), "has values that are not finite"),
        (np.zeros((2, 16), np.float32), "has shape [2, 16]; expected [1, 16]"),
        (None, "is missing"),
    ],
)
def test_adapters_that_do_not_fit(both: Both, value: np.ndarray | None, reason: str) -> None:
    request = first_request(both)
    assert request.initial is not None
    name = next(name for name in request.initial if name.endswith("query.lora_A"))
    wrong = replace(request, initial=changed(request.initial, **{name: value}))
    assert train_error(both.node("client-0"), wrong) == f"slot 0: tensor {name} {reason}"
    extra = replace(request, initial=changed(request.initial, more__lora_A=np.zeros((1, 1), np.float32)))
    error = train_error(both.node("client-0"), extra)
    assert error == "slot 0: tensor more.lora_A is not part of this client's adapter"


def test_v0_is_kept_once_it_was_received_and_missed_where_it_was_not(both: Both) -> None:
    request = first_request(both)
    without = replace(request, initial=None)
    node = both.node("client-0")
    assert train_error(node, without) == "slot 0: it has no cluster yet, and the first adapter v0 was not sent"
    first = decode_answer(node.answer(encode_train_question(request, "float32")))
    again = decode_answer(node.answer(encode_train_question(without, "float32")))
    assert isinstance(first, Reply)
    assert isinstance(again, Reply)
    assert_same(again, first)


def test_an_adapter_that_diverged_is_sent_as_it_is_and_the_server_names_it(both: Both) -> None:
    config = load_config(both.out / "coordinator.yaml", ["training.lr=1e38"])
    node = Node.open(config, both.out / "client-0" / "client.yaml")
    answer = decode_answer(node.answer(encode_train_question(first_request(both), "float32")))
    assert isinstance(answer, Reply)
    state = both.first_state()
    _, report = finish_round(state, [first_request(both)], [answer], both.config.server_settings)
    assert report.updates == 0
    assert [(item.client, item.slot) for item in report.rejections] == [
        ("client-0", update.slot) for update in answer.updates
    ]
    half = load_config(both.out / "coordinator.yaml", ["training.lr=1e5", "training.steps=1", "wire.dtype=float16"])
    error = train_error(Node.open(half, both.out / "client-0" / "client.yaml"), first_request(both))
    assert "beyond float16" in error
    assert "lora" in error or "head" in error


def test_a_failure_in_training_is_answered_and_the_next_question_too(
    both: Both, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything is loaded once for all questions, and again only after a failure."""
    import fltac.runtime.node as module

    loads: list[Path] = []

    def counted(config: Config, client_file: Path) -> Owner:
        loads.append(client_file)
        return load_owner(config, client_file)

    def failing(*_: object) -> None:
        raise RuntimeError("out of memory at row sunny")

    monkeypatch.setattr(module, "load_owner", counted)
    node, request = both.node("client-0"), first_request(both)
    expected = node.answer(encode_train_question(request, "float32"))
    node.answer(encode_hello_question())
    node.answer(b"nonsense")
    assert len(loads) == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", failing)
        assert train_error(node, request) == "failed with RuntimeError; its own log says where"
    assert "out of memory" in caplog.text, "the owner's own log has it"
    assert node.answer(encode_train_question(request, "float32")) == expected
    assert len(loads) == 2


def test_a_task_dropped_and_another_renamed_between_rounds(both: Both, owner: Callable[..., Path]) -> None:
    """The slots that stay give what they gave: nothing hangs on a task's name or place."""
    file = owner()
    node, request = Node.open(both.coordinator, file), first_request(both)
    before = decode_answer(node.answer(encode_train_question(request, "float32")))
    assert isinstance(before, Reply)
    assert len(before.updates) > 1
    tree = yaml.safe_load(file.read_text())
    names = list(tree["tasks"])
    tree["tasks"] = {f"new-{name}": tree["tasks"][name] for name in reversed(names[1:])}
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    after = decode_answer(node.answer(encode_train_question(request, "float32")))
    assert isinstance(after, Reply)
    assert [update.slot for update in after.updates] == [update.slot for update in before.updates[1:]]
    for ours, theirs in zip(after.updates, before.updates[1:], strict=True):
        for name in ours.adapter:
            np.testing.assert_allclose(ours.adapter[name], theirs.adapter[name], atol=1e-6)


def test_a_client_file_that_turns_bad_and_good_again(both: Both, owner: Callable[..., Path]) -> None:
    file = owner()
    node, request = Node.open(both.coordinator, file), first_request(both)
    good = file.read_text()
    file.write_text("client: [")
    assert "cannot be used" in train_error(node, request)
    file.write_text(good.replace("client: client-0", "client: other"))
    assert "this is 'other'" in train_error(node, request)
    assert node.id == "other"
    file.write_text(good)
    answer = decode_answer(node.answer(encode_train_question(request, "float32")))
    assert isinstance(answer, Reply)
    assert answer.error is None


def test_rows_added_between_rounds(both: Both, owner: Callable[..., Path]) -> None:
    file = owner()
    node = Node.open(both.coordinator, file)
    before = decode_answer(node.answer(encode_hello_question()))
    rows = file.parent / "slot-0-train.parquet"
    table = pyarrow.parquet.read_table(rows)
    pyarrow.parquet.write_table(pa.concat_tables([table, table.slice(0, 2)]), rows)
    after = decode_answer(node.answer(encode_hello_question()))
    assert isinstance(before, NodeHello)
    assert isinstance(after, NodeHello)
    assert after.examples == {**before.examples, 0: before.examples[0] + 2}


def test_more_steps_than_the_owner_allows(both: Both, owner: Callable[..., Path]) -> None:
    file = owner(limits={"steps": 3})
    with pytest.raises(InputError, match=r"training: 4 steps of the task \w+ in a round; limits\.steps allows 3"):
        Node.open(both.coordinator, file)
    node = Node.open(load_config(both.out / "coordinator.yaml", ["training.steps=3"]), file)
    assert node.id == "client-0"
    reply = decode_answer(node.answer(encode_train_question(replace(first_request(both), gradients=True), "float32")))
    assert isinstance(reply, Reply)
    assert all(update.gradients for update in reply.updates)


def test_no_more_batches_of_gradients_than_steps_are_allowed(both: Both, owner: Callable[..., Path]) -> None:
    few = load_owner(both.coordinator, owner(limits={"steps": 4}))
    assert few.config.server.clustering.gradient_batches == 4
    assert both.coordinator.server.clustering.gradient_batches == 20


@pytest.mark.parametrize("asked", [True, False])
def test_gradients_come_where_they_are_asked_for(both: Both, owner: Callable[..., Path], asked: bool) -> None:
    node, request = Node.open(both.coordinator, owner()), replace(first_request(both), gradients=asked)
    reply = decode_answer(node.answer(encode_train_question(request, "float32")))
    assert isinstance(reply, Reply)
    assert reply.updates
    for update in reply.updates:
        expected = {name for name in update.adapter if name.endswith("lora_A")}
        assert (update.gradients or {}).keys() == (expected if asked else set())


def test_messages_larger_than_the_owner_allows(both: Both, owner: Callable[..., Path]) -> None:
    node = Node.open(both.coordinator, owner(limits={"message_mb": 1}))
    answer = decode_answer(node.answer(bytes(2**20 + 1)))
    assert isinstance(answer, Reply)
    assert answer.error == "message of 1048577 bytes; allowed are 1048576"


def test_the_backbone_may_lie_elsewhere(both: Both, owner: Callable[..., Path]) -> None:
    file = owner(backbone={"name": "weights"})
    elsewhere = load_config(both.out / "coordinator.yaml", ["backbone.name=/coordinator/only"])
    with pytest.raises(InputError, match=r"backbone\.name: '/coordinator/only' cannot be loaded|has no tokenizer"):
        Node.open(elsewhere, both.out / "client-0" / "client.yaml")
    source = Path(both.config.backbone.name)
    (file.parent / "weights").mkdir()
    for part in source.iterdir():
        (file.parent / "weights" / part.name).write_bytes(part.read_bytes())
    answer = decode_answer(Node.open(elsewhere, file).answer(encode_hello_question()))
    assert isinstance(answer, NodeHello)
    assert answer.backbone == both.experiment.backbone.fingerprint


@pytest.mark.parametrize(
    ("override", "message"),
    [("method=central", r"federation\.pool: got 'sum'"), ("method=fedit-heads", r"training\.heads: got 'per-task'")],
)
def test_methods_that_cannot_be_federated(both: Both, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Node.open(load_config(both.out / "coordinator.yaml", [override]), both.out / "client-0" / "client.yaml")
