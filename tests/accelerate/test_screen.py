"""What users read of a run: log lines of saving, and the report at the end of the runner."""

from __future__ import annotations

import io
import logging
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate_tools import forget_accelerate, make_accelerator
from lightning_tools import Net, cross_entropy

from lightning_mics.accelerate import MiCSPlugin
from lightning_mics.checkpoint import save_sharded
from lightning_mics.errors import CheckpointError
from lightning_mics.testing import WorkerPool


class Other(Net):
    pass


def lines_of_saving(folder: str) -> list[str]:
    accelerator = make_accelerator(settings={"shard_size": 2})
    model = accelerator.prepare(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    hook_logger, lines = logging.getLogger("somebody.elses"), io.StringIO()
    handler = logging.StreamHandler(lines)
    logging.getLogger().addHandler(handler)
    levels = {logger: logger.level for logger in (logging.getLogger("accelerate"), hook_logger)}
    for logger in levels:
        logger.setLevel(logging.INFO)
    accelerator.register_save_state_pre_hook(lambda *args: hook_logger.info("Adapter saved in %s", args[2]))
    try:
        accelerator.save_state(f"{folder}/state")
    finally:
        logging.getLogger().removeHandler(handler)
        for logger, level in levels.items():
            logger.setLevel(level)
    return lines.getvalue().splitlines()


def test_log_lines_of_saving_have_the_final_name(pool: WorkerPool, tmp_path: Path) -> None:
    lines = pool.run(lines_of_saving, str(tmp_path), world_size=2)[0]
    assert f"Adapter saved in {tmp_path}/state" in lines
    assert any(f"Random states saved in {tmp_path}/state/" in line for line in lines), lines
    assert not [line for line in lines if "mics-incomplete" in line]


def fail_to_save(folder: str) -> None:
    def write(temporary: Path) -> Any:
        (temporary / "missing" / "file").write_text("")

    with pytest.raises(CheckpointError, match=f"No such file or directory: '{folder}/state/missing/file'"):
        save_sharded(f"{folder}/state", {}, {}, write)


def test_errors_of_saving_have_the_final_name(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(fail_to_save, str(tmp_path), world_size=1)


def report_of(shard_size: int, train: bool = True) -> str:
    """Returns what the runner prints at the end of a script with three models."""
    from lightning_mics import run

    forget_accelerate()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = run._RunAccelerator(mics_plugin=MiCSPlugin(shard_size=shard_size), gradient_accumulation_steps=2)
    tokens = torch.arange(10).view(2, 5) + dist.get_rank()
    for model in accelerator.prepare(Net(), Other(), Net()):
        for _ in range(2 if train else 0):
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(tokens), tokens))
    screen = io.StringIO()
    with redirect_stdout(screen):
        run._report(None)
    run._RunAccelerator.ledgers.clear()
    return screen.getvalue()


def reports() -> dict[tuple[int, bool], str]:
    sizes = [size for size in (1, 2, 4) if size <= dist.get_world_size()]
    return {(size, train): report_of(size, train) for size in sizes for train in (True, False)}


def test_the_report_names_models_and_says_which_hop_was_not_there(pool: WorkerPool) -> None:
    screens = pool.run(reports, world_size=4)[0]
    for (shard_size, train), screen in screens.items():
        size = f"{4 // shard_size} replica(s) x {shard_size} shard(s)"
        for name in ("Net", "Other", "Net (2)"):
            assert f"{name}, {size}" in screen.splitlines(), screen
        closing = {
            1: "each rank holds a whole replica (shard_size=1): gradients were reduced between replicas only",
            2: "a unit ran 2 partition reduce-scatter(s) for each all-reduce between replicas",
            4: "there is one replica, so that nothing was reduced between replicas",
        }[shard_size]
        assert screen.count(closing if train else "no gradients were reduced") == 3, screen
