"""Single steps computed by hand: the proximal term, and columns that are not trained."""

import pytest
import torch

from fltac.client.optimizer import LaneOptimizer
from fltac.config import TrainingConfig


def test_fedprox_pulls_back_to_what_was_received() -> None:
    """Two steps of SGD at rate 0.5 with gradient 1 and mu = 0.2: 3 - 0.5, then 2.5 - 0.5 (1 + 0.2 (2.5 - 3))."""
    config = TrainingConfig(optimizer="sgd", lr=0.5, prox=0.2, clip_norm=None)
    values = torch.tensor([[3.0]])
    optimizer = LaneOptimizer(config, values, [2])
    optimizer.step([0], values, torch.tensor([[1.0]]))
    assert values.item() == pytest.approx(2.5)
    optimizer.step([0], values, torch.tensor([[1.0]]))
    assert values.item() == pytest.approx(2.5 - 0.5 * (1.0 + 0.2 * (2.5 - 3.0)))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_columns_that_are_not_trained_stay_and_enter_no_norm(kind: str) -> None:
    config = TrainingConfig(optimizer=kind, lr=0.5, weight_decay=0.1, prox=0.3, clip_norm=1.0, momentum=0.5)  # type: ignore[arg-type]
    both, alone = torch.tensor([[1.0, 7.0, -2.0]]), torch.tensor([[1.0, -2.0]])
    optimizer = LaneOptimizer(config, both.clone(), [2], torch.tensor([1]))
    reference = LaneOptimizer(config, alone.clone(), [2])
    for _ in range(2):
        optimizer.step([0], both, torch.tensor([[3.0, 1000.0, 4.0]]))
        reference.step([0], alone, torch.tensor([[3.0, 4.0]]))
    assert both[0, 1].item() == 7.0
    torch.testing.assert_close(both[:, [0, 2]], alone)
    assert (both != torch.tensor([[1.0, 7.0, -2.0]]))[0].tolist() == [True, False, True]
