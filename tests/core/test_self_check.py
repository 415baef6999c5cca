"""Sabotage: what the self-check is there to find, it finds, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Regressor, build, microbatch, regression_loss
from torch import Tensor, nn
from works import works

from lightning_mics import (
    ClusterTopology,
    Hop,
    MiCSConfig,
    SelfCheckError,
    communication_ledger,
    defer_replication_sync,
    mics_shard,
    sync_gradients,
)
from lightning_mics.core.fingerprints import fingerprint
from lightning_mics.core.gradients.unit import Phase, UnitGradients
from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.core.mesh import build_mesh
from lightning_mics.core.replicas import equalize_replicas
from lightning_mics.core.runtime import runtime_of
from lightning_mics.core.self_check import check_groups
from lightning_mics.testing import WorkerPool

CONFIG = MiCSConfig(shard_size=2, node_size=2)
GUILTY = 3


def is_guilty() -> bool:
    return dist.get_rank() == GUILTY


def train(model: nn.Module, num_windows: int = 1) -> None:
    for step in range(2 * num_windows):
        with defer_replication_sync(model, enabled=step % 2 == 0):
            regression_loss(model, microbatch("uneven", step, 2)).backward()


def first_unit(model: nn.Module) -> UnitGradients:
    return runtime_of(model).window.units[0]


def another_shard(model: nn.Module) -> None:
    if is_guilty():
        with torch.no_grad():
            model.blocks[1].up.weight.to_local()[0, 0] += 1e-6


def another_gradient(model: nn.Module) -> None:
    unit = first_unit(model)
    wait = unit.wait

    def spoil() -> None:
        wait()
        if is_guilty():
            model.blocks[1].up.weight.grad.to_local()[0, 0] += 1e-6

    unit.wait = spoil  # type: ignore[method-assign]


def a_wide_reduction_every_microstep(model: nn.Module) -> None:
    runtime_of(model).window.__class__ = Eager


class Eager(AccumulationWindow):
    """Reduces between replicas in every microstep, as a 2-D mesh does by itself."""

    def _end_of_backward(self) -> None:
        if self.deferring:
            for unit in self.units:
                self._launch(unit)
                unit.wait()
                unit.phase = Phase.OPEN
        super()._end_of_backward()


def no_wide_reduction(model: nn.Module) -> None:
    runtime_of(model).window._launch = lambda unit: None  # type: ignore[method-assign]


def a_whole_gradient(model: nn.Module) -> None:
    window, unit = runtime_of(model).window, first_unit(model)
    hand_back = window._hand_back

    def keep(*args: Any) -> None:
        hand_back(*args)
        if is_guilty():
            param = unit.trainable[0]
            param._fsdp_param._unsharded_param.grad = torch.zeros_like(param._fsdp_param._unsharded_param)

    window._hand_back = keep  # type: ignore[method-assign]


def an_extra_narrow_reduction(model: nn.Module) -> None:
    if is_guilty():
        communication_ledger(model).record(first_unit(model).name, Hop.PARTITION_REDUCE, 0)


def another_order(model: nn.Module) -> None:
    if is_guilty():
        runtime_of(model).window.order.note(1, 0)


SABOTAGE: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "shard": (another_shard, "replicas hold different shards of blocks.1.up.weight"),
    "gradient": (another_gradient, "replicas hold different gradients of blocks.1.up.weight after the all-reduce"),
    "extra wide reduction": (
        a_wide_reduction_every_microstep,
        "unit 'blocks.1' ran 2 replication all-reduces in a window, not 1",
    ),
    "no wide reduction": (no_wide_reduction, "unit 'blocks.1' ran 0 replication all-reduces in a window, not 1"),
    "whole gradient": (a_whole_gradient, "keeps an unsharded gradient between microsteps"),
    "narrow count": (an_extra_narrow_reduction, "ran 3 partition reduce-scatters in 2 microstep(s), not 2"),
    "order": (another_order, "Ranks [2, 3] of one partition group ran the units of the model in different order"),
}


def sabotaged(sabotage: Callable[[nn.Module], None], verify: bool) -> None:
    model = mics_shard(build("uneven"), CONFIG.replace(verify=verify))
    sabotage(model)
    train(model)


@pytest.mark.parametrize(("sabotage", "told"), SABOTAGE.values(), ids=SABOTAGE.keys())
def test_sabotage_is_found_on_every_rank_and_named(
    pool: WorkerPool, sabotage: Callable[[nn.Module], None], told: str
) -> None:
    for failure in pool.attempt(sabotaged, sabotage, True, world_size=4):
        assert failure.kind == "SelfCheckError", failure
        assert told in failure.message


@pytest.mark.parametrize("name", ["shard", "gradient", "extra wide reduction", "narrow count"])
def test_without_verification_nothing_is_checked(pool: WorkerPool, name: str) -> None:
    assert pool.run(sabotaged, SABOTAGE[name][0], False, world_size=4) == [None] * 4


def train_twice(sabotage: Callable[[nn.Module], None]) -> None:
    model = mics_shard(build("uneven"), CONFIG)
    train(model)
    sabotage(model)
    train(model)


def test_only_the_first_window_is_checked(pool: WorkerPool) -> None:
    assert pool.run(train_twice, another_shard, world_size=4) == [None] * 4


def wrong_groups(name: str) -> None:
    layout = ClusterTopology(world_size=4, node_size=2).layout(4)
    mesh = build_mesh(MiCSConfig(shard_size=4, node_size=2), layout, "cpu")
    if name == "inside the node":
        mesh = replace(mesh, intra_group=mesh.inter_group)
    elif name == "across nodes":
        mesh = replace(mesh, inter_group=mesh.intra_group)
    else:
        mesh = replace(mesh, layout=ClusterTopology(world_size=4, node_size=2).layout(2))
    check_groups(mesh)


@pytest.mark.parametrize("name", ["inside the node", "across nodes", "partition"])
def test_wrong_groups_are_named_on_every_rank(pool: WorkerPool, name: str) -> None:
    told = {
        "inside the node": "the group inside the node is (0, 2), not (0, 1)",
        "across nodes": "the group across nodes is (0, 1), not (0, 2)",
        "partition": "the partition group is (0, 1, 2, 3), not (0, 1)",
    }
    for failure in pool.attempt(wrong_groups, name, world_size=4):
        assert failure.kind == "SelfCheckError" and told[name] in failure.message


class Branching(Regressor):
    """Ranks of one partition take different ways through blocks of one shape: gathers pair up wrongly."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        blocks = list(self.blocks) if dist.get_rank() % 2 == 0 else list(self.blocks)[::-1]
        for block in blocks:
            x = block(x)
        return self.last(torch.tanh(self.narrow(x)))


