"""Where the files that a config names lie on this machine. Configs and run directories keep paths as given."""

import importlib.util
import os
import re
from pathlib import Path

from fltac.errors import InputError

PACKAGE = "package:"
BUILTIN = "builtin:"


def expand(text: str, key: str) -> str:
    """Expands ``${VAR}`` and a leading ``~``.

    Args:
        text: The path as given.
        key: The config key it stands under, for the error.

    Raises:
        InputError: a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise InputError(f"{key}: {text!r} uses the environment variable {name}, which is not set")
        return os.environ[name]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, text))  # noqa: PTH111 (hub ids pass through here)


def resolve(name: str, key: str) -> str:
    """A folder for ``package:<import name>/<folder>``; anything else (local path or hub id) expanded.

    Raises:
        InputError: the package is not installed or has no such folder.
    """
    if not name.startswith(PACKAGE):
        return expand(name, key)
    package, _, inside = name[len(PACKAGE) :].partition("/")
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{key}: {name!r}: the Python package {package!r} is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.exists():
        raise InputError(f"{key}: {name!r}: the package {package!r} has no {inside!r}")
    return str(folder)


def cache_folder() -> Path:
    """``FLTAC_CACHE``, else ``~/.cache/fltac``; created if missing. Raises InputError where it cannot be made."""
    folder = Path(os.environ.get("FLTAC_CACHE") or Path.home() / ".cache" / "fltac")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"FLTAC_CACHE: {folder} cannot be made: {error.strerror or error}") from error
    return folder
