"""The README.md of an exported adapter: what it is, and the exact lines that load it without this package."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fltac.model.backbone import Backbone
from fltac.model.native import NativeHead
from fltac.paths import BUILTIN, PACKAGE


@dataclass(frozen=True)
class CardFacts:
    """Where an adapter comes from.

    Attributes:
        method: Name of the method.
        rounds: Rounds of federated training.
        members: Slots in the cluster.
        cluster: The cluster's id.
        max_length: Tokens after which texts were cut, if known.
        tasks: The tasks that it was trained for, as far as the evaluator knows: the number of clients, and the names
            of the classes in the order of the head's outputs where there are any.
        prompt: What a causal language model was trained to answer, as an example.
    """

    method: str
    rounds: int
    members: int
    cluster: int
    max_length: int | None = None
    tasks: Mapping[str, tuple[int, tuple[str, ...] | None]] = field(default_factory=dict)
    prompt: str | None = None


def model_card(
    backbone: Backbone, native: NativeHead | None, outputs: int | None, facts: CardFacts, summary: str
) -> str:
    """Returns the card in Markdown.

    Args:
        backbone: The base model.
        native: The head's place in the classification class; None where the head lies beside.
        outputs: Number of the head's outputs; None for an adapter without a head.
        facts: Where the adapter comes from.
        summary: Rank, scale and adapted modules, in one line.
    """
    front = ["---", "library_name: peft", "tags:", "- lora", "- federated-learning"]
    if not Path(backbone.folder).is_dir():  # a hub id
        front.insert(1, f"base_model: {json.dumps(backbone.name)}")
    head = "No head." if outputs is None else f"Head: {_outputs(outputs)}, read from {_pooling(backbone)}."
    lines = [
        *front,
        "---",
        "",
        f"# LoRA adapter of cluster {facts.cluster}",
        "",
        f"From a run of fltac (federated LoRA with clustered task adapters), method `{facts.method}`: "
        f"cluster {facts.cluster} with {facts.members} local tasks, after round {facts.rounds}.",
        "",
        f"- Base model: `{backbone.name}`" + (f", revision `{backbone.revision}`" if backbone.revision else ""),
        f"- SHA-256 of its weights: `{backbone.fingerprint}`",
        f"- {summary}",
        f"- {head}",
        *_tasks(facts),
        "",
        "```python",
        *_code(backbone, native, outputs, facts),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _tasks(facts: CardFacts) -> list[str]:
    """One line for each task, those of most clients first."""
    ordered = sorted(facts.tasks.items(), key=lambda item: -item[1][0])
    return [
        f"- Task `{task}`: {count} client{'s' if count > 1 else ''}"
        + (f"; classes in order: {', '.join(names)}" if names else "")
        for task, (count, names) in ordered
    ]


def _outputs(outputs: int) -> str:
    return "one output (regression)" if outputs == 1 else f"{outputs} classes"


def _pooling(backbone: Backbone) -> str:
    return {
        "mean": "the mean of the last hidden states",
        "cls": "the first token's last hidden state",
        "pooler": "the base model's pooler",
    }[backbone.pooling]


def _code(backbone: Backbone, native: NativeHead | None, outputs: int | None, facts: CardFacts) -> list[str]:
    causal = backbone.kind == "causal-lm"
    auto_class = native.auto_class if native else "AutoModelForCausalLM" if causal else "AutoModel"
    options = "base"
    if backbone.revision:
        options += f", revision={json.dumps(backbone.revision)}"
    text = backbone.kind != "image"
    code = [
        "import torch",
        "from peft import PeftModel",
        *([] if native or outputs is None else ["from safetensors.torch import load_file"]),
        f"from transformers import {auto_class}" + (", AutoTokenizer" if text else ""),
        "",
        *_base(backbone),
        'folder = "."  # this folder',
    ]
    loading = options + ", dtype=torch.float32"
    if native:
        loading += f", num_labels={outputs}" + (", ignore_mismatched_sizes=True" if _has_own_head(backbone) else "")
    code += [
        f"model = {auto_class}.from_pretrained({loading})",
        "model = PeftModel.from_pretrained(model, folder).eval()",
    ]
    if causal:
        return [
            *code,
            f"tokenizer = AutoTokenizer.from_pretrained({options})",
            f'batch = tokenizer({json.dumps(facts.prompt or "A prompt.")}, return_tensors="pt")',
            "out = model.generate(**batch, max_new_tokens=64, do_sample=False)",
            "print(tokenizer.decode(out[0], skip_special_tokens=True))",
        ]
    if text:
        cut = f", truncation=True, max_length={facts.max_length}" if facts.max_length else ", truncation=True"
        code += [
            f"tokenizer = AutoTokenizer.from_pretrained({options})",
            f'batch = tokenizer(["A text."], padding=True{cut}, return_tensors="pt")',
        ]
    else:
        code += ['batch = {"pixel_values": pixels}  # float [rows, channels, height, width], normalised']
    if native:
        return [*code, "with torch.no_grad():", f"    logits = model(**batch).logits  # [rows, {outputs}]"]
    code += ["with torch.no_grad():", "    out = model(**batch)", *_pooled(backbone)]
    if outputs is not None:
        code += [
            'head = load_file(f"{folder}/head.safetensors")',
            f'logits = pooled @ head["weight"].T + head["bias"]  # [rows, {outputs}]',
        ]
    return code


def _has_own_head(backbone: Backbone) -> bool:
    """A checkpoint with a classification head may have another number of classes."""
    return any("Classification" in name for name in backbone.model.config.architectures or [])


def _base(backbone: Backbone) -> list[str]:
    name = backbone.name
    if name.startswith(PACKAGE):
        package, _, inside = name[len(PACKAGE) :].partition("/")
        where = f"files({json.dumps(package)})" + (f" / {json.dumps(inside)}" if inside else "")
        return ["from importlib.resources import files", f"base = str({where})"]
    if name.startswith(BUILTIN):
        return ["from fltac.builtin import builtin_folder", f"base = str(builtin_folder({json.dumps(name)}))"]
    if "${" in name or name.startswith("~"):
        path = f"os.path.expanduser(os.path.expandvars({json.dumps(name)}))"
        return ["import os", f"base = {path}"]
    return [f"base = {json.dumps(name)}"]


def _pooled(backbone: Backbone) -> list[str]:
    if backbone.pooling == "pooler":
        return ["pooled = out.pooler_output"]
    if backbone.pooling == "cls":
        return ["pooled = out.last_hidden_state[:, 0]"]
    if backbone.kind == "image":
        return ["pooled = out.last_hidden_state.mean(1)"]
    return [
        'mask = batch["attention_mask"].unsqueeze(-1)',
        "pooled = (out.last_hidden_state * mask).sum(1) / mask.sum(1)",
    ]
