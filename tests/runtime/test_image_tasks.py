"""Image tasks of several label spaces in one federation, augmented ones, and the paper's set-up in small."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

import fltac
from fltac.client.client import plan_jobs
from fltac.data.encoded import load_tasks
from fltac.data.task_presets import CIFAR10_GROUPS
from fltac.errors import InputError
from fltac.model.targets import find_targets, layer_shapes
from fltac.records import Reply, Request, ServerState
from fltac.runtime.lane_setup import choose_plan
from fltac.runtime.setup import Experiment, prepare
from fltac.runtime.simulation import Simulation
from fltac.server.round import finish_round, init_server, plan_round

PAPER = Path(__file__).parents[2] / "configs" / "paper" / "cifar-vit.yaml"
TASKS = ["cifar10", "cifar10-animal", "cifar10-rotation"]
NAMES = [*CIFAR10_GROUPS["animal"], *CIFAR10_GROUPS["vehicle"]]


def draw(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images in the hub's layout: ``cifar10`` of 8 x 8 pixels with names, ``cifar100`` of 32 x 32."""
    folder = tmp_path_factory.mktemp("data")
    for name, label, size, values in (("cifar10", "label", 8, NAMES), ("cifar100", "fine_label", 32, range(100))):
        (folder / name).mkdir()
        for split, count in (("train", 120), ("test", 20)):
            labels = [list(values)[row % len(values)] for row in range(count)]
            table = pa.table({"img": [png(image) for image in draw(count, size)], label: labels})
            pq.write_table(table, folder / name / f"{split}.parquet")
    return folder


def settings(root: Path, backbone: Path) -> dict[str, Any]:
    return {
        "backbone": {"name": str(backbone), "device": "cpu"},
        "tasks": TASKS,
        "data_root": str(root),
        "federation": {"clients": 3, "rounds": 1, "partition": {"rule": "dirichlet", "alpha": 2.0}},
        "lora": {"rank": 1, "alpha": 8},
        "training": {"lr": 5e-2, "steps": 3, "batch_size": 4, "threads": 1, "precision": "float32"},
    }


def play(root: Path, backbone: Path, *overrides: str) -> tuple[Experiment, tuple[Reply, ...], ServerState]:
    """One round: the experiment, the replies, and the state that they lead to."""
    experiment = prepare(fltac.load_config(settings(root, backbone), overrides))
    config, model = experiment.config, experiment.model
    state = init_server(config.server_settings, model.body_shapes, experiment.head_shapes, experiment.clients)
    plan = choose_plan(config.training, model, experiment.tasks["cifar10"], 1)
    simulation = Simulation(experiment.clients, model, config, plan)
    requests = plan_round(state, config.server_settings)
    replies = simulation.exchange(requests).replies
    state, report = finish_round(state, requests, replies, config.server_settings, experiment.groups)
    assert not report.rejections
    return experiment, replies, state


HEADS = {"head.10.weight": (10, 16), "head.2.weight": (2, 16), "head.4.weight": (4, 16)}


@pytest.mark.parametrize("method", [["method=fedit"], ["method=fltac", "server.clustering.rule=single"]])
def test_in_one_cluster_each_head_is_the_mean_over_those_who_have_it(
    root: Path, tiny_vit: Path, method: list[str]
) -> None:
    _, replies, state = play(root, tiny_vit, *method)
    (cluster,) = state.clusters
    updates = [update for reply in replies for update in reply.updates]
    assert {name: cluster.adapter[name].shape for name in HEADS} == HEADS
    for name in HEADS:
        having = [update for update in updates if name in update.adapter]
        assert len(having) == 3, "all three clients have the task"
        expected = np.average(
            [update.adapter[name] for update in having], axis=0, weights=[update.examples for update in having]
        )
        np.testing.assert_allclose(cluster.adapter[name], expected, atol=1e-6)
    body = next(name for name in cluster.adapter if name.endswith("lora_B"))
    everybody = np.average(
        [update.adapter[body] for update in updates], axis=0, weights=[update.examples for update in updates]
    )
    np.testing.assert_allclose(cluster.adapter[body], everybody, atol=1e-6)
    assert len(updates) == (3 if method == ["method=fedit"] else 9)


