"""``MiCSMonitor(plan=...)``: what was planned beside what is measured."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from lightning_tools import BATCH, LanguageModel, Net, loader, make_trainer
from plan_examples import make_cluster, make_profile

from lightning_mics import MiCSConfigError, MiCSMonitor, MiCSStrategy
from lightning_mics.cli.plan.write import to_json
from lightning_mics.core.gradients.agreement import Agreement
from lightning_mics.plan.search import Choices, search
from lightning_mics.plan.settings import Training
from lightning_mics.testing import WorkerPool
from lightning_mics.text import format_number


def planned(file: Path, node_size: int) -> str:
    cluster, choices = make_cluster(2, node_size, device_type="cpu"), Choices(batches=[(BATCH, 2)], shard_sizes=[2])
    file.write_text(to_json(search(make_profile(), cluster, Training(param_dtype="float32"), choices)))
    return str(file)


def train(file: str, **settings: Any) -> str:
    strategy, callbacks = MiCSStrategy(shard_size=2, node_size=2, **settings), [MiCSMonitor(every_n_steps=2, plan=file)]
    trainer = make_trainer(strategy=strategy, accumulate_grad_batches=2, callbacks=callbacks)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        trainer.fit(LanguageModel(), loader(16, trainer.world_size))
    return told.getvalue()


def train_again(file: str, fits: int) -> float:
    """Returns the share of a step that waits take in the last of several fits with one callback, in percent."""
    callback = MiCSMonitor(every_n_steps=2, plan=file)
    for _ in range(fits):
        strategy = MiCSStrategy(shard_size=2, node_size=2)
        trainer = make_trainer(strategy=strategy, accumulate_grad_batches=2, callbacks=[callback])
        with contextlib.redirect_stderr(io.StringIO()) as told:
            trainer.fit(LanguageModel(), loader(16, trainer.world_size))
    waited = next((line for line in told.getvalue().splitlines() if "exposed communication" in line), "nan%")
    return float(waited.split()[-1][:-1])


def timed_still() -> bool:
    return hasattr(Agreement.reach, "__wrapped__")


def test_a_run_is_compared_once_with_its_plan(pool: WorkerPool, tmp_path: Path) -> None:
    file = planned(tmp_path / "plan.json", 2)
    first, *others = pool.run(train, file, world_size=4)
    assert first.count("A step takes") == 1 and f"than {file} says" in first
    rows = {line[2:24].strip(): line[24:].split() for line in first.splitlines() if line.startswith("  ")}
    assert float(rows["step"][2]) > 0 and rows["peak memory of a rank"][-1].endswith("%")
    # Two shards on the node, each all-reduced between two replicas on two nodes: 2 (r-1)/r = 1 time the shard.
    sent = sum(param.numel() for param in Net().parameters()) * 4 / 2**10
    assert rows["out of a node, a step"][3] == "KiB"
    assert float(rows["out of a node, a step"][2]) == pytest.approx(sent, rel=0.02)
    waited = rows["exposed communication"][-1]  # of gloo's collectives, beside blocks of next to nothing
    assert waited.endswith("%") and 5 < float(waited[:-1]) <= 100
    parts = [float(rows[part][-1][:-1]) for part in ("gather", "reduce", "replicate")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(float(waited[:-1]), abs=0.2)
    assert not any("A step takes" in told for told in others)
    assert pool.run(timed_still, world_size=4) == [False] * 4


def test_a_second_fit_has_waits_of_its_own(pool: WorkerPool, tmp_path: Path) -> None:
    waited, *_ = pool.run(train_again, planned(tmp_path / "plan.json", 2), fits=4, world_size=4)
    assert 5 < waited <= 100


def test_blocks_that_recompute_are_found_however_they_were_chosen(pool: WorkerPool, tmp_path: Path) -> None:
    file = planned(tmp_path / "plan.json", 2)
    plans = json.loads(Path(file).read_text())["plans"]
    recomputed = next(plan for plan in plans if plan["candidate"]["activation_checkpointing"] is True)
    first, *_ = pool.run(train, file, activation_checkpointing=["Block"], world_size=4)
    step = next(line for line in first.splitlines() if line.startswith("  step"))
    assert step.split()[1] == format_number(recomputed["time"]["seconds"])
    for failure in pool.attempt(train, file, activation_checkpointing=["Linear"], world_size=4):
        assert "has no plan with" in failure.message and "activation_checkpointing=['Linear']" in failure.message


def test_a_plan_of_another_run_is_refused_on_all_ranks(pool: WorkerPool, tmp_path: Path) -> None:
    for failure in pool.attempt(train, planned(tmp_path / "plan.json", 4), world_size=4):
        assert failure.kind == MiCSConfigError.__name__ and "plans for 8 ranks" in failure.message
