"""On NCCL ranks training equals one process that sees the global batch, as it does on gloo."""

from __future__ import annotations

import pytest
import torch
from gpu_tools import NCCL, NEEDS_CARD
from parity import Case, check

from lightning_mics.testing import WorkerPool

pytestmark = NEEDS_CARD

LAYOUTS = {
    "p=1": (1, 4, {}),
    "p=2": (2, 4, {}),
    "p=4": (4, 4, {}),
    "p=4 on 2 nodes, two stages": (4, 2, {"hierarchical": True}),
    "p=4 on 2 nodes, flat": (4, 2, {"hierarchical": False}),
}
# By microstep, the block of each replica's rows; replicas differ, and no microstep uses all blocks.
ROUTES = {1: ((0, 1, -1, 2), (1, 1, 0, 0)), 2: ((0, 1), (2, 2)), 4: ((0,), (2,))}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_one_process(pool: WorkerPool, layout: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    shard, node, settings = LAYOUTS[layout]
    check(
        pool,
        [
            Case(
                model,
                world=4,
                shard=shard,
                node=node,
                accumulate=3,
                incomplete=True,
                optimizer=optimizer,
                clip=0.5,
                routes=ROUTES[shard] if model == "routed" else (),
                settings=tuple(settings.items()),
                steps=3,
            )
            for model, optimizer in [("uneven", "adamw"), ("frozen", "sgd"), ("routed", "sgd"), ("gpt2", "sgd")]
        ],
        backend=NCCL,
    )
