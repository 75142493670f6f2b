"""The part of ``fltac evaluate`` that concerns a language model's answers: written, kept, judged, gone on with."""

import os
from pathlib import Path

from fltac.config import EvaluationConfig
from fltac.config.answers import GenerationConfig, JudgeConfig
from fltac.errors import InputError
from fltac.judge.endpoint import Endpoint
from fltac.judge.panel import judge
from fltac.judge.rubric import VERSION, Item
from fltac.judge.verdicts import VerdictFile
from fltac.records import ServerState
from fltac.runtime.answers import Answer, answer_lines, answer_scores, answers_fingerprint, write_answers
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.loop import Record
from fltac.runtime.progress import Progress
from fltac.runtime.run_directory import GENERATIONS, VERDICTS, RunDirectory, open_existing
from fltac.runtime.setup import Experiment


def judge_key(config: JudgeConfig) -> str | None:
    """The judge's key from the environment, looked up before anything expensive.

    Raises:
        InputError: the variable is not set.
    """
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env)
    if not key:
        raise InputError(f"evaluation.judge.key_env: the environment variable {config.key_env} is not set")
    return key


def written_before(path: Path, settings: EvaluationConfig) -> Record | None:
    """The last evaluation, if it holds the answers that these settings would give; None if it has to be made."""
    opened, checkpoint = open_existing(path), latest_checkpoint(path)
    record = opened.evaluation()
    if record is None or checkpoint is None or settings.generation is None or not (path / GENERATIONS).is_file():
        return None
    made = record.get("generation")
    wanted = answers_fingerprint(opened, checkpoint.state, settings.generation)
    return record if isinstance(made, dict) and made.get("fingerprint") == wanted else None


def with_answers(
    opened: RunDirectory, experiment: Experiment, state: ServerState, settings: GenerationConfig, progress: Progress
) -> Record:
    """Has the adapters write answers, keeps them, and returns what an evaluation's record says of them."""
    answers = write_answers(experiment, state, settings, progress)
    opened.write_generations(answer_lines(answers))
    return {
        "settings": settings.model_dump(mode="json"),
        "fingerprint": answers_fingerprint(opened, state, settings),
        "tasks": answer_scores(answers),
    }


def with_verdicts(opened: RunDirectory, config: JudgeConfig, key: str | None, progress: Progress) -> Record:
    """Has the answers that are kept judged, and returns what an evaluation's record says of it.

    Raises:
        RunError: the judge cannot be had; the verdicts so far are kept.
    """
    try:
        answers = [Answer(**line) for line in opened.generations()]
    except TypeError as error:
        raise InputError(f"{opened.path / GENERATIONS}: a line is no answer") from error
    items = [Item(answer.prompt, answer.reference, answer.answer) for answer in answers]
    places = [
        {"task": answer.task, "adapter": answer.adapter, "row": answer.row, "model": config.model} for answer in answers
    ]
    endpoint = Endpoint(config, key)
    try:
        verdicts = judge(items, places, config, VerdictFile(opened.path / VERDICTS), endpoint, progress.message)
    finally:
        endpoint.close()
    scores = answer_scores(answers, judge=[verdict.score for verdict in verdicts])
    return {"model": config.model, "rubric": VERSION, "tasks": {name: task["judge"] for name, task in scores.items()}}
