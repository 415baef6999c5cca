"""What tests of checkpoints share: small models that are trained, saved and loaded on every rank."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_tools import Net, cross_entropy, make_optimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mics import MiCSConfig, load_checkpoint, mics_shard, save_checkpoint
from lightning_mics.checkpoint import background, optimizer_state, ranks
from lightning_mics.testing import full_state_dict

PLAIN = MiCSConfig(shard_size=2, node_size=2)
# Of two ranks each has the whole model in 16 bits, and half of float32 and of the states.
OWN_SCALE = MiCSConfig(
    shard_size=1, node_size=1, optimizer_shard_size="world", param_dtype="bfloat16", master_weights="owners"
)


@contextmanager
def slow_writing(seconds: float = 0.05) -> Iterator[None]:
    """Has each step of a checkpoint that is written in the background take some time."""
    together = ranks.together

    def slowly(step: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(seconds)
        return together(step, **options)

    ranks.together = slowly
    try:
        yield
    finally:
        background.settle()
        ranks.together = together


@contextmanager
def held_up(error: str | None = None) -> Iterator[threading.Event]:
    """Lets nothing be written in the background until the event is set; then it fails if there is an error."""
    go_on, together, fsync = threading.Event(), ranks.together, os.fsync

    def is_behind() -> bool:
        return threading.current_thread() is not threading.main_thread()

    def patient(step: Any, **options: Any) -> Any:
        return together((lambda: [go_on.wait(), step()][1]) if is_behind() else step, **options)

    def failing(handle: int) -> None:
        if is_behind() and error is not None:
            raise OSError(error)
        fsync(handle)

    ranks.together, os.fsync = patient, failing
    try:
        yield go_on
    finally:
        go_on.set()
        background.settle()
        ranks.together, os.fsync = together, fsync


def trained(seed: int, steps: int = 2, config: MiCSConfig = PLAIN, optimizer: str = "adamw") -> tuple[Any, Any]:
    """Returns a sharded model and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = mics_shard(Net(), config)
    inner = make_optimizer(optimizer, model.parameters())
    for _ in range(steps):
        tokens = torch.arange(10).view(2, 5) + dist.get_rank()
        cross_entropy(model(tokens % 19), tokens % 19).backward()
        inner.step()
        inner.zero_grad()
    return model, inner


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns all tensors of a model and its optimizer, whole, by name."""
    tensors = full_state_dict(model)
    for name, state in optimizer_state(model, optimizer)["state"].items():
        for key, value in state.items():
            tensors[f"{name}/{key}"] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return tensors


def equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def save_new(path: str, seed: int, sharded: bool = True, config: MiCSConfig = PLAIN) -> dict[str, Tensor]:
    model, optimizer = trained(seed, config=config)
    save_checkpoint(path, model, optimizer, {"seed": seed}, sharded=sharded)
    return everything(model, optimizer)


def load_anew(path: str, weights_only: bool | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model, optimizer = trained(seed=50, steps=0)
    meta = load_checkpoint(path, model, optimizer, weights_only=weights_only)
    return everything(model, optimizer), meta


def make_old(path: Path) -> None:
    """Turns a checkpoint into one of the first version."""
    content = json.loads((path / "mics.json").read_text())
    old = {"format": 1, **{name: content[name] for name in ("world_size", "model", "files")}}
    (path / "mics.json").write_text(json.dumps(old))
