"""The worker pool that all multi-process tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_mics.testing import WorkerPool, get_pool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    with get_pool() as pool:
        yield pool
