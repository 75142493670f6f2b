"""What a run's adapters write to held-out prompts: ``generations.jsonl``, scored against the references."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fltac.config.answers import GenerationConfig
from fltac.data.encoded import EncodedTask
from fltac.data.instruct import InstructEncoder, instruct_encoder, raw_rows
from fltac.data.loading import RawSplit, load_rows
from fltac.data.prompts import prompt_of
from fltac.data.tasks import resolve_task
from fltac.data.text_scores import rouge_l, token_f1
from fltac.errors import InputError
from fltac.evaluation import digest, evaluation_rows
from fltac.model.generate import Sampling, generate
from fltac.records import Adapter, ServerState
from fltac.runtime.export import adapter_folders
from fltac.runtime.loop import Record
from fltac.runtime.progress import Progress
from fltac.runtime.run_directory import RunDirectory
from fltac.runtime.setup import Experiment, backbone_folder
from fltac.seeding import generator
from fltac.server.sending import Outbox

UNTRAINED = "v0"
"""Stands for the adapter of slots that have no cluster."""


@dataclass(frozen=True)
class Answer:
    """A line of ``generations.jsonl``.

    Attributes:
        task: The task's name.
        adapter: The folder's name under ``adapters``; ``v0`` where slots have no cluster. Where a slot is sent
            something else than its cluster's adapter (a B of its own, a smaller rank), for whom that is as well.
        clients: How many of the task's clients received this adapter.
        row: The row's number in its file or split, from 0.
        prompt: As the model read it, unless it had to be cut.
        prompt_cut: How many tokens of it the model did not read, since the answer had to fit behind it.
        reference: The row's own response.
        answer: What was written.
        rouge_l: From 0 to 1.
        token_f1: From 0 to 1.
    """

    task: str
    adapter: str
    clients: int
    row: int
    prompt: str
    prompt_cut: int
    reference: str
    answer: str
    rouge_l: float
    token_f1: float


def answers_fingerprint(opened: RunDirectory, state: ServerState, settings: GenerationConfig) -> str:
    """Of all that the answers depend on: the run, the adapters, and how they are written."""
    adapters = [(cluster.id, digest(cluster.adapter).hex(), cluster.members) for cluster in state.clusters]
    own = [(key, digest(tensors).hex()) for key, tensors in sorted(state.own.items())]
    manifest = (opened.manifest() or {}).get("fingerprints")
    told = [settings.model_dump(mode="json"), state.round_number, digest(state.initial).hex(), adapters, own, manifest]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def write_answers(
    experiment: Experiment, state: ServerState, settings: GenerationConfig, progress: Progress
) -> list[Answer]:
    """Has every adapter answer held-out prompts of the tasks whose clients received it.

    Raises:
        InputError: the tasks are no causal-lm tasks, or there is no room for answers.
    """
    config, out = experiment.config, []
    if experiment.backbone.kind != "causal-lm":
        raise InputError("evaluation.generation: only causal-lm tasks have something to write")
    folder = backbone_folder(config)
    for name, task in experiment.tasks.items():
        resolved = resolve_task(name, config.tasks[name], config.data_root)
        encoder = instruct_encoder(config.backbone, folder, resolved)
        split = _chosen(task, load_rows(resolved, config.federation.seed).validation, settings, config.federation.seed)
        answers = _task_answers(experiment, state, name, encoder, split, settings)
        cut = len({answer.row for answer in answers if answer.prompt_cut})
        progress.message(f"{name}: answers to {len(split.rows)} held-out prompts, of which {cut} had to be cut")
        out += answers
    return out


def _chosen(task: EncodedTask, split: RawSplit, settings: GenerationConfig, seed: int) -> RawSplit:
    """The rows whose prompts are answered, in the order of the data."""
    used = np.sort(evaluation_rows(task, settings.max_rows, seed))
    rows = used if task.validation.raw_rows is None else task.validation.raw_rows[used]
    data = split.data.select(rows)
    return RawSplit(split.task, split.name, data, split.labels[rows], split.rows[rows], split.folder)


def _task_answers(
    experiment: Experiment,
    state: ServerState,
    name: str,
    encoder: InstructEncoder,
    split: RawSplit,
    settings: GenerationConfig,
) -> list[Answer]:
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    texts = [row for rows in raw_rows(split) for row in rows]
    fitted = encoder.prompts(split, settings.max_new_tokens)
    prompts = [tokens for tokens, _ in fitted]
    by_length = np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist()
    model, out = experiment.model, []
    for sent in sent_adapters(experiment, state, name):
        model.load([sent.adapter])
        written: dict[int, str] = {}
        for start in range(0, len(prompts), settings.batch_size):
            part = by_length[start : start + settings.batch_size]
            draws = [generator(settings.seed, "generation", client=name, slot=int(split.rows[row])) for row in part]
            answers = generate(model, [prompts[row] for row in part], sampling, encoder.end, draws)
            for row, tokens in zip(part, answers, strict=True):
                written[row] = str(encoder.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        for row, text in enumerate(texts):
            prompt = prompt_of(text, split.task, encoder.tokenizer).text
            scores = (rouge_l(written[row], text["response"]), token_f1(written[row], text["response"]))
            place = int(split.rows[row])
            told = (prompt, fitted[row][1], text["response"], written[row])
            out.append(Answer(name, sent.name, sent.clients, place, *told, *scores))
    return out


@dataclass(frozen=True)
class Sent:
    """An adapter that some of a task's clients were sent, what it is called, and how many of them they are."""

    adapter: Adapter
    name: str
    clients: int


def sent_adapters(experiment: Experiment, state: ServerState, task: str) -> list[Sent]:
    """What the task's clients were sent after the last round, each once: v0 first, then by cluster."""
    outbox, folders = Outbox(state, experiment.config.server_settings), adapter_folders(state)
    whole = {cluster.id: cluster.adapter for cluster in state.clusters}
    found: dict[tuple[int, int], Sent] = {}
    for holding in experiment.holdings:
        if holding.task != task:
            continue
        cluster, adapter = outbox.cluster(holding.key), outbox.of(holding.key)
        name = UNTRAINED if cluster is None else folders[cluster, ""]
        if adapter is not (state.initial if cluster is None else whole[cluster]):
            name += f" for {holding.client}/{holding.slot}"
        # Equal ones are the same object, which the outbox keeps.
        place = -1 if cluster is None else cluster, id(adapter)
        before = found.get(place, Sent(adapter, name, 0))
        found[place] = Sent(adapter, before.name, before.clients + 1)
    return [found[place] for place in sorted(found, key=lambda place: place[0])]


def answer_scores(answers: Sequence[Answer], **more: Sequence[float]) -> Record:
    """By task the mean of each score over clients, each with the adapter that it received, and the number of prompts.

    Args:
        answers: Of all tasks.
        **more: Further scores, one for each answer.
    """
    scores = {"rouge_l": [item.rouge_l for item in answers], "token_f1": [item.token_f1 for item in answers], **more}
    out: Record = {}
    for name in dict.fromkeys(item.task for item in answers):
        chosen = [index for index, item in enumerate(answers) if item.task == name]
        weights = [answers[index].clients for index in chosen]
        means = {
            score: float(np.average([values[index] for index in chosen], weights=weights))
            for score, values in scores.items()
        }
        cut = {answers[index].row for index in chosen if answers[index].prompt_cut}
        out[name] = {**means, "n": len({answers[index].row for index in chosen}), "prompts_cut": len(cut)}
    return out


def answer_lines(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """As they stand in the file."""
    return [asdict(item) for item in answers]
