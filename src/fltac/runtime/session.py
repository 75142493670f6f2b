"""A run's beginning, its continuation and what it keeps after each round, whatever carries its messages."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fltac.errors import InputError
from fltac.records import ServerState
from fltac.runtime.checkpoint import latest_checkpoint, save_checkpoint
from fltac.runtime.loop import Record
from fltac.runtime.progress import Progress
from fltac.runtime.run_directory import RunDirectory


def last_state(opened: RunDirectory) -> ServerState | None:
    """The state of a run's last finished round, with its records cut back to it; None before the first checkpoint.

    Raises:
        InputError: the checkpoint is damaged, or the records do not fit it.
    """
    checkpoint = latest_checkpoint(opened.path)
    if checkpoint is None:
        if opened.rounds():
            raise InputError(f"{opened.path}: has records of rounds but no checkpoint; start a new run")
        return None
    opened.cut_rounds(checkpoint.state.round_number)
    _refuse_partial(opened)
    return checkpoint.state


def keep_first(directory: RunDirectory, state: ServerState) -> None:
    """Makes the state before the first round last."""
    save_checkpoint(directory.path, state, {}, directory.config.output.keep_checkpoints)


def keeper(directory: RunDirectory, progress: Progress) -> Callable[[ServerState, Record], None]:
    """What ``federate`` calls after each round: the record and the checkpoint are written, and progress is told."""

    def keep(state: ServerState, record: Record) -> None:
        # The record first: a kill between the two leaves a line too many, which resume cuts.
        directory.append_round(record)
        save_checkpoint(directory.path, state, {}, directory.config.output.keep_checkpoints)
        progress.round_finished(record)
        if not record["updates"] and record["rejected"]:
            progress.message(f"round {record['round']}: no update could be used: {record['rejections'][0]}")

    return keep


def refuse_changed(opened: RunDirectory, fingerprints: Mapping[str, str]) -> None:
    """Raises InputError where the config, the data or the backbone are not those that the run started with."""
    manifest = opened.manifest()
    if manifest is None:
        raise InputError(f"{opened.path}: its manifest.json is missing, so nobody knows what the run started with")
    stored = manifest.get("fingerprints")
    if not isinstance(stored, dict) or set(stored) != set(fingerprints):
        raise InputError(f"{opened.path}: its manifest.json is damaged: the fingerprints are not those of a run")
    for name, value in fingerprints.items():
        if stored[name] != value:
            raise InputError(
                f"{opened.path}: {name} has changed since this run started "
                f"(fingerprint {str(stored[name])[:12]}, now {value[:12]}); start a new run"
            )


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Holds a run directory for this process; the hold ends with the process, however that ends.

    Raises:
        InputError: another process holds it.
    """
    import fcntl  # Unix alone

    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path}: another process is working on this run") from error
        yield
    finally:
        os.close(descriptor)


def _refuse_partial(opened: RunDirectory) -> None:
    """Raises InputError, before anything is trained, where a record lacks what the summary is made of."""
    for record in opened.rounds():
        missing = {"bytes", "seconds", "tasks"} - record.keys()
        if missing:
            raise InputError(
                f"{opened.path}: the record of round {record['round']} has no {', '.join(sorted(missing))}"
            )
