"""A data owner as the other end of a message: bytes of a question in, bytes of the answer out.

It runs the one client implementation on the owner's own rows. What leaves it are slot numbers, counts, adapters,
scores and, where the owner allows it, profiles; an error that it answers names client, slot and tensor, never a task, a
file or a value of the data.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fltac.client.assignment import choose
from fltac.client.client import head_shapes, plan_jobs, reply_of
from fltac.client.gradients import gradients, plan_gradients
from fltac.client.profile import multiplier, profiles_of
from fltac.client.training import TrainJob, train
from fltac.config import Config, load_config
from fltac.config.client_file import load_client_file
from fltac.config.loading import parse_yaml
from fltac.config.metrics import HIGHEST_LOSS
from fltac.errors import InputError
from fltac.evaluation import evaluation_rows, measure, with_head
from fltac.records import Adapter, FloatArray, Reply, Request
from fltac.runtime.owner import Owner, load_owner
from fltac.runtime.profile_noise import noise_seed
from fltac.runtime.received import received_fault
from fltac.wire.blob import WireError
from fltac.wire.node_protocol import (
    Answer,
    HelloQuestion,
    NodeHello,
    Question,
    Scores,
    SlotScore,
    TrainQuestion,
    decode_question,
    encode_answer,
)

log = logging.getLogger("fltac.node")
"""The owner's own log: unlike the answers, it may name the owner's files."""

LONGEST_CONFIG = 2**20
"""Characters of a coordinator's config that are read."""

UNUSABLE = "its client file, its data or the config cannot be used here; its own log says why"


class NodeFault(ValueError):
    """Why a question cannot be answered, in words that may leave the machine."""


class Node:
    """Answers questions about one client file.

    Not for several threads at once. The first adapter v0 is kept once it was received, for later requests without it.
    """

    def __init__(self, config: Config, client_file: Path, owner: Owner) -> None:
        self._config, self._path = config, client_file
        self._owner: Owner | None = owner
        self._id = owner.client.id
        self._limit = owner.file.limits.message_mb * 2**20
        self._initial: Adapter | None = None

    @classmethod
    def open(cls, config: Config, client_file: Path) -> "Node":
        """Loads everything.

        Args:
            config: The coordinator's experiment: backbone, lora, training, wire and seed count here.
            client_file: The owner's ``client.yaml``.

        Raises:
            InputError: the file, its data or the backbone is wrong, or the method cannot be federated.
        """
        return cls(config, client_file, load_owner(config, client_file))

    @property
    def id(self) -> str:
        """The client's id, as last read."""
        return self._id

    def answer(self, payload: bytes) -> bytes:
        """Answers a question of ``fltac.wire.node_protocol``; never raises.

        The client file is read again, with all that hangs on it, if it or the data have changed since. Adapters that
        came out not finite are sent as they are: the server names them and leaves them out, the other slots count.

        Returns:
            The encoded answer; a reply with an error where there is none.
        """
        try:
            return encode_answer(self._answer(decode_question(payload, self._limit)), self._config.wire_dtype)
        except (NodeFault, WireError) as error:
            return self._error(str(error))
        except InputError as error:
            log.error("%s", error)
            return self._error(UNUSABLE)
        except Exception as error:
            # The model may be left in the middle of something, so it is loaded anew for the next question.
            self._owner = None
            log.exception("a question could not be answered")
            return self._error(f"failed with {type(error).__name__}; its own log says where")

    def _error(self, reason: str) -> bytes:
        log.warning("client %s answers with an error: %s", self._id, reason)
        return error_answer(self._id, reason)

    def _answer(self, question: Question) -> Answer:
        owner = self._current()
        torch.set_num_threads(owner.threads)
        if isinstance(question, HelloQuestion):
            return hello(owner)
        request = question.request
        if request.client != owner.client.id:
            raise NodeFault(f"the request is for client {request.client!r}; this is {owner.client.id!r}")
        if request.initial is not None:
            self._initial = request.initial
        if isinstance(question, TrainQuestion):
            config = owner.config
            request = chosen(owner, request, self._initial)
            jobs = owner_jobs(owner, request, self._initial)
            profiles = allowed_profiles(owner) if request.profile else {}
            asked = plan_gradients(owner.client, request, self._initial or {}, config)
            seen = gradients(owner.model, asked, config.training, owner.plan)
            trained = train(owner.model, jobs, config.training, config.lora.dropout, owner.plan)
            return reply_of(owner.client, trained, request, profiles, {one.slot: one.directions for one in seen})
        return scores(owner, owner_jobs(owner, request, self._initial), question.max_rows)

    def _current(self) -> Owner:
        if self._owner is None or self._owner.file.stamp() != self._owner.stamp:
            self._owner = None  # So that the old model is gone before the new one comes.
            self._owner = load_owner(self._config, self._path)
            self._id = self._owner.client.id
            self._limit = self._owner.file.limits.message_mb * 2**20
        return self._owner


