"""The losses against sums written out with numpy."""

import numpy as np
import pytest
import torch

from fltac.client.client import LocalTask, label_shares
from fltac.client.losses import loss_of
from fltac.config import TrainingConfig
from fltac.config.training import Loss

LOGITS = np.array([[1.0, -1.0, 0.5], [0.2, 0.1, 2.0], [0.0, 0.0, 0.0]])
LABELS = np.array([0, 2, 1])
SHARES = np.array([0.5, 0.3, 0.2])


def cross_entropy(logits: np.ndarray) -> np.ndarray:
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(LABELS)), LABELS]


def test_plain_logit_adjusted_and_balanced() -> None:
    logits, labels = torch.from_numpy(LOGITS), torch.from_numpy(LABELS)
    assert float(loss_of(logits, labels)) == pytest.approx(cross_entropy(LOGITS).mean())
    adjusted = cross_entropy(LOGITS + np.log(SHARES)).mean()
    assert float(loss_of(logits, labels, "logit-adjusted", SHARES)) == pytest.approx(adjusted)
    balanced = (cross_entropy(LOGITS) / (3 * SHARES[LABELS])).mean()
    assert float(loss_of(logits, labels, "balanced", SHARES)) == pytest.approx(balanced)


@pytest.mark.parametrize("loss", ["plain", "logit-adjusted", "balanced"])
def test_batches_side_by_side_have_each_their_own_loss(loss: Loss) -> None:
    """Of each batch what it has alone; a batch that is not finite touches no other."""
    shares = [SHARES, SHARES[::-1].copy(), np.full(3, 1 / 3)]
    logits = torch.from_numpy(np.stack([LOGITS, 2 * LOGITS, np.full_like(LOGITS, np.nan)]))
    labels = torch.from_numpy(np.stack([LABELS, LABELS[::-1], LABELS]))
    found = loss_of(logits, labels, loss, np.stack(shares))
    assert found.shape == (3,)
    for number in range(2):
        alone = loss_of(logits[number], labels[number], loss, shares[number])
        assert float(found[number]) == pytest.approx(float(alone))
    assert not torch.isfinite(found[2])
    squared = loss_of(logits[:2, :, :1], labels[:2].double())
    assert squared.tolist() == pytest.approx(((logits[:2, :, 0] - labels[:2]) ** 2).mean(1).tolist())


def test_a_slots_shares_have_one_row_more_of_each_class() -> None:
    class Train:
        labels = np.array([0, 0, 0, 1, 1, 2])

    class Task:
        train, outputs = Train(), 3

    local = LocalTask(Task(), np.array([0, 1, 3]), "3", 1)  # type: ignore[arg-type]
    assert label_shares(local, TrainingConfig(loss="plain")) is None
    found = label_shares(local, TrainingConfig(loss="balanced"))
    assert found is not None
    assert found.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    Train.labels = np.array([0.5, 1.5], dtype=np.float32)  # type: ignore[assignment]
    assert label_shares(LocalTask(Task(), np.array([0]), "1", 1), TrainingConfig(loss="balanced")) is None  # type: ignore[arg-type]
