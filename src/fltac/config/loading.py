"""From YAML and ``key=value`` overrides to a checked configuration, and back to YAML.

``load_config`` merges, from weakest to strongest: the defaults of the sections, the preset of the file's ``method``,
the file, the preset of a ``method=`` override, the file's ``methods.<method>`` section, the dotted overrides.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeGuard, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fltac.config.base import Section
from fltac.config.presets import PRESETS, Tree, merge
from fltac.config.sections import Config, EvaluationConfig
from fltac.errors import InputError

S = TypeVar("S", bound=Section)


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
    return validated(Config, merged)


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


def read_yaml(path: Path, what: str = "config") -> Tree:
    """The content of a YAML file.

    Args:
        path: The file.
        what: What the file is, for errors.

    Raises:
        InputError: the file is missing, cannot be read, or is not a YAML mapping.
    """
    name = f"{what} {path}"
    if not path.is_file():
        raise InputError(f"{name}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not YAML: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Tree:
    """A YAML text as a mapping; ``name`` says in errors whose text it is.

    Raises:
        InputError: it is not a YAML mapping.
    """
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that is none
        raise InputError(f"{name}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{name}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def to_yaml(config: Config) -> str:
    """The fully resolved configuration as YAML; reading it again gives the same configuration."""
    tree = config.model_dump(mode="json", exclude={"methods"})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def evaluation_settings(config: Config, overrides: Sequence[str]) -> EvaluationConfig:
    """A run's ``evaluation`` section with ``evaluation.key=value`` overrides: what may change after a run.

    Raises:
        InputError: an override is of another section, or wrong.
    """
    tree: Tree = {"evaluation": config.evaluation.model_dump(mode="json")}
    for text in overrides:
        parsed = parse_override(text)
        if set(parsed) != {"evaluation"}:
            raise InputError(
                f"override {text!r}: a run's settings are fixed; allowed are those of evaluation, "
                "such as evaluation.generation.max_rows=8"
            )
        tree = merge(tree, parsed)
    whole = {**config.model_dump(mode="json", exclude={"methods"}), **tree}
    return validated(Config, whole).evaluation


def _preset(method: Any) -> Tree:
    if not isinstance(method, str) or method not in PRESETS:
        near = difflib.get_close_matches(str(method), PRESETS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"method: got {method!r}; allowed are {', '.join(PRESETS)}{hint}")
    return PRESETS[method]


def validated(section: type[S], tree: Tree, whole: str = "config") -> S:
    """A tree of settings as a typed record.

    Args:
        section: The record's type.
        tree: Names to values.
        whole: How errors that concern no single key call the record.

    Raises:
        InputError: naming the key, its value and what is allowed; for an unknown key the nearest valid one.
    """
    _refuse_unknown(tree, section, "")
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        first, *rest = error.errors()
        key = _key(tree, first["loc"]) or whole
        message = first["msg"].removeprefix("Value error, ")
        # Where a value may be of several types, pydantic tells of each by itself.
        words = [item for item in rest if item["type"] == "literal_error" and _key(tree, item["loc"]) == key]
        message += "".join(f", or {item['ctx']['expected']}" for item in words)
        value = first.get("input")
        shown = "" if isinstance(value, dict | Section) else f" got {value!r};"
        raise InputError(f"{key}:{shown} {message[0].lower() + message[1:]}") from error


def _key(tree: Any, location: Sequence[int | str]) -> str:
    """A place in the tree, dotted, without the names of the types that pydantic tried on the value there."""
    parts = []
    for part in location:
        if not isinstance(tree, Mapping | list):
            break
        parts.append(str(part))
        tree = tree.get(part, {}) if isinstance(tree, Mapping) else {}
    return ".".join(parts)


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
        kind = _without_none(field.annotation)
        if _is_section(kind):
            _refuse_unknown(value, kind, f"{where}.")
        elif get_origin(kind) is dict and _is_section(get_args(kind)[1]) and isinstance(value, Mapping):
            for name, one in value.items():
                _refuse_unknown(one, get_args(kind)[1], f"{where}.{name}.")


def _without_none(kind: Any) -> Any:
    """The section of a setting that may be null; any other type as it is."""
    sections = [part for part in get_args(kind) if _is_section(part)]
    return sections[0] if len(sections) == 1 and get_origin(kind) is UnionType else kind


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
