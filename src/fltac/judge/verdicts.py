"""Verdicts that are there already: in a run's own file, and in a cache that all runs share."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fltac.errors import InputError
from fltac.judge.rubric import VERSION, BadVerdictError, Item, Verdict, read_verdict
from fltac.paths import cache_folder


def key_of(item: Item, model: str) -> str:
    """What a verdict is known by: SHA-256 of prompt, reference, answer, judge and rubric."""
    told = [item.prompt, item.reference, item.answer, model, VERSION]
    return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def cached(key: str) -> Verdict | None:
    """A verdict from the cache; a damaged file counts as none."""
    try:
        return read_verdict(_file(key).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, BadVerdictError):
        return None


def keep(key: str, verdict: Verdict) -> None:
    """Puts a verdict into the cache in one piece; a cache that cannot be written costs a verdict asked twice."""
    path = _file(key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"score": verdict.score, "reason": verdict.reason}, file)
        Path(name).replace(path)


def _file(key: str) -> Path:
    return cache_folder() / "judge" / key[:2] / f"{key}.json"


class VerdictFile:
    """A run's verdicts, one a line, each on the disk before the next is asked for; none is ever removed."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line torn by a kill is cut off.

        Raises:
            InputError: another line is no verdict.
        """
        self._path = path
        self._known: dict[str, Verdict] = {}
        self._lines: set[str] = set()
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                tree = json.loads(line)
                self._note(tree, read_verdict(json.dumps({"score": tree["score"], "reason": tree["reason"]})))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}: line {number} is no verdict; move the file away to judge anew") from error

    def verdict(self, key: str) -> Verdict | None:
        """A verdict by its key."""
        return self._known.get(key)

    def add(self, key: str, verdict: Verdict, where: Mapping[str, object]) -> None:
        """Adds a line, unless there is one for this place already.

        Args:
            key: The verdict's.
            verdict: The verdict.
            where: Which answer it is of.
        """
        tree = {**where, "score": verdict.score, "reason": verdict.reason, "rubric": VERSION, "key": key}
        if _place(tree) in self._lines:
            return
        with self._path.open("ab") as file:
            file.write((json.dumps(tree, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        self._note(tree, verdict)

    def _note(self, tree: dict[str, Any], verdict: Verdict) -> None:
        self._known[str(tree["key"])] = verdict
        self._lines.add(_place(tree))


def _place(tree: Mapping[str, Any]) -> str:
    """What a line is about: everything but what was found."""
    return json.dumps({name: tree[name] for name in sorted(tree) if name not in ("score", "reason")})
