"""Ranks that give a call different arguments are told so, all of them, before anything is mixed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_tools import trained

from lightning_mics import CheckpointError, load_checkpoint, save_checkpoint
from lightning_mics.checkpoint import load_raw
from lightning_mics.testing import WorkerPool


def differ(folder: str) -> list[str]:
    rank, (model, optimizer) = dist.get_rank(), trained(1)
    saved, raw = f"{folder}/saved.ckpt", f"{folder}/{rank}"
    save_checkpoint(saved, model, optimizer, meta={"step": 1} if rank == 0 else None)  # rank 0's counts
    Path(raw).mkdir()
    torch.save({"weight": torch.full((2, 2), float(rank))}, f"{raw}/raw.pt")
    linear, cwd = torch.nn.Linear(2, 2, bias=False), Path.cwd()
    calls: tuple[Callable[[], Any], ...] = (
        lambda: save_checkpoint(f"{folder}/{rank}.ckpt", model),
        lambda: save_checkpoint(f"{folder}/a.ckpt", model, sharded=rank == 0),
        lambda: save_checkpoint(f"{folder}/a.ckpt", model, [optimizer] * rank),
        lambda: load_checkpoint(saved, model, [optimizer] * rank),
        lambda: load_checkpoint(saved, model, optimizer, strict=rank == 1),
        lambda: load_raw(f"{raw}/raw.pt", linear),
        lambda: load_raw("raw.pt", linear),
    )
    said = []
    try:
        os.chdir(raw)
        for call in calls:
            try:
                call()
            except CheckpointError as error:
                said.append(str(error))
    finally:
        os.chdir(cwd)
    return said


def test_different_arguments_are_named(pool: WorkerPool, tmp_path: Path) -> None:
    for said in pool.run(differ, str(tmp_path), world_size=2):
        for words, expected in zip(
            said,
            (
                f"save_checkpoint was given another path on some ranks: {tmp_path}/0.ckpt on rank(s) 0; {tmp_path}/1",
                "another sharded on some ranks: True on rank(s) 0; False on rank(s) 1",
                "another optimizers on some ranks: 0 on rank(s) 0; 1 on rank(s) 1",
                "load_checkpoint was given another optimizers on some ranks: [] on rank(s) 0; ['optimizer_0']",
                "another strict on some ranks: False on rank(s) 0; True on rank(s) 1",
                "load_raw was given another path",
                "load_raw was given another content",
            ),
            strict=True,
        ):
            assert expected in words
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["saved.ckpt"]