def branch(verify: bool) -> None:
    model = mics_shard(Branching(), CONFIG.replace(verify=verify))
    train(model)


@pytest.mark.parametrize("verify", [True, False])
def test_different_ways_through_the_model_are_found_always(pool: WorkerPool, verify: bool) -> None:
    for failure in pool.attempt(branch, verify, world_size=4):
        assert failure.kind == "SelfCheckError"
        assert "use shard_size=1" in failure.message


def equalize() -> tuple[int, list[float]]:
    rank = dist.get_rank()
    same, other = torch.ones(5), torch.full((3, 2), float(rank)).t()
    flags, numbers = torch.tensor([rank == 0, True]), torch.tensor(rank, dtype=torch.int64)
    empty, wave = torch.empty(0), torch.full((2,), complex(rank, 1))
    named = {"same": same, "other": other, "flags": flags, "numbers": numbers, "empty": empty, "wave": wave}
    changed = equalize_replicas(named.items(), torch.device("cpu"))
    return changed, [other.sum().item(), float(flags.sum()), float(numbers), wave.real.sum().item()]


def test_what_differs_becomes_rank_0s(pool: WorkerPool) -> None:
    assert pool.run(equalize, world_size=4) == [(4, [0.0, 2.0, 0.0, 0.0])] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.complex64])
def test_a_fingerprint_sees_every_bit_and_place(dtype: torch.dtype) -> None:
    values = torch.arange(1, 8).to(dtype)
    changed, swapped = values.clone(), values.clone()
    changed[3] += 1
    swapped[[1, 2]] = swapped[[2, 1]]
    assert len({int(fingerprint(values)), int(fingerprint(changed)), int(fingerprint(swapped))}) == 3
    assert fingerprint(values) == fingerprint(values.clone())
    pair = torch.stack([values, changed], 1)
    assert fingerprint(pair[:, 0]) == fingerprint(values)


def microstep(model: nn.Module, step: int, *, last: bool) -> None:
    with defer_replication_sync(model, enabled=not last):
        regression_loss(model, microbatch("uneven", step, 2)).backward()


def frozen_later(model: nn.Module) -> None:
    for index in range(3):
        model.blocks[0].requires_grad_(index == 0)
        microstep(model, index, last=index == 2)


