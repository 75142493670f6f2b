"""Where a result comes from: versions, commit, hardware and command line; no host name, no absolute path."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "fltac",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "scikit-learn",
    "scipy",
    "numpy",
)


SECRET = re.compile(r"token|secret|password|credential|api-?key", re.IGNORECASE)
"""In the name of an option whose value is kept out of every file; Flower hands a ServerApp a token so."""
HIDDEN = "(hidden)"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on; None where one is not installed."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}


def package_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def code_state() -> dict[str, str | bool] | None:
    """:func:`git_state` of this package, asked once in a process: what is committed later is not the code that runs."""
    return git_state()


def git_state(folder: Path | None = None) -> dict[str, str | bool] | None:
    """The commit that a folder (default: this package's own) is checked out from, and whether the folder was changed.

    Changes elsewhere in the checkout do not count: results of an earlier run are being replaced there.

    Returns:
        ``{"commit": <40 hex digits>, "dirty": bool}``; None where git is missing, nothing is committed yet,
        or the folder is not tracked, as an installed copy inside somebody else's checkout is not.
    """
    folder = folder or Path(__file__).resolve().parents[1]
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit or not _git(folder, "ls-files", "."):
        return None
    return {
        "commit": commit.strip(),
        "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no", ".")),
    }


def hardware(gpu: str | None = None) -> dict[str, str | int | None]:
    """Processor model, cores this process may use, memory in bytes, the accelerator's name as passed in."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_bytes": memory_bytes,
        "gpu": gpu,
        "os": platform.system(),
    }


def command_line(arguments: Sequence[str] | None = None) -> list[str]:
    """The command as given, but for credentials, and with absolute paths (also after ``=``) cut to their last part."""
    out: list[str] = []
    for argument in sys.argv if arguments is None else arguments:
        key, sign, _ = argument.partition("=")
        if out and SECRET.search(out[-1]) and out[-1].startswith("-") and "=" not in out[-1]:
            out.append(HIDDEN)
        elif sign and SECRET.search(key):
            out.append(key + sign + HIDDEN)
        else:
            out.append(_without_folder(argument))
    return out


def _without_folder(argument: str) -> str:
    key, sign, value = argument.rpartition("=")
    return key + sign + (Path(value).name if Path(value).is_absolute() else value)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()
