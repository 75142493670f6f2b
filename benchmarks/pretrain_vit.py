"""Pretrains a small vision transformer on CIFAR-10's training images without their labels.

    python benchmarks/pretrain_vit.py --steps 6000

It learns to predict features of the same image that need no labels (``patch_features.py``), squeezed by a principal
component analysis: of the whole image by quarters, and of each cell of a 4 x 4 grid. Needs FLTAC_DATA. What is run
again goes on where it was; until the last ``Recipe.decay`` of the steps it may go on to another number of steps.
``--stop N`` ends earlier than planned, before the rates have fallen.
"""

import argparse
import io
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from patch_features import Targets, learn_dictionary, make_targets
from PIL import Image
from safetensors.torch import load_file, save
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from vit_student import SIZE, Recipe, Student, as_pixels, build, features, optimizers, set_rates

from fltac.builtin import image_settings
from fltac.model.backbone import quiet_transformers
from fltac.paths import expand
from fltac.runtime.atomic import write_atomic
from fltac.runtime.provenance import code_state, hardware, versions
from fltac.seeding import derive, generator

OUT = Path(__file__).parents[1] / "results" / "models" / "cifar-vit"
WORK = Path(__file__).parents[1] / "runs" / "pretrain-vit"
SAVE_STEPS = 20
PROBE_ROWS = (5000, 2000)
"""Training and test images of the linear probe."""
STATE = "state.safetensors"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps in all")
    parser.add_argument("--stop", type=int, help="publish the model after so many of them; default: after all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe-every", type=int, default=400, help="steps between two linear probes")
    parser.add_argument("--data", default="${FLTAC_DATA}/data/cifar10", help="folder with train and test parquet files")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for images, and each seed's targets and state")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the model")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    folder = Path(expand(args.data, "--data"))
    work = args.work / f"seed-{args.seed}"
    work.mkdir(parents=True, exist_ok=True)
    images = remembered_images(folder, args.work / "images.npy")
    targets = remembered_targets(images, args.seed, work / "targets.safetensors")
    recipe = Recipe()
    torch.manual_seed(derive(args.seed, "cifar-vit-weights"))
    student = build(recipe, targets.whole.shape[1], targets.cells.shape[2], images[:2000])
    chosen = optimizers(student, recipe)
    done, seconds = restore(work / STATE, student, chosen)
    last = min(args.steps, args.stop or args.steps)
    while done < last:
        until = min(last, (done // SAVE_STEPS + 1) * SAVE_STEPS)
        begun = time.process_time()
        loss = [
            train_step(student, chosen, recipe, images, targets, args.seed, n, args.steps) for n in range(done, until)
        ]
        seconds += time.process_time() - begun
        done = until
        keep(work / STATE, student, chosen, done, seconds)
        print(f"step {done} of {args.steps}: loss {np.mean(loss):.3f}, {seconds:.0f} CPU seconds", flush=True)
        if done % args.probe_every == 0 and done < last:
            print(f"  probe {probe(student, folder)}", flush=True)
    scores = probe(student, folder)
    print(f"probe {scores}")
    publish(
        args.out,
        student,
        {
            "what": "predicts patch features of CIFAR-10's training images, whose labels were never read",
            "images": len(images),
            "steps": done,
            "planned_steps": args.steps,
            "epochs": round(done * recipe.batch / len(images), 2),
            "seed": args.seed,
            "cpu_seconds": round(seconds),
            "recipe": asdict(recipe),
            "linear_probe": {**scores, "rows": list(PROBE_ROWS)},
            "git": code_state(),
            "versions": versions(),
            "hardware": hardware(),
        },
    )
    return 0


def read(folder: Path, split: str, rows: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 ``[n, 32, 32, 3]`` and labels of a split; only the linear probe reads labels."""
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise SystemExit(f"--data: {folder} has no {split}*.parquet")
    table = pq.ParquetDataset(files).read(["img", "label"])
    table = table if rows is None else table.slice(0, rows)
    images = np.empty((len(table), SIZE, SIZE, 3), dtype=np.uint8)
    for row, value in enumerate(table["img"]):
        images[row] = Image.open(io.BytesIO(value["bytes"].as_py())).convert("RGB")
    return images, table["label"].to_numpy()


def remembered_images(folder: Path, file: Path) -> NDArray[np.uint8]:
    """The training images, decoded now if they are not in ``file``."""
    if not file.exists():
        buffer = io.BytesIO()
        np.save(buffer, read(folder, "train")[0], allow_pickle=False)
        write_atomic(file, buffer.getvalue())
    images: NDArray[np.uint8] = np.load(file, mmap_mode="r", allow_pickle=False)
    return images


def remembered_targets(images: NDArray[np.uint8], seed: int, file: Path) -> Targets:
    """Targets of all images, made now if they are not in ``file``."""
    if not file.exists():
        draw = generator(seed, "cifar-vit-dictionary")
        dictionary = learn_dictionary(images, 512, 1.0, 80_000, 8, draw)
        made = make_targets(images, dictionary, draw)
        write_atomic(file, save({"whole": made.whole, "cells": made.cells}))
    tensors = load_file(file)
    return Targets(tensors["whole"], tensors["cells"])


def train_step(
    student: Student,
    chosen: list[torch.optim.Optimizer],
    recipe: Recipe,
    images: NDArray[np.uint8],
    targets: Targets,
    seed: int,
    number: int,
    steps: int,
) -> float:
    """One step on the ``number``-th batch of a sequence of shuffled passes over all images."""
    each = len(images) // recipe.batch
    order = generator(seed, "cifar-vit-batches", number // each).permutation(len(images))
    rows = order[number % each * recipe.batch :][: recipe.batch]
    at = torch.from_numpy(rows)
    depth = 2 if number < recipe.shallow else recipe.layers
    loss = student.loss(as_pixels(images[rows]), targets.whole[at].float(), targets.cells[at].float(), depth)
    loss.backward()
    set_rates(chosen, recipe, number, steps)
    for optimizer in chosen:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def keep(file: Path, student: Student, chosen: list[torch.optim.Optimizer], done: int, seconds: float) -> None:
    """Writes everything that the next step depends on."""
    tensors: dict[str, Tensor] = {f"student/{name}": value for name, value in student.state_dict().items()}
    for number, optimizer in enumerate(chosen):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{number}/{index}/{name}": value for name, value in values.items()}
    write_atomic(file, save(tensors, {"done": str(done), "seconds": str(seconds)}))


def restore(file: Path, student: Student, chosen: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Reads what :func:`keep` wrote, if anything; returns steps done and CPU seconds spent."""
    if not file.exists():
        return 0, 0.0
    tensors = load_file(file)
    prefix = "student/"
    student.load_state_dict({name.removeprefix(prefix): value for name, value in tensors.items() if prefix in name})
    for number, optimizer in enumerate(chosen):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"{number}/"):
                _, index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    size = int.from_bytes(file.read_bytes()[:8], "little")
    facts = json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"]
    return int(facts["done"]), float(facts["seconds"])


def probe(student: Student, folder: Path) -> dict[str, float]:
    """Test accuracy of logistic regressions on frozen features: the first token, and the mean of the others."""
    images, labels = read(folder, "train", PROBE_ROWS[0])
    others, truth = read(folder, "test", PROBE_ROWS[1])
    out = {}
    for name, own, new in zip(("cls", "mean"), features(student, images), features(student, others), strict=True):
        scale = StandardScaler().fit(own)
        model = LogisticRegression(C=0.01, max_iter=300).fit(scale.transform(own), labels)
        out[name] = round(float(model.score(scale.transform(new), truth)), 4)
    return out


def publish(folder: Path, student: Student, facts: dict[str, object]) -> None:
    """Writes the transformer as a Hugging Face folder, with ``provenance.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        student.vit.save_pretrained(folder)
    write_atomic(folder / "preprocessor_config.json", image_settings(SIZE).encode())
    write_atomic(folder / "provenance.json", (json.dumps(facts, indent=1) + "\n").encode())
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    raise SystemExit(main())
