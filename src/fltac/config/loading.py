"""From YAML and ``key=value`` overrides to a checked configuration, and back to YAML.

``load_config`` merges, from weakest to strongest: the defaults of the sections, the preset of the file's ``method``,
the file, the preset of a ``method=`` override, the file's ``methods.<method>`` section, the dotted overrides.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fltac.config.presets import PRESETS, Tree, merge
from fltac.config.sections import Config, Section, TaskConfig
from fltac.errors import InputError


def parse_override(text: str) -> Tree:
    """``a.b=1`` as ``{"a": {"b": 1}}``; the value is read as YAML.

    Raises:
        InputError: there is no ``=``, an empty key, or the value is not YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key or any(not part for part in key.split(".")):
        raise InputError(f"override {text!r}: expected key=value, such as federation.rounds=3")
    try:
        leaf = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"override {text!r}: the value is not YAML") from error
    for part in reversed(key.split(".")):
        leaf = {part: leaf}
    assert isinstance(leaf, dict)
    return leaf


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a configuration.

    Args:
        source: A YAML file, or its content as a mapping.
        overrides: ``section.key=value`` strings, stronger than the file.

    Raises:
        InputError: naming the key, its value and what is allowed.
    """
    tree = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    for name, field in Config.model_fields.items():
        section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        if section and name in tree and not isinstance(tree[name], Mapping):
            raise InputError(f"{name}: got {tree[name]!r}; expected a mapping of settings")
    overriding: Tree = {}
    for text in overrides:
        overriding = merge(overriding, parse_override(text))
    file_method = tree.get("method", "fltac")
    merged = merge(tree, _preset(overriding["method"])) if "method" in overriding else merge(_preset(file_method), tree)
    method = overriding.get("method", file_method)
    per_method = _per_method(merge(tree, overriding).get("methods"))
    merged = merge(merge(merged, per_method.get(method) or {}), overriding)
    merged["methods"] = {}
    return _validated(merged)


def _per_method(tree: Any) -> Mapping[str, Tree]:
    """Checks the ``methods`` section, those of other methods included: a slip there would be found too late."""
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise InputError(f"methods: got {tree!r}; expected a mapping of method names to settings")
    for name, settings in tree.items():
        _preset(name)
        if not isinstance(settings, Mapping | None):
            raise InputError(f"methods.{name}: got {settings!r}; expected a mapping of sections")
        for key in ("method", "methods"):
            if key in (settings or {}):
                raise InputError(f"methods.{name}.{key}: not allowed there; allowed are the other sections")
        _refuse_unknown(settings, Config, f"methods.{name}.")
    return tree


def read_yaml(path: Path) -> Tree:
    """Raises InputError where the file is missing or not a YAML mapping."""
    if not path.is_file():
        raise InputError(f"config {path}: no such file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).split("\n")[0]
        raise InputError(f"config {path}: not YAML: {line}") from error
    if not isinstance(tree, dict):
        raise InputError(f"config {path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def to_yaml(config: Config) -> str:
    """The fully resolved configuration as YAML; reading it again gives the same configuration."""
    tree = config.model_dump(mode="json", exclude={"methods"})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _preset(method: Any) -> Tree:
    if not isinstance(method, str) or method not in PRESETS:
        near = difflib.get_close_matches(str(method), PRESETS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"method: got {method!r}; allowed are {', '.join(PRESETS)}{hint}")
    return PRESETS[method]


def _validated(tree: Tree) -> Config:
    _refuse_unknown(tree, Config, "")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        # Beside field names, pydantic puts the names of the types that it tried.
        key = ".".join(str(part) for part in first["loc"] if str(part).replace("_", "").isalnum()) or "config"
        message = first["msg"].removeprefix("Value error, ")
        value = first.get("input")
        shown = "" if isinstance(value, dict | Config | Section) else f" got {value!r};"
        raise InputError(f"{key}:{shown} {message[0].lower() + message[1:]}") from error


def _refuse_unknown(tree: Any, section: type[BaseModel], path: str) -> None:
    """Raises InputError for the first key that the section does not have, with the nearest name that it has."""
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        where = f"{path}{key}"
        if field is None:
            near = difflib.get_close_matches(str(key), section.model_fields, 1)
            hint = f"did you mean {path}{near[0]}?" if near else f"allowed are {', '.join(section.model_fields)}"
            raise InputError(f"{where}: unknown key; {hint}")
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            _refuse_unknown(value, inner, f"{where}.")
        elif key == "tasks" and isinstance(value, Mapping):
            for name, task in value.items():
                _refuse_unknown(task, TaskConfig, f"{where}.{name}.")
