"""A coordinator's whole run with the owners' real nodes, in one process and without a network."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

import fltac
from fltac.config import Config, load_config
from fltac.errors import InputError
from fltac.report.compare import load_results
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.coordinator import coordinate, kind_of
from fltac.runtime.experiment import evaluate
from fltac.runtime.node import Node
from fltac.runtime.partition_files import COORDINATOR, write_partition
from fltac.runtime.post import Arrival, Kind, Sent
from fltac.runtime.progress import Silent
from fltac.runtime.public_scores import slot_scores
from fltac.runtime.session import only_one
from fltac.wire.node_protocol import Scores, SlotScore
from runtime.local_federation import largest_difference, simulated
from runtime.owners import SECRETS


class Nodes:
    """Carries messages to nodes in this process; may break off before a round."""

    def __init__(self, nodes: dict[str, Node], breaks_at: int = 0) -> None:
        self.by_name, self.breaks_at, self.count = nodes, breaks_at, 0
        self.due: dict[str, Arrival] = {}

    def nodes(self) -> dict[str, str]:
        return {name: f"node {name}" for name in self.by_name}

    def send(self, node: str, kind: Kind, payload: bytes, round_number: int) -> Sent:
        if kind == "train" and round_number == self.breaks_at:
            raise KeyboardInterrupt
        self.count += 1
        answer = self.by_name[node].answer(payload)
        self.due[f"m{self.count}"] = Arrival(f"m{self.count}", answer, None, len(answer))
        return Sent(f"m{self.count}", len(payload))

    def collect(self, ids: Collection[str]) -> list[Arrival]:
        return [self.due.pop(item) for item in ids if item in self.due]


class Owners:
    """The clients of a simulation as nodes, and what it ended with."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        config = simulated(folder, *overrides)
        write_partition(config, folder / "data")
        self.config: Config = load_config(folder / "data" / COORDINATOR)
        self.nodes = {
            file.parent.name: Node.open(self.config, file) for file in sorted((folder / "data").glob("*/client.yaml"))
        }
        fltac.run(config, folder / "simulation")
        expected = latest_checkpoint(folder / "simulation")
        assert expected is not None
        self.expected = expected.state


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Owners:
    return Owners(tmp_path_factory.mktemp("owners"))


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def test_it_ends_as_the_simulation_and_knows_no_task(owners: Owners, tmp_path: Path) -> None:
    result = coordinate(owners.config, tmp_path / "run", Nodes(owners.nodes), Silent(), {"app": "x"})
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.state.assignment() == owners.expected.assignment()
    assert largest_difference(found.state, owners.expected) == 0.0
    assert result.summary["tasks"] == {}
    assert result.summary["slots"]["slots"] == len(found.state.assignment())
    assert result.summary["slot_steps"] is None
    with pytest.raises(InputError, match="a federation's run; its adapters lie in adapters/"):
        evaluate(tmp_path / "run")
    (shown,) = load_results([tmp_path / "run"])
    assert shown.runs[0].mean_score == result.summary["mean_score"]
    assert json.loads((tmp_path / "run" / "federation.json").read_text()) == {"app": "x"}
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert not [word for word in SECRETS if word.encode() in path.read_bytes()], path


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_a_rank_for_a_client_that_is_not_there_is_said(tmp_path: Path) -> None:
    """Not refused, since the client may come later."""
    ranked = Owners(tmp_path, "server.aggregation.rule=flexlora", "lora.rank=2", "federation.rounds=1")
    lora = ranked.config.lora.model_copy(update={"ranks": {"client-0": 1, "cleint-1": 1}})
    config = ranked.config.model_copy(update={"lora": lora})
    said = Said()
    nodes = {file.parent.name: Node.open(config, file) for file in sorted((tmp_path / "data").glob("*/client.yaml"))}
    coordinate(config, tmp_path / "run", Nodes(nodes), said, {"app": "x"})
    lines = [line for line in said.lines if line.startswith("lora.ranks")]
    assert lines == [f"lora.ranks.cleint-1: no client of this id is there; there are {', '.join(sorted(nodes))}"]


