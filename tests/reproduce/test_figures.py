"""Figures 2 and 4 from tiny runs: the numbers behind them, and that watching a run does not change it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fltac.config import load_config
from fltac.errors import InputError
from fltac.records import ServerState
from fltac.report.results import Result, SeedResult
from fltac.reproduce.figure2 import printed_scores, radar_values
from fltac.reproduce.figure4 import projected
from fltac.reproduce.registry import reproduce
from fltac.reproduce.uploads import Recorder
from fltac.runtime import experiment
from fltac.runtime.progress import Silent
from fltac.runtime.run_directory import open_existing
from fltac.server.similarity import flattened
from reproduce.experiments import order, read


@pytest.fixture(scope="module")
def figure4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "figure4"
    reproduce(order("figure4", out, tiny, "projection=pca", "federation.rounds=2"), Silent())
    return out


def test_every_upload_has_its_place_cluster_and_true_task(figure4: Path) -> None:
    data = read(figure4 / "figure4.json")
    run = figure4 / "figure4" / "fltac-paper" / "seed-0"
    records = open_existing(run).rounds()
    assert [found["round"] for found in data["rounds"]] == [1, 2]
    for found, record in zip(data["rounds"], records, strict=True):
        assert len(found["points"]) == record["updates"]
        assert found["ari"] == record["clustering"]["ari"]
        assert len({point["cluster"] for point in found["points"]}) == record["clustering"]["k"]
        assert {point["task"] for point in found["points"]} == {"rte", "sst2"}
    assert (figure4 / "figure4.svg").stat().st_size > 0


def test_watching_does_not_change_a_run(figure4: Path, tmp_path: Path) -> None:
    watched = figure4 / "figure4" / "fltac-paper" / "seed-0"
    config = open_existing(watched).config
    experiment.run(config, tmp_path / "run")
    kept, plain = (open_existing(path).rounds() for path in (watched, tmp_path / "run"))
    assert [{**record, "seconds": 0} for record in kept] == [{**record, "seconds": 0} for record in plain]


def test_recorded_are_the_uploads_themselves(tiny: Path, tmp_path: Path) -> None:
    """Factors of the updates as the server got them, with the clusters that it put them into."""
    seen: list[tuple[ServerState, Any]] = []
    recorder = Recorder(tmp_path / "uploads")

    def watch(state: ServerState, replies: Any) -> None:
        seen.append((state, replies))
        recorder(state, replies)

    experiment.run(load_config(tiny / "glue-bert-small.yaml", ["federation.rounds=1"]), tmp_path / "run", watch=watch)
    ((state, replies),) = seen
    updates = [update for reply in replies for update in reply.updates]
    uploads = recorder.read(1)
    assert uploads.keys == tuple(update.key for update in updates)
    assert np.array_equal(uploads.factors, flattened([update.adapter for update in updates], head=False))
    assert uploads.clusters.tolist() == [state.assignment()[update.key] for update in updates]


def test_a_lost_recording_is_named(figure4: Path, tiny: Path) -> None:
    path = figure4 / "figure4" / "fltac-paper" / "uploads" / "seed-0" / "round-0002.safetensors"
    kept = path.read_bytes()
    wanted = order("figure4", figure4, tiny, "projection=pca", "federation.rounds=2")
    path.unlink()
    with pytest.raises(InputError, match="the uploads of round 2 were not recorded"):
        reproduce(wanted, Silent())
    path.write_bytes(kept[:50])
    with pytest.raises(InputError, match="is damaged"):
        reproduce(wanted, Silent())
    path.write_bytes(kept)


def test_the_plane_keeps_the_distances_of_rows_that_lie_in_one() -> None:
    """Principal components of points in a plane are the points, turned."""
    draw = np.random.default_rng(0)
    flat = draw.standard_normal((12, 2))
    turned = (flat @ np.linalg.qr(draw.standard_normal((30, 2)))[0].T + 3).astype(np.float32)
    points = projected(turned, "pca", seed=0)
    distances = [np.linalg.norm(rows[:, None] - rows[None], axis=2) for rows in (flat, points)]
    assert distances[1] == pytest.approx(distances[0], abs=1e-5)
    assert np.array_equal(projected(turned[:1], "pca", seed=0), np.zeros((1, 2)))


def test_the_partition_and_the_radar_chart(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reproduce(order("figure2", out, tiny, "experiment=glue", "methods=zero,fltac-paper"), Silent())
    data = read(out / "figure2-glue.json")
    assert {task: sum(row.get(task, 0) for row in data["clients"].values()) for task in ("rte", "sst2")} == {
        "rte": 60,
        "sst2": 60,
    }
    summary = read(out / "glue" / "fltac-paper" / "seed-0" / "summary.json")
    assert data["radar"]["fltac-paper"] == {task: own["score"] for task, own in summary["tasks"].items()}
    assert set(data["radar"]) == {"majority", "zero", "fltac-paper"}
    assert data["paper"] == {"fltac-paper": {"rte": 0.532, "sst2": 0.874}}
    assert all((out / name).stat().st_size for name in ("figure2a-glue.svg", "figure2b-glue.png"))


def test_the_papers_radar_is_that_of_dolly() -> None:
    """By the preset behind a task's name; a task that the paper does not have is left out."""
    presets = {"ideas": "dolly-brainstorming", "own": "own"}
    assert printed_scores("dolly", presets, ["zero", "fedit", "oracle"]) == {
        "zero": {"ideas": 0.830},
        "fedit": {"ideas": 0.340},
    }
    assert printed_scores("cifar", {"own": "own"}, ["fedit"]) == {}


def result(method: str, metric: str, **scores: float) -> Result:
    nothing: dict[str, Any] = {"ari": None, "cluster_accuracy": None, "up_bytes": 0, "down_bytes": 0, "majority": {}}
    metrics = dict.fromkeys(scores, metric)
    return Result(
        method, method, (SeedResult(0, method, 1, True, metrics, scores, scores, mean_score=None, **nothing),)
    )


def test_on_a_radar_chart_outwards_is_better() -> None:
    values, _ = radar_values([result("zero", "loss", a=3.0, b=2.0), result("fltac", "loss", a=2.5, b=2.25)])
    assert values == {"fltac": {"a": 0.5, "b": -0.25}}
    values, _ = radar_values([result("fltac", "loss", a=2.5)])
    assert values == {"fltac": {"a": -2.5}}
    values, reading = radar_values([result("fltac", "accuracy", a=0.5)])
    assert (values, reading) == ({"fltac": {"a": 0.5}}, "scores by task")