class StandingNode:
    """A node that is opened at the first question; what is wrong with its files is answered, not raised."""

    def __init__(self, config_text: str, client_file: Path) -> None:
        """Notes what to open.

        Args:
            config_text: The coordinator's experiment config as YAML.
            client_file: The owner's ``client.yaml``.
        """
        self._config_text, self._path = config_text, client_file
        self._node: Node | None = None

    def answer(self, payload: bytes) -> bytes:
        """As ``Node.answer``."""
        try:
            if self._node is None:
                self._node = Node.open(_config(self._config_text), self._path)
        except InputError as error:
            log.error("%s", error)
            return error_answer(self._id(), UNUSABLE)
        except Exception as error:
            log.exception("the client file could not be opened")
            return error_answer(self._id(), f"failed with {type(error).__name__}; its own log says where")
        return self._node.answer(payload)

    def _id(self) -> str:
        """The client's id, so that an error can name it; nothing where even that cannot be read."""
        try:
            return load_client_file(self._path).id
        except InputError:
            return ""


def _config(text: str) -> Config:
    if len(text) > LONGEST_CONFIG:
        raise InputError(f"the coordinator's config: {len(text)} characters; allowed are {LONGEST_CONFIG}")
    return load_config(parse_yaml(text, "the coordinator's config"))


def error_answer(client: str, reason: str) -> bytes:
    """The answer to a question that cannot be answered."""
    return encode_answer(Reply(client, error=reason))


def hello(owner: Owner) -> NodeHello:
    """What an owner says about itself."""
    hidden = owner.backbone.hidden
    slots = owner.client.slots
    return NodeHello(
        client=owner.client.id,
        examples={slot: sum(len(local.rows) for local in tasks) for slot, tasks in slots.items()},
        heads={slot: head_shapes(tasks, hidden) for slot, tasks in slots.items()},
        backbone=owner.backbone.fingerprint,
        tokenizer=next(iter(owner.tasks.values())).encoder,
        body_shapes=owner.model.body_shapes,
    )


def allowed_profiles(owner: Owner) -> dict[int, FloatArray]:
    """Of those slots whose profiles the owner's limits allow; the server groups all others by their adapters alone."""
    limits, config = owner.file.limits, owner.config
    if not limits.profile or not config.server.clustering.profile_rows:
        log.info(
            "the coordinator asks for profiles, which limits.profile of the client file or the config do not allow"
        )
        return {}
    slots = {}
    for slot, tasks in owner.client.slots.items():
        found = multiplier(tasks, config)
        if found >= limits.profile_multiplier:
            slots[slot] = tasks
        else:
            least = limits.profile_multiplier
            log.info(
                "slot %d: its profile would have multiplier %.3g; limits.profile_multiplier: %g", slot, found, least
            )
    return profiles_of(owner.model, replace(owner.client, slots=slots), config, noise_seed(owner))


def chosen(owner: Owner, request: Request, initial: Adapter | None) -> Request:
    """The request, each slot pointing at the cluster that it chose where the owner is to choose.

    Raises:
        NodeFault: a candidate does not fit this owner's model, or there is none where the rule needs them.
    """
    if owner.config.server.clustering.rule == "ifca" and not request.candidates:
        raise NodeFault("the request brings no clusters to choose from, which the rule ifca needs")
    for cluster in request.candidates:
        for slot, tasks in owner.client.slots.items():
            heads = head_shapes(tasks, owner.backbone.hidden)
            fault = received_fault(replace(request, slots={slot: cluster}), initial, slot, heads, owner)
            if fault is not None:
                raise NodeFault(f"slot {slot}: cluster {cluster}: {fault}")
    return choose(owner.model, owner.client, request, initial or {}, owner.config)


def owner_jobs(owner: Owner, request: Request, initial: Adapter | None) -> list[TrainJob]:
    """One training for each slot.

    Args:
        owner: Whose.
        request: For this owner.
        initial: v0, if it has been received; needed by slots without a cluster and for heads that a cluster lacks.

    Raises:
        NodeFault: what was received does not fit this owner's model.
    """
    for slot, tasks in owner.client.slots.items():
        fault = received_fault(request, initial, slot, head_shapes(tasks, owner.backbone.hidden), owner)
        if fault is not None:
            raise NodeFault(f"slot {slot}: {fault}")
    return plan_jobs(owner.client, request, initial or {}, owner.config)


def scores(owner: Owner, jobs: list[TrainJob], max_rows: int | None) -> Scores:
    """Scores what each slot starts from on its own validation rows; a shared slot gets the mean over its tasks."""
    config, out = owner.config, {}
    for job in jobs:
        found, rows = [], 0
        for local in owner.client.slots[job.slot]:
            task = local.task
            chosen = evaluation_rows(task, max_rows, config.federation.seed)
            adapter = with_head(job.start, job.start, local.head_key)
            measured = measure(owner.model, adapter, local.head_key, task, chosen, config.evaluation.batch_size)
            # A correlation may be above 1 by rounding, and a loss be anything.
            found.append(float(np.clip(np.nan_to_num(measured[task.metric], nan=HIGHEST_LOSS), -1.0, HIGHEST_LOSS)))
            rows += len(chosen)
        out[job.slot] = SlotScore(float(np.mean(found)), rows)
    return Scores(owner.client.id, out)
