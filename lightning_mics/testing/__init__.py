"""Multi-process tests without a spawn per test: a persistent pool of workers, and parity helpers.

A worker takes seconds to start and a tenth of a second to run another test, so one pool serves a whole test session and
every world size up to its own. Workers are forked from a server that has imported the heavy modules once.
"""

from lightning_mics.testing.parity import (
    assert_parity,
    full_state_dict,
    relative_difference,
    shard_batch,
    weight_differences,
)
from lightning_mics.testing.pool import PRELOAD, WorkerError, WorkerPool, get_pool
from lightning_mics.testing.worker import Failure, pretended_host, worker_device

__all__ = [
    "PRELOAD",
    "Failure",
    "WorkerError",
    "WorkerPool",
    "assert_parity",
    "full_state_dict",
    "get_pool",
    "pretended_host",
    "relative_difference",
    "shard_batch",
    "weight_differences",
    "worker_device",
]