def test_broken_off_it_goes_on_after_the_last_finished_round(owners: Owners, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        coordinate(owners.config, tmp_path / "run", Nodes(owners.nodes, breaks_at=2), Silent())
    assert [record["round"] for record in records(tmp_path / "run")] == [1]
    coordinate(owners.config, tmp_path / "run", Nodes(owners.nodes), Silent())
    assert [record["round"] for record in records(tmp_path / "run")] == [1, 2]
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert largest_difference(found.state, owners.expected) == 0.0
    finished = coordinate(owners.config, tmp_path / "run", Nodes({}), Silent())
    assert finished.summary["rounds"] == 2, "nobody is asked any more"


def test_a_directory_of_another_config_or_in_use_is_refused(owners: Owners, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        coordinate(owners.config, tmp_path / "run", Nodes(owners.nodes, breaks_at=1), Silent())
    other = load_config(yaml_of(owners.config), ["lora.alpha=3"])
    with pytest.raises(InputError, match=r"belongs to another config: lora\.alpha is 8"):
        coordinate(other, tmp_path / "run", Nodes(owners.nodes), Silent())
    with only_one(tmp_path / "run"), pytest.raises(InputError, match="another process is working on this run"):
        coordinate(owners.config, tmp_path / "run", Nodes(owners.nodes), Silent())


def yaml_of(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"methods"})


def test_methods_that_need_the_rows_in_one_place_are_refused(owners: Owners, tmp_path: Path) -> None:
    for method, expected in (
        ("central", "in a federation only none is allowed"),
        ("fedit-heads", "only per-shape"),
        ("oracle", "nobody knows the true tasks"),
    ):
        config = load_config(yaml_of(owners.config), [f"method={method}"])
        with pytest.raises(InputError, match=expected):
            coordinate(config, tmp_path / "run", Nodes({}), Silent())
    assert not (tmp_path / "run").exists()


def test_public_tasks_of_the_coordinator_give_the_tables_of_a_simulation(tmp_path: Path) -> None:
    """The public rows are the simulation's validation rows, so a perfect match of clusters gives its scores."""
    owners = Owners(tmp_path)
    tasks = simulated(tmp_path).model_dump(mode="json")["tasks"]
    config = load_config({**yaml_of(owners.config), "tasks": {name: tasks[name] for name in ("mood", "letters")}})
    result = coordinate(config, tmp_path / "run", Nodes(owners.nodes), Silent())
    table = result.summary["tasks"]
    assert list(table) == ["mood", "letters"]
    assert {name: task["metric"] for name, task in table.items()} == {"mood": "accuracy", "letters": "pearson"}
    assert table["mood"]["cluster"] != table["letters"]["cluster"]
    assert table["mood"]["worst_client"] is None
    simulation = json.loads((tmp_path / "simulation" / "summary.json").read_text())
    assert table["mood"]["n_eval"] == simulation["tasks"]["mood"]["n_eval"]
    assert table["mood"]["score"] >= simulation["tasks"]["mood"]["score"] - 1e-9, "the best match is no worse"
    assert result.summary["mean_score"] == pytest.approx((table["mood"]["score"] + table["letters"]["score"]) / 2)
    assert set(result.summary["baselines"]["majority"]) == {"mood", "letters"}


def test_scores_by_slot_by_hand() -> None:
    scores = {
        "b": Scores("b", {0: SlotScore(0.2, 10), 3: SlotScore(0.6, 5)}),
        "a": Scores("a", {1: SlotScore(1.0, 7)}),
    }
    found = slot_scores(scores)
    assert found["slots"] == 3
    assert found["mean"] == pytest.approx(0.6)
    assert found["distribution"] == pytest.approx({"min": 0.2, "lower": 0.4, "median": 0.6, "upper": 0.8, "max": 1.0})
    assert found["worst_client"] == {"client": "b", "score": pytest.approx(0.4)}
    assert found["clients"]["b"] == {"0": {"score": 0.2, "n_eval": 10}, "3": {"score": 0.6, "n_eval": 5}}
    nobody = slot_scores({})
    assert (nobody["slots"], nobody["mean"], nobody["worst_client"]) == (0, None, None)


def test_what_a_backbone_reads_is_told_by_its_configuration(tiny_bert: Path, tiny_vit: Path) -> None:
    for folder, kind in ((tiny_bert, "text"), (tiny_vit, "image")):
        tree = {"backbone": {"name": str(folder)}, "server": {"clustering": {"k": 1}}}
        assert kind_of(load_config(tree)) == kind