def test_apart_each_cluster_has_the_head_of_its_task_alone(root: Path, tiny_vit: Path) -> None:
    experiment, replies, state = play(root, tiny_vit, "method=oracle")
    tasks = {holding.key: str(experiment.tasks[holding.task].outputs) for holding in experiment.holdings}
    assert len(state.clusters) == 3
    for cluster in state.clusters:
        (outputs,) = {tasks[member] for member in cluster.members}
        heads = {name for name in cluster.adapter if name.startswith("head.")}
        assert heads == {f"head.{outputs}.weight", f"head.{outputs}.bias"}
        own = [update for reply in replies for update in reply.updates if update.key in cluster.members]
        expected = np.average(
            [update.adapter[f"head.{outputs}.weight"] for update in own],
            axis=0,
            weights=[update.examples for update in own],
        )
        np.testing.assert_allclose(cluster.adapter[f"head.{outputs}.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("method", ["fedit", "fltac"])
def test_a_whole_run_scores_every_task_through_its_own_head(
    root: Path, tiny_vit: Path, tmp_path: Path, method: str
) -> None:
    result = fltac.run(fltac.load_config(settings(root, tiny_vit), [f"method={method}"]), tmp_path / "run")
    assert [result.summary["tasks"][name]["n_eval"] for name in TASKS] == [20] * 3
    majority = result.summary["baselines"]["majority"]
    assert majority["cifar10"] == 0.1
    assert majority["cifar10-animal"] == 0.6
    heads = {"fedit": {"2x16+4x16+10x16"}, "fltac": {"10x16", "2x16", "4x16"}}[method]
    assert set(result.summary["trainable_parameters"]) == heads


def test_views_belong_to_client_slot_and_round(root: Path, tiny_vit: Path) -> None:
    experiment = prepare(fltac.load_config(settings(root, tiny_vit), ["training.augment=crop-flip"]))
    model = experiment.model
    initial = init_server(
        experiment.config.server_settings, model.body_shapes, experiment.head_shapes, experiment.clients
    ).initial
    client = next(iter(experiment.clients.values()))

    def views(number: int) -> dict[str, list[Any]]:
        jobs = plan_jobs(client, Request(number, client.id, {}, {}, initial), initial, experiment.config)
        return {job.steps[0].task.name: [step.views for step in job.steps] for job in jobs}

    first = views(1)
    for name, own in first.items():
        for view, same in zip(own, views(1)[name], strict=True):
            np.testing.assert_array_equal(view.down, same.down)
            np.testing.assert_array_equal(view.mirrored, same.mirrored)
        assert not np.array_equal(own[0].down, views(2)[name][0].down)
    assert not np.array_equal(first["cifar10"][0].down, first["cifar10-animal"][0].down)
    assert any(view.mirrored.any() for view in first["cifar10"])
    mirrored = [view.mirrored.any() for number in range(1, 6) for view in views(number)["cifar10-rotation"]]
    assert not any(mirrored), "a mirrored turn is another turn"


def test_augmented_training_does_not_depend_on_lanes(root: Path, tiny_vit: Path) -> None:
    augmented = ["training.augment=crop-flip", "method=local"]
    (_, together, _), (_, alone, _), (_, plain, _) = (
        play(root, tiny_vit, *overrides)
        for overrides in (augmented, [*augmented, "training.lanes=1"], ["method=local"])
    )
    for one, other, without in zip(together, alone, plain, strict=True):
        for update, same, different in zip(one.updates, other.updates, without.updates, strict=True):
            for name in update.adapter:
                np.testing.assert_allclose(update.adapter[name], same.adapter[name], atol=2e-4)
            body = next(name for name in update.adapter if name.endswith("lora_B"))
            assert np.abs(update.adapter[body] - different.adapter[body]).max() > 1e-3


def test_views_are_not_taken_for_rows_that_the_frozen_layers_have_seen(root: Path, tiny_vit: Path) -> None:
    """With kept results of the frozen layers, and without room for any."""
    overrides = ["training.augment=crop-flip", "method=local", "lora.layers=[1]"]
    (_, kept, _), (_, never, _) = (
        play(root, tiny_vit, *overrides, f"training.prefix_cache={size}") for size in (1024, 0)
    )
    for one, other in zip(kept, never, strict=True):
        for update, same in zip(one.updates, other.updates, strict=True):
            for name in update.adapter:
                np.testing.assert_allclose(update.adapter[name], same.adapter[name], atol=2e-4)


def test_texts_are_not_augmented(tmp_path: Path, tiny_bert: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\n")
    task = {"kind": "text", "path": str(tmp_path / "rows.csv"), "columns": ["text"], "label": "label"}
    tree = {"backbone": {"name": str(tiny_bert)}, "tasks": {"t": task}, "training": {"augment": "crop-flip"}}
    with pytest.raises(InputError, match=r"training\.augment: got 'crop-flip', but the task t is a text task"):
        prepare(fltac.load_config(tree))


@pytest.mark.parametrize(("rank", "parameters"), [(1, 36_864), (8, 294_912)])
def test_the_papers_adapters_on_its_own_architecture(rank: int, parameters: int) -> None:
    """ViT-base from its configuration, without weights; the counts are those that the paper prints."""
    with torch.device("meta"):
        model = ViTModel(ViTConfig(), add_pooling_layer=False)
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.image_size) == (768, 12, 224)
    shapes = layer_shapes(model, find_targets(model, None, None))
    assert len(shapes) == 24
    assert sum(rank * (inputs + outputs) for inputs, outputs in shapes.values()) == parameters


def test_the_papers_config_runs_on_tiny_random_weights(root: Path, tmp_path: Path) -> None:
    """The same architecture and image settings, two layers; the config but for places and sizes."""
    folder = tmp_path / "vit"
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=12)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    half = [0.5] * 3
    processor = {"do_resize": True, "size": 224, "resample": 2, "image_mean": half, "image_std": half}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    places = [f"backbone.name={folder}", "backbone.device=cpu", f"data_root={root}"]
    small = ["federation.clients=2", "federation.rounds=2", "federation.seed=0", "training.steps=1"]
    small += ["training.batch_size=4", "training.threads=1", "training.precision=float32"]
    result = fltac.run(fltac.load_config(PAPER, [*places, *small]), tmp_path / "run")
    assert [task["n_eval"] for task in result.summary["tasks"].values()] == [20, 20]
    adapter = 2 * 2 * (24 + 24)
    counts = {"10x24": adapter + 10 * 25, "100x24": adapter + 100 * 25}
    assert result.summary["trainable_parameters"] == counts


def test_images_of_cifar_are_enlarged_as_the_papers_backbone_wants_them(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    half = [0.5] * 3
    processor = {"do_resize": True, "size": 224, "resample": 2, "image_mean": half, "image_std": half}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tree = {"backbone": {"name": str(folder)}, "tasks": ["cifar100"], "data_root": str(root)}
    task = load_tasks(fltac.load_config(tree), str(folder))["cifar100"]
    values = task.validation.batch(np.arange(3))["pixel_values"]
    images = [Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR) for image in draw(20, 32)[:3]]
    expected = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2) / 127.5 - 1
    assert values.shape == (3, 3, 224, 224)
    np.testing.assert_allclose(values, expected, atol=1.01 / 127.5)  # within a level