def frozen_in_between(model: nn.Module) -> None:
    for index in range(3):
        model.blocks[0].requires_grad_(index != 1)
        microstep(model, index, last=index == 2)


def thawed_later(model: nn.Module) -> None:
    for index in range(3):
        model.blocks[0].requires_grad_(index == 2)
        microstep(model, index, last=index == 2)


def frozen_before_it_is_closed(model: nn.Module) -> None:
    for index in range(2):
        microstep(model, index, last=False)
    model.requires_grad_(False)
    sync_gradients(model)


def thawed_in_a_hook(model: nn.Module) -> None:
    """For the windows to come: when its hop two would have been launched, it wanted none."""
    block = model.blocks[1]
    block.requires_grad_(False)
    model.blocks[0].up.weight.register_post_accumulate_grad_hook(lambda param: block.requires_grad_(True))
    for index in range(2):
        microstep(model, index, last=True)


def evaluated_in_between(model: nn.Module) -> None:
    microstep(model, 0, last=False)
    model.eval()
    with torch.no_grad():
        model(microbatch("uneven", 1, 2))
    model.train()
    microstep(model, 2, last=True)


def counted_anew(model: nn.Module) -> None:
    microstep(model, 0, last=False)
    communication_ledger(model).reset()
    microstep(model, 1, last=True)


def cleared_in_between(model: nn.Module) -> None:
    microstep(model, 0, last=False)
    model.zero_grad()
    model.blocks[0].requires_grad_(False)
    microstep(model, 1, last=True)


def no_false_alarms() -> None:
    for shard in (1, 2, 4):
        for scenario in (
            frozen_later,
            frozen_in_between,
            thawed_later,
            frozen_before_it_is_closed,
            thawed_in_a_hook,
            evaluated_in_between,
            counted_anew,
            cleared_in_between,
        ):
            model = mics_shard(build("uneven"), MiCSConfig(shard_size=shard, node_size=2, wrap="Block"))
            try:
                scenario(model)
                model.requires_grad_(True)
                train(model)  # what was changed makes this window a checked one
            except SelfCheckError as error:
                raise AssertionError(f"{scenario.__name__}, shard_size={shard}") from error


@works("Training loops", "A block frozen in the middle of a window")
def test_a_window_is_compared_with_what_it_did(pool: WorkerPool) -> None:
    pool.run(no_false_alarms, world_size=4)


def unfreeze(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.blocks[0].requires_grad_(True)


def freeze(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.last.requires_grad_(False)


def add_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": list(model.blocks[0].parameters())})
    optimizer.step()


def another_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def evaluate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.eval()
    with torch.no_grad():
        model(microbatch("uneven", 1, 2))
    model.train()


def part_in_evaluation(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.blocks[1].eval()


def part_in_evaluation_here_only(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.blocks[1].train(not is_guilty())


CHANGES = [unfreeze, freeze, add_group, another_optimizer, evaluate, part_in_evaluation, part_in_evaluation_here_only]


def changed_and_spoiled() -> dict[str, str]:
    found = {}
    for change in [None, *CHANGES]:
        model = mics_shard(build("uneven"), CONFIG)
        model.blocks[0].requires_grad_(False)
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(2):
            train(model)
            optimizer.step()
            optimizer.zero_grad()
        another_shard(model)
        train(model)
        if change is not None:
            change(model, optimizer)
        try:
            train(model)
        except SelfCheckError as error:
            found["none" if change is None else change.__name__] = str(error)
    return found


@works("Training loops", "Progressive unfreezing")
def test_windows_after_a_change_are_checked_again(pool: WorkerPool) -> None:
    for found in pool.run(changed_and_spoiled, world_size=4):
        assert list(found) == [change.__name__ for change in CHANGES]
        assert all("replicas hold different shards of blocks.1.up.weight" in error for error in found.values())


def changing_in_every_window() -> int:
    model = mics_shard(build("uneven"), CONFIG)
    check = next(iter(runtime_of(model).window._observers))
    checks = []
    look = check._check  # type: ignore[attr-defined]
    check._check = lambda window: (checks.append(window), look(window))  # type: ignore[attr-defined]
    check.OFTEN = 4  # type: ignore[attr-defined]
    for index in range(10):
        model.last.requires_grad_(index % 2 == 0)
        microstep(model, index, last=True)
    return len(checks)


def test_who_changes_something_all_the_time_is_checked_less(pool: WorkerPool) -> None:
    assert pool.run(changing_in_every_window, world_size=2) == [5] * 2
