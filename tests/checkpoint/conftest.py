from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_tools import save_new

from lightning_mics.testing import WorkerPool


@pytest.fixture
def saved(pool: WorkerPool, tmp_path: Path) -> Path:
    pool.run(save_new, str(tmp_path / "saved.ckpt"), 1, world_size=2)
    return tmp_path / "saved.ckpt"
