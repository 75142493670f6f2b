"""What a slot's rows are about, in one vector: the mean of what the frozen backbone makes of some of them.

It tells tasks apart before any adapter has learned anything. What leaves the client with it: on average, what its texts
or images are about. With n rows, replacing one of them moves the mean by at most 2 / n, so Gaussian noise of standard
deviation s on each number is that of the Gaussian mechanism with multiplier s n / 2.
"""

from collections.abc import Sequence

import numpy as np
import torch

from fltac.client.client import Client, LocalTask
from fltac.client.losses import row_keys
from fltac.config import Config
from fltac.model.lanes import LaneModel
from fltac.records import FloatArray
from fltac.seeding import generator


def profiles_of(model: LaneModel, client: Client, config: Config, noise_seed: int) -> dict[int, FloatArray]:
    """The profile of each slot.

    Args:
        model: The backbone with its lanes; its lanes are replaced.
        client: Whose slots.
        config: Gives the seed, the number of rows and the noise.
        noise_seed: Of the noise; whoever knows it can take the noise away again.

    Returns:
        By slot, float32 ``[hidden]``: the mean of features of length 1, over ``profile_rows`` of the training rows
        of each of its tasks (over tasks, too, where they share the slot), with noise.
    """
    rule = config.server.clustering
    # No product changes anything, so that these are the frozen backbone's features.
    model.load([{name: np.zeros(shape, dtype=np.float32) for name, shape in model.body_shapes.items()}])
    out = {}
    for slot, tasks in sorted(client.slots.items()):
        means = [_mean_feature(model, local, config, client.id, slot + index) for index, local in enumerate(tasks)]
        mean = np.mean(means, axis=0)
        noise = generator(noise_seed, "profile-noise", client=client.id, slot=slot)
        out[slot] = (mean + noise.normal(0.0, rule.profile_noise, mean.shape)).astype(np.float32)
    return out


def multiplier(tasks: Sequence[LocalTask], config: Config) -> float:
    """Of the Gaussian mechanism that a slot's profile is: the noise over how far one replaced row moves the mean."""
    rule = config.server.clustering
    fewest = min(min(len(local.rows), rule.profile_rows) for local in tasks)
    return rule.profile_noise * fewest * len(tasks) / 2


@torch.no_grad()
def _mean_feature(model: LaneModel, local: LocalTask, config: Config, client: str, number: int) -> FloatArray:
    """Over seeded training rows of one task, the shortest first: float64 ``[hidden]``."""
    train, batch = local.task.train, config.evaluation.batch_size
    draw = generator(config.federation.seed, "profile-rows", client=client, slot=number)
    rows = draw.permutation(local.rows)[: config.server.clustering.profile_rows]
    rows = rows[np.argsort(train.lengths[rows], kind="stable")]
    total = np.zeros(model.backbone.hidden)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        keys = row_keys(train, part) if model.prefix else []
        features = model.features(model.stack([train.batch(part)]), 1, keys).double()
        total = total + torch.nn.functional.normalize(features, dim=-1).sum(dim=0).cpu().numpy()
    return np.asarray(total / len(rows))
