"""What tests of tables and figures share."""

from pathlib import Path

import pytest

from reproduce.experiments import write_experiments


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path) -> Path:
    """The experiments' configs on tiny data, for each file anew."""
    return write_experiments(tmp_path_factory.mktemp("experiments"), tiny_vit)
