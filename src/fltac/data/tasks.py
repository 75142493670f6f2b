"""What a config's task comes to: its preset, where its rows lie, its columns, classes and prompts."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fltac.config import TaskConfig
from fltac.config.metrics import Metric
from fltac.data.task_presets import DIGITS, FOLDERS, TASK_PRESETS
from fltac.errors import InputError
from fltac.paths import BUILTIN, expand, resolve

Kind = Literal["text", "image", "causal-lm"]
Transform = Literal["rotate4"]


@dataclass(frozen=True)
class Prompting:
    """How a row of a causal-lm task becomes tokens; the fields are those of ``TaskConfig``."""

    template: Literal["alpaca", "chat"] = "alpaca"
    prompt_cut: Literal["left", "right"] = "right"
    long_response: Literal["drop", "cut"] = "drop"


@dataclass(frozen=True)
class ResolvedTask:
    """A task with everything filled in. Exactly one of ``hub``, ``path`` and ``builtin`` is set.

    Attributes:
        name: As in the config.
        kind: What a row holds.
        hub: Hub id; ``subset`` is its configuration.
        path: Local file or folder, expanded.
        path_key: The config key that ``path`` comes from, for errors.
        builtin: Name of the preset whose rows come with the package.
        train_split: Where the training rows are.
        validation_split: Where the validation rows are; None to look for one of the usual names.
        validation_path: File or image folder with the validation rows, expanded.
        validation: Share of the training rows held out for validation; None to hold out only where the data
            has no validation split.
        columns: One or two text columns, one image column, or instruction, perhaps context, and response.
        label: Label column; empty for a causal-lm task.
        labels: Class names in the order of their numbers; None to take them from the data.
        classes: Groups of the label column's classes that become the task's classes; None to keep those.
        transform: What is done to every row and makes its label; None to read the label column.
        mirror: Whether a mirrored image has the same label.
        metric: Pearson makes the task a regression.
        max_rows: Training rows to use at most.
        max_validation_rows: Validation rows to use at most.
        filter: Column to the value that a row must hold to be used.
        prompting: Of a causal-lm task.
    """

    name: str
    kind: Kind
    hub: str | None
    subset: str | None
    path: str | None
    path_key: str
    builtin: str | None
    train_split: str
    validation_split: str | None
    validation_path: str | None
    validation: float | None
    columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...] | None
    metric: Metric
    max_rows: int | None
    classes: tuple[tuple[str, tuple[str, ...]], ...] | None = None
    transform: Transform | None = None
    mirror: bool = True
    max_validation_rows: int | None = None
    filter: Mapping[str, str] = field(default_factory=dict)
    prompting: Prompting = Prompting()

    @property
    def regression(self) -> bool:
        return self.metric == "pearson"

    @property
    def source(self) -> str:
        """The data as the user knows it."""
        if self.hub:
            return f"{self.hub}/{self.subset}" if self.subset else self.hub
        return self.path or f"{BUILTIN}{self.builtin}"

    def key(self, field: str) -> str:
        """The config key of a field, for errors."""
        return f"tasks.{self.name}.{field}"


def resolve_task(name: str, task: TaskConfig, data_root: str | None) -> ResolvedTask:
    """Fills a task's settings from its preset; what the config says itself is stronger.

    Args:
        name: The task's name in the config.
        task: Its settings.
        data_root: Folder with ``glue/<task>/<split>.parquet`` and the like that presets read instead of the
            hub; ``${VAR}`` is expanded.

    Raises:
        InputError: an unknown preset, no data named or too much of it, no kind, or columns and label that do
            not fit the kind.
    """
    merged = _merged(name, task)
    path, path_key = merged.path, f"tasks.{name}.path"
    hub, builtin = merged.hub, None
    if path is not None and path.startswith(BUILTIN):
        if path != DIGITS or task.preset not in TASK_PRESETS or TASK_PRESETS[task.preset].path != DIGITS:
            digits = ", ".join(key for key, preset in TASK_PRESETS.items() if preset.path == DIGITS)
            raise InputError(f"{path_key}: got {path!r}; built-in rows come by preset: {digits}")
        path, builtin = None, task.preset
    elif path is not None:
        path = resolve(path, path_key)
    elif data_root is not None and task.preset is not None and task.hub is None and hub is not None:
        inside = "/".join(part for part in (FOLDERS.get(hub, hub.split("/")[-1]), merged.subset) if part)
        folder = Path(expand(data_root, "data_root")) / inside
        if not folder.is_dir():
            raise InputError(f"data_root: {data_root!r} has no folder {inside}, which the task {name} needs")
        hub, path, path_key = None, str(folder), "data_root"
    kind, columns, label = _shape(name, merged)
    if merged.metric == "pearson" and merged.labels:
        raise InputError(f"tasks.{name}.labels: metric pearson makes a regression, which has no class names")
    if merged.labels and len(set(merged.labels)) != len(merged.labels):
        raise InputError(f"tasks.{name}.labels: got {merged.labels}; each name may stand there once")
    validation_path = merged.validation_path
    _refuse_wrong_labelling(name, merged, kind)
    return ResolvedTask(
        name=name,
        kind=kind,
        hub=hub,
        subset=merged.subset,
        path=path,
        path_key=path_key,
        builtin=builtin,
        train_split=merged.train_split,
        validation_split=merged.validation_split,
        validation_path=resolve(validation_path, f"tasks.{name}.validation_path") if validation_path else None,
        validation=merged.validation,
        columns=columns,
        label=label,
        labels=tuple(merged.labels) if merged.labels else None,
        metric=merged.metric or ("loss" if kind == "causal-lm" else "accuracy"),
        max_rows=merged.max_rows,
        classes=_groups(name, merged) if merged.classes is not None else None,
        transform=merged.transform,
        mirror=merged.transform is None if merged.mirror is None else merged.mirror,
        max_validation_rows=merged.max_validation_rows,
        filter=merged.filter or {},
        prompting=_prompting(name, kind, merged),
    )


def _refuse_wrong_labelling(name: str, task: TaskConfig, kind: Kind) -> None:
    """Raises InputError for settings of labels that exclude each other."""
    if task.metric == "pearson" and (task.classes is not None or task.transform is not None):
        field = "transform" if task.classes is None else "classes"
        raise InputError(f"tasks.{name}.{field}: metric pearson makes a regression, which has no classes")
    if task.transform is not None and kind != "image":
        raise InputError(f"tasks.{name}.transform: got {task.transform!r}; allowed with image tasks only")
    if task.transform is not None and task.labels:
        raise InputError(
            f"tasks.{name}.labels: transform {task.transform!r} makes the labels, which have names already"
        )
    if task.mirror is not None and kind != "image":
        raise InputError(f"tasks.{name}.mirror: got {task.mirror}; allowed with image tasks only")


def _groups(name: str, task: TaskConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """``classes`` with every name as text.

    Raises:
        InputError: there are fewer than two groups, one is empty, or a class stands there twice.
    """
    key, classes = f"tasks.{name}.classes", task.classes or {}
    if len(classes) < 2:
        raise InputError(f"{key}: got {len(classes)} groups; allowed are two or more")
    seen: dict[str, str] = {}
    for group, members in classes.items():
        if not members:
            raise InputError(f"{key}.{group}: the group is empty; each needs a class of the label column")
        for member in map(str, members):
            if member in seen:
                raise InputError(
                    f"{key}: {member!r} stands in {seen[member]} and in {group}; each class may stand once"
                )
            seen[member] = group
    return tuple((group, tuple(map(str, members))) for group, members in classes.items())


def _merged(name: str, task: TaskConfig) -> TaskConfig:
    """The task's settings over those of its preset. Another source or validation replaces the preset's."""
    given = {key: value for key, value in task.model_dump().items() if value is not None}
    validations = [key for key in ("validation", "validation_split", "validation_path") if key in given]
    if len(validations) > 1:
        raise InputError(f"tasks.{name}: {' and '.join(validations)} exclude each other; give one")
    if task.hub is not None and task.path is not None:
        raise InputError(f"tasks.{name}: hub and path exclude each other; give one")
    if task.preset is None:
        if task.hub is None and task.path is None:
            hint = f"; {name!r} is a preset, so `preset: {name}` would do" if name in TASK_PRESETS else ""
            raise InputError(f"tasks.{name}: names no data; give preset, hub or path{hint}")
        return task
    if task.preset not in TASK_PRESETS:
        near = difflib.get_close_matches(task.preset, TASK_PRESETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(TASK_PRESETS)}"
        raise InputError(f"tasks.{name}.preset: got {task.preset!r}; {hint}")
    preset = {key: value for key, value in TASK_PRESETS[task.preset].model_dump().items() if value is not None}
    if task.hub is not None or task.path is not None:
        preset = {key: value for key, value in preset.items() if key not in ("hub", "path")}
    one_file = task.path is not None and Path(resolve(task.path, f"tasks.{name}.path")).is_file()
    if validations or one_file:
        preset = {key: value for key, value in preset.items() if key not in ("validation", "validation_split")}
    return TaskConfig.model_validate(preset | given)


def _shape(name: str, task: TaskConfig) -> tuple[Kind, tuple[str, ...], str]:
    """Kind, columns and label; an image task's are ``image`` and ``label`` unless the config says so."""
    if task.kind is None:
        raise InputError(f"tasks.{name}.kind: not given; allowed are text, image, causal-lm")
    if (task.kind == "causal-lm") != (task.metric == "loss") and task.metric is not None:
        allowed = "loss" if task.kind == "causal-lm" else "accuracy, f1, matthews, pearson"
        raise InputError(f"tasks.{name}.metric: got {task.metric!r}; allowed for a {task.kind} task is {allowed}")
    if task.kind == "causal-lm":
        return task.kind, _instruction_columns(name, task), ""
    if task.kind == "image":
        columns = task.columns or ["image"]
        if len(columns) != 1:
            raise InputError(f"tasks.{name}.columns: got {columns}; an image task has one image column")
        return task.kind, tuple(columns), task.label or "label"
    if task.columns is None or not 1 <= len(task.columns) <= 2:
        given = task.columns if task.columns is not None else "nothing"
        raise InputError(f"tasks.{name}.columns: got {given}; a text task has one or two text columns")
    if len(set(task.columns)) < len(task.columns) or task.label in task.columns:
        raise InputError(
            f"tasks.{name}.columns: got {task.columns} with label {task.label!r}; all must be different columns"
        )
    if task.label is None:
        raise InputError(f"tasks.{name}.label: not given; a text task needs its label column")
    return task.kind, tuple(task.columns), task.label


def _instruction_columns(name: str, task: TaskConfig) -> tuple[str, ...]:
    columns = task.columns or []
    if not 2 <= len(columns) <= 3 or len(set(columns)) < len(columns):
        raise InputError(
            f"tasks.{name}.columns: got {task.columns}; a causal-lm task has different columns for "
            "[instruction, response] or [instruction, context, response]"
        )
    for key in ("label", "labels"):
        if getattr(task, key) is not None:
            raise InputError(f"tasks.{name}.{key}: got {getattr(task, key)!r}; a causal-lm task has no classes")
    return tuple(columns)


def _prompting(name: str, kind: Kind, task: TaskConfig) -> Prompting:
    given = {key: getattr(task, key) for key in ("template", "prompt_cut", "long_response")}
    given = {key: value for key, value in given.items() if value is not None}
    if given and kind != "causal-lm":
        key = next(iter(given))
        raise InputError(f"tasks.{name}.{key}: got {given[key]!r}; allowed for causal-lm tasks only, this is {kind}")
    return Prompting(**given)
