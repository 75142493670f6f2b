"""What a slot's task would change first: the gradients of A at the bare backbone, before anything is trained.

With A = 0 and B random the adapter changes nothing, and the gradient of A is that of the backbone's own weight, seen
through the random directions of B: ``B^T dL/dW``. It says which inputs of a layer the task reads. Of the gradients of a
few batches the client sends the leading directions of their second moment, for each adapted matrix: no sign, no order
and no size. B's random numbers are the same for all clients, and so is what they compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fltac.client.client import Client, draw_steps, start_adapter
from fltac.client.losses import lane_losses
from fltac.client.memory import give_back
from fltac.client.schedule import POOL, LanePlan
from fltac.client.training import OnPass, TrainJob, no_report, over_pools, passes_of
from fltac.config import GRADIENT_DIRECTIONS, Config, TrainingConfig
from fltac.model.lanes import LaneModel
from fltac.records import LORA_A, LORA_B, Adapter, FloatArray, Request, is_head
from fltac.seeding import derive, generator

OUTPUTS = 4
"""Random directions of a layer's output through which its gradients are seen: the rank of these adapters."""
ROOM = 2**26
"""Numbers in memory together: each slot has OUTPUTS times A's inputs for each batch."""


@dataclass(frozen=True)
class Gradients:
    """Of one slot: for each ``.lora_A`` float32 ``[GRADIENT_DIRECTIONS, in]``, of length 1 in all."""

    client: str
    slot: int
    directions: Adapter


def plan_gradients(client: Client, request: Request, initial: Adapter, config: Config) -> list[TrainJob]:
    """What gradients are asked for: of each slot that begins from v0; none where the request does not ask.

    Args:
        client: Whose slots.
        request: From the server.
        initial: v0, from this request or kept from an earlier one: names, inputs and heads.
        config: Gives the seed, and how many batches.
    """
    if not request.gradients:
        return []
    seed, number = derive(config.federation.seed, "gradients"), request.round_number
    factors, jobs = _factors(initial, config.federation.seed), []
    for slot, tasks in sorted(client.slots.items()):
        if slot in request.slots:
            continue
        start = start_adapter(request, slot, [task.head_key for task in tasks], initial)
        count = config.server.clustering.gradient_batches
        jobs.append(
            TrainJob(
                client=client.id,
                slot=slot,
                start={name: tensor for name, tensor in start.items() if is_head(name)} | factors,
                steps=draw_steps(client.id, slot, tasks, number, config.training, seed=seed, count=count),
                examples=sum(len(task.rows) for task in tasks),
                dropout_seed=seed,
            )
        )
    return jobs


def _factors(initial: Adapter, seed: int) -> dict[str, FloatArray]:
    """A zero, and B from N(0, 1 / out): of rank OUTPUTS, and the same for all clients."""
    draw, out = generator(seed, "gradient-outputs"), {}
    for name, tensor in sorted(initial.items()):
        if is_head(name):
            continue
        if name.endswith(LORA_A):
            out[name] = np.zeros((OUTPUTS, tensor.shape[1]), dtype=np.float32)
        elif name.endswith(LORA_B):
            outputs = len(tensor)
            out[name] = draw.normal(0.0, outputs**-0.5, (outputs, OUTPUTS)).astype(np.float32)
    return out


def gradients(
    model: LaneModel, jobs: Sequence[TrainJob], config: TrainingConfig, plan: LanePlan, on_pass: OnPass = no_report
) -> list[Gradients]:
    """Makes the gradients of all jobs, in lanes as trainings are.

    Args:
        model: The backbone with its lanes, which are left as they are.
        jobs: From :func:`plan_gradients`, in any order.
        config: The ``training`` section; of it the loss counts.
        plan: How large a pass may be.
        on_pass: Called after each pass.

    Returns:
        One result for each job.
    """
    if not jobs:
        return []

    def made(own: LaneModel, pool: Sequence[TrainJob], watched: OnPass) -> list[Gradients]:
        return _of_pool(own, pool, config, plan, watched)

    seen = model.twin(OUTPUTS)
    each = sum(OUTPUTS * shape[1] for name, shape in seen.body_shapes.items() if name.endswith(LORA_A))
    size = min(POOL, max(1, ROOM // (each * max(len(job.steps) for job in jobs))))
    found = over_pools(seen, jobs, plan, made, on_pass, size)
    return sorted((one for done in found for one in done), key=lambda one: (one.client, one.slot))


def _of_pool(
    model: LaneModel, pool: Sequence[TrainJob], config: TrainingConfig, plan: LanePlan, on_pass: OnPass
) -> list[Gradients]:
    passes = passes_of(pool, plan)
    model.load([job.start for job in pool], max(map(len, passes)))
    columns = model.columns(lambda name: name.endswith(LORA_A))
    assert columns is not None, "without factors there is nothing to make gradients of"
    seen: list[list[FloatArray]] = [[] for _ in pool]
    for made, numbers in enumerate(passes, start=1):
        model.activate(numbers)
        losses = lane_losses(model, [pool[number].steps[len(seen[number])] for number in numbers], config.loss)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        rows = model.gradients[: len(numbers)][:, columns].to("cpu", torch.float32).numpy()
        model.gradients.zero_()
        for number, row in zip(numbers, rows, strict=True):
            seen[number].append(row)
        on_pass(len(numbers), losses.detach())
        if model.packs:
            give_back(made)
    inputs = {name: part.shape[1] for name, part in model.parts(0).items() if name.endswith(LORA_A)}
    ends = np.cumsum([OUTPUTS * size for size in inputs.values()])[:-1]
    out = []
    for job, batches in zip(pool, seen, strict=True):
        parts = np.split(np.stack(batches), ends, axis=1)
        found = {
            name: leading_directions(part.reshape(-1, size))
            for (name, size), part in zip(inputs.items(), parts, strict=True)
        }
        out.append(Gradients(job.client, job.slot, found))
    return out


def leading_directions(rows: FloatArray, count: int = GRADIENT_DIRECTIONS) -> FloatArray:
    """The best approximation ``F^T F`` of that rank of the second moment ``X^T X``, scaled to length 1.

    Args:
        rows: X, float32 ``[n, in]``.
        count: Rows of F.

    Returns:
        F, float32 ``[count, in]``, the largest first, with zeros where there are fewer directions; all zero for zeros.
    """
    exact: NDArray[np.float64] = rows.astype(np.float64)
    turns = np.linalg.eigh(exact @ exact.T)[1][:, ::-1][:, :count].T
    found = np.zeros((count, rows.shape[1]))
    found[: len(turns)] = turns @ exact
    length = np.linalg.norm(found)
    return np.asarray(found / length if length > 0 else found, dtype=np.float32)
