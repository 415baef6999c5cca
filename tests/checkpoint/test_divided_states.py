"""Checkpoints of optimizer states that are divided over more ranks than parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import equal, everything, trained
from torch import Tensor
from works import works

from lightning_mics import MiCSConfig, load_checkpoint, save_checkpoint
from lightning_mics.core.slices import is_slice
from lightning_mics.testing import WorkerPool

LAYOUTS: list[tuple[int, Any]] = [(2, "world"), (2, "partition"), (1, 2), (1, "world"), (4, "partition")]


def config(p: int, q: Any) -> MiCSConfig:
    return MiCSConfig(shard_size=p, node_size=2, optimizer_shard_size=q)


def save_at(path: str, p: int, q: Any, sharded: bool, optimizer: str) -> dict[str, Tensor]:
    model, inner = trained(1, config=config(p, q), optimizer=optimizer)
    save_checkpoint(path, model, inner, {"step": 2}, sharded=sharded)
    return everything(model, inner)


def load_at(path: str, p: int, q: Any, optimizer: str) -> tuple[dict[str, Tensor], bool, dict[str, Tensor]]:
    """Returns what was loaded, whether states are divided as set, and what a step makes of it."""
    model, inner = trained(9, steps=0, config=config(p, q), optimizer=optimizer)
    load_checkpoint(path, model, inner)
    loaded = everything(model, inner)
    states = [
        value
        for param, state in inner.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.shape == param.shape and param.dim()
    ]
    is_divided = all(is_slice(value) == (q != "partition") for value in states)
    model(torch.arange(10).view(2, 5)).sum().backward()
    inner.step()
    return loaded, is_divided, everything(model, inner)


@works("Savers", "Optimizer states over more ranks than parameters, loaded at any other layout")
@pytest.mark.parametrize("sharded", [True, False])
def test_states_go_from_any_layout_to_any_other(pool: WorkerPool, tmp_path: Path, sharded: bool) -> None:
    for p, q in LAYOUTS[: 2 if sharded else 1]:
        path = str(tmp_path / f"{p}-{q}.ckpt")
        saved = pool.run(save_at, path, p, q, sharded, "adamw", world_size=4)[0]
        steps = []
        for other in [layout for layout in LAYOUTS if layout != (p, q)][:: 1 if sharded else 2]:
            loaded, is_divided, stepped = pool.run(load_at, path, *other, "adamw", world_size=4)[0]
            assert equal(loaded, saved) and is_divided, (p, q, other)
            steps.append(stepped)
        for stepped in steps:
            assert all(torch.allclose(stepped[name], steps[0][name], rtol=1e-5, atol=1e-7) for name in stepped)


def test_other_numbers_of_ranks_read_them(pool: WorkerPool, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.ckpt")
    saved = pool.run(save_at, path, 2, "world", True, "adamw", world_size=4)[0]
    for world, p in ((2, 1), (6, 2)):
        loaded, is_divided, _ = pool.run(load_at, path, p, "world", "adamw", world_size=world)[0]
        assert equal(loaded, saved) and is_divided


def run_on(path: str | None, wire: Any, sharded: bool, steps: int = 2, **settings: Any) -> dict[str, Tensor]:
    """Returns everything after some more steps, and saves it; begins at what a path holds, if it is there."""
    rounding = MiCSConfig(
        shard_size=2, node_size=2, optimizer_shard_size="world", param_dtype="bfloat16", replication_gather_dtype=wire
    ).replace(**settings)
    model, inner = trained(1, steps=0, config=rounding)
    if path is not None and Path(path).exists():
        load_checkpoint(path, model, inner)
    for _ in range(steps):
        tokens = torch.arange(10).view(2, 5)
        model(tokens).float().square().mean().backward()
        inner.step()
        inner.zero_grad()
    if path is not None:
        save_checkpoint(path, model, inner, sharded=sharded)
    return everything(model, inner)


@works("Savers", "Float32 of parameters whose rows come in 16 bits (replication_gather_dtype), and resuming to the bit")
@pytest.mark.parametrize("sharded, settings", [(True, {"async_checkpoint": True}), (False, {})])
def test_rows_that_came_in_16_bits_are_saved_as_they_are(
    pool: WorkerPool, tmp_path: Path, sharded: bool, settings: dict[str, Any]
) -> None:
    path = str(tmp_path / "saved.ckpt")
    unbroken = pool.run(run_on, None, None, sharded, 4, world_size=4)
    pool.run(run_on, path, "bfloat16", sharded, **settings, world_size=4)
    resumed = pool.run(run_on, path, "bfloat16", sharded, **settings, world_size=4)
    assert all(map(equal, resumed, unbroken))
