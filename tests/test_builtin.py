"""The built-in backbone: what it knows, that it is made once and whole, and that making it disturbs nothing."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from fltac import builtin
from fltac.builtin import DIGITS_VIT, FILES, Recipe, all_shifts, builtin_folder, is_finished, pretrain
from fltac.config import BackboneConfig
from fltac.data.digits import halves, pretraining_rows, task_rows
from fltac.data.image_settings import Geometry, Normalisation, read_image_settings
from fltac.errors import InputError
from fltac.model.backbone import Backbone, load_backbone, pooled

SHORT = Recipe(steps=2, batch=4)


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return builtin_folder(DIGITS_VIT)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a model that takes no time."""
    monkeypatch.setenv("FLTAC_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "Recipe", lambda: SHORT)
    return tmp_path / "builtin"


def refuse(*_: object) -> None:
    raise AssertionError("trained again")


def features(backbone: Backbone, images: np.ndarray) -> np.ndarray:
    values = builtin.as_input(builtin.normalised(images))
    with torch.no_grad():
        return pooled(backbone, {"pixel_values": values}).numpy()


def test_it_is_a_backbone_for_images_of_the_digits_size(folder: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=DIGITS_VIT, device="cpu"), "image", str(folder))
    assert (backbone.kind, backbone.pooling, backbone.hidden) == ("image", "cls", 48)
    geometry, normalisation = read_image_settings(BackboneConfig(name=DIGITS_VIT), str(folder), "t")
    assert geometry == Geometry(8, 8, (8, 8), 2)
    assert normalisation == Normalisation(1 / 255, (0.5,) * 3, (0.5,) * 3)


def test_it_knows_digits_that_it_has_not_seen(folder: Path) -> None:
    backbone = load_backbone(BackboneConfig(name=DIGITS_VIT, device="cpu"), "image", str(folder))
    images, digits = pretraining_rows()
    probe = LogisticRegression(max_iter=2000).fit(features(backbone, images), digits)
    unseen, _ = task_rows("digits-parity")
    shown = load_digits().target
    assert probe.score(features(backbone, unseen), shown[halves(shown)[1]]) > 0.9


def test_it_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    monkeypatch.setattr(builtin, "pretrain", refuse)
    assert builtin_folder(DIGITS_VIT) == folder
    assert {name: (folder / name).stat().st_mtime_ns for name in FILES} == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert all((folder / name).stat().st_mode & 0o777 == 0o644 for name in FILES)


@pytest.mark.parametrize("name", ["builtin:", "builtin:digits", "builtin:digits-vit/x", "builtin:../x"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^backbone\.name: got 'builtin:.*' ?.*builtin:digits-vit$"):
        builtin_folder(name)


def test_every_setting_of_the_recipe_is_in_the_folders_name(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe()
    others = [
        dataclasses.replace(recipe, **{field.name: getattr(recipe, field.name) * 2})
        for field in dataclasses.fields(recipe)
    ]
    prints = {recipe.fingerprint, *(other.fingerprint for other in others)}
    assert len(prints) == len(others) + 1
    monkeypatch.setattr(builtin, "VERSION", builtin.VERSION + 1)
    assert recipe.fingerprint not in prints


def test_the_same_weights_whatever_the_caller_does() -> None:
    torch.manual_seed(1)
    first = pretrain(SHORT).state_dict()
    threads = torch.get_num_threads()
    torch.manual_seed(2)
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            second = pretrain(SHORT).state_dict()
    finally:
        torch.set_num_threads(threads)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_callers_state_is_left_alone(capfd: pytest.CaptureFixture[str], own_cache: Path) -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 (the global state is what must not change)
    state, threads, numpy_state = torch.get_rng_state(), torch.get_num_threads(), np.random.get_state()[1]  # noqa: NPY002
    torch.set_num_threads(2)
    try:
        builtin_folder(DIGITS_VIT)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.is_grad_enabled()
    assert capfd.readouterr() == ("", "")


def test_what_a_kill_left_does_not_count(own_cache: Path, folder: Path) -> None:
    left = own_cache / ".tmp-killed" / "model"
    shutil.copytree(folder, left)
    (left / "model.safetensors").unlink()
    made = builtin_folder(DIGITS_VIT)
    assert made.parent == own_cache
    assert made.name == f"digits-vit-{SHORT.fingerprint}"
    assert is_finished(made)
    assert sorted(entry.name for entry in own_cache.iterdir()) == [".tmp-killed", made.name]


def test_an_interruption_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            builtin_folder(DIGITS_VIT)
    assert list(own_cache.iterdir()) == []
    assert is_finished(builtin_folder(DIGITS_VIT))


def test_the_first_of_two_processes_wins(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = builtin.save
    target = own_cache / f"digits-vit-{SHORT.fingerprint}"

    def overtaken(model: builtin.ViTModel, folder: Path) -> None:
        save(model, folder)
        shutil.copytree(folder, target)
        (target / "config.json").write_text(json.dumps({"model_type": "vit", "first": True}))

    monkeypatch.setattr(builtin, "save", overtaken)
    assert builtin_folder(DIGITS_VIT) == target
    assert json.loads((target / "config.json").read_text())["first"]
    assert list(own_cache.iterdir()) == [target]


@pytest.mark.parametrize("file", FILES)
def test_a_folder_that_lost_a_file_is_made_anew(own_cache: Path, file: str) -> None:
    made = builtin_folder(DIGITS_VIT)
    (made / file).unlink()
    assert builtin_folder(DIGITS_VIT) == made
    assert is_finished(made)
    assert list(own_cache.iterdir()) == [made]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLTAC_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(builtin, "pretrain", refuse)
    with pytest.raises(InputError, match=r"^FLTAC_CACHE: .*cache.* cannot be made: .+"):
        builtin_folder(DIGITS_VIT)


def test_shifts_move_by_one_pixel_and_let_black_in() -> None:
    image = torch.arange(9.0).reshape(1, 3, 3)
    moved = all_shifts(image)
    assert moved.shape == (1, 3, 3, 3, 3)
    assert torch.equal(moved[:, 1, 1], image)
    assert moved[0, 0, 0].tolist() == [[-1, -1, -1], [-1, 0, 1], [-1, 3, 4]]
    assert moved[0, 2, 1].tolist() == [[3, 4, 5], [6, 7, 8], [-1, -1, -1]]
