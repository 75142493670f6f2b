"""The paper's parameter counts, counted again on its backbones: ``fltac reproduce parameters [lora.rank=2]``.

Each row says of what a printed number is made. Targets are found by the same code as in a run.
"""

from dataclasses import dataclass
from typing import Any, Final

from fltac.config import LoraConfig
from fltac.config.loading import parse_override, validated
from fltac.config.presets import Tree, merge
from fltac.errors import InputError
from fltac.reproduce.architectures import adapter_parameters, architecture, linear_head, on_meta, whole_classifier
from fltac.reproduce.order import Made, Order, Overrides, sort_overrides
from fltac.runtime.progress import Progress


@dataclass(frozen=True)
class Count:
    """One number of the paper.

    Attributes:
        printed: As in the paper; None for a number that it should have printed.
        what: Whose number it is.
        part: Prefix of settings for this architecture alone: ``bert.lora.rank=2``.
        rank: Of the adapters; None where the whole model is counted.
        copies: How many adapters are counted, each with its head.
        head: Outputs of the linear head; None where heads are not counted.
        bias: Of the head.
    """

    printed: int | None
    what: str
    part: str
    rank: int | None
    copies: int
    head: int | None
    bias: bool = True


BACKBONES: Final = {
    "bert": "google-bert/bert-base-cased",
    "vit": "google/vit-base-patch16-224-in21k",
    "llama": "huggyllama/llama-7b",
}
COUNTS: Final = (
    Count(192_010, "BERT, FL-TAC: an adapter of rank 1 and a head for each of 5 tasks", "bert", 1, 5, 2),
    Count(614_432, "BERT, FedIT as printed: 16 adapters of rank 1, and the head 16 times", "bert", 1, 16, 2),
    Count(None, "BERT, FedIT: an adapter of rank 16 and its one head", "bert", 16, 1, 2),
    Count(36_864, "ViT, FL-TAC: an adapter of rank 1, without its head", "vit", 1, 1, None),
    Count(294_912, "ViT, FedIT: an adapter of rank 8, without its head", "vit", 8, 1, None),
    Count(4_259_840, "Llama: 8 adapters of rank 1, each with a 2-way head without bias", "llama", 1, 8, 2, False),
    Count(8_519_680, "Llama: 16 adapters of rank 1, each with a 2-way head without bias", "llama", 1, 16, 2, False),
    Count(108_311_810, "BERT, full fine-tuning: all of bert-base-cased and a 2-class head", "bert", None, 1, 2),
)


def make(order: Order, progress: Progress) -> Made:
    """Counts.

    Raises:
        InputError: a setting that is neither ``lora.*`` nor ``backbone.name``, or that fits no backbone.
    """
    overrides = sort_overrides(order.overrides, parts=tuple(BACKBONES))
    settings = {part: _settings(overrides, part) for part in BACKBONES}
    models = {part: on_meta(architecture(name)) for part, (name, _) in settings.items()}
    rows = []
    for count in COUNTS:
        name, lora = settings[count.part]
        model: Any = models[count.part]
        head = None if count.head is None else linear_head(model.config.hidden_size, count.head, count.bias)
        row: dict[str, Any] = {"printed": count.printed, "backbone": name, "copies": count.copies, "head": head}
        if count.rank is None:
            assert count.head is not None
            row |= {"rank": None, "adapter": None, "computed": whole_classifier(architecture(name), count.head)}
        else:
            own = validated(LoraConfig, merge({"rank": count.rank}, lora), "lora")
            adapter = adapter_parameters(model, own)
            row |= {"rank": own.rank, "adapter": adapter, "computed": count.copies * (adapter + (head or 0))}
        rows.append({**row, "what": count.what, "differs": _differs(count, row, lora)})
    notes = [
        "adapter: numbers in the low-rank factors of one adapter (query and value projections). "
        "computed = copies × (adapter + head); where no rank is given, the whole model with its head. "
        "what: what the printed number is made of; differs: what ours is made of instead. "
        "Every module is found and every shape read on the real architecture, built without weights."
    ]
    if order.overrides:
        notes.append(f"Changed by {' '.join(order.overrides)}; the printed numbers are for other settings.")
    else:
        notes.append(
            "614,432 = 16 × (36,864 + 1,538): the paper multiplies the head by the rank along with the adapter. One "
            "adapter of rank 16 with its one head has 591,362."
        )
    columns = ("printed", "computed", "backbone", "rank", "copies", "adapter", "head", "what", "differs")
    table = [list(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    csv = [{column: row[column] for column in columns} for row in rows]
    return Made({"rows": csv}, table, notes, csv)


def _differs(count: Count, row: dict[str, Any], lora: Tree) -> str:
    """What our number counts otherwise than the paper's."""
    out = [] if row["backbone"] == BACKBONES[count.part] else [f"backbone {row['backbone']}"]
    if count.rank is not None:
        out += [f"rank {row['rank']} for {count.rank}"] if row["rank"] != count.rank else []
        out += [f"lora.{key} {value}" for key, value in lora.items() if key in ("targets", "layers")]
    if count.printed is None:
        out.append("the head once; printed is the row above")
    return "; ".join(out) or "nothing"


def _settings(overrides: Overrides, part: str) -> tuple[str, Tree]:
    """The backbone's name and what is said of ``lora``."""
    tree: Tree = {}
    for text in overrides.config(part):
        if not text.startswith(("lora.", "backbone.name=")):
            raise InputError(
                f"parameters: {text.partition('=')[0]}: does not change a count; allowed are lora.* and backbone.name"
            )
        tree = merge(tree, parse_override(text))
    return str(tree.get("backbone", {}).get("name", BACKBONES[part])), tree.get("lora", {})


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
