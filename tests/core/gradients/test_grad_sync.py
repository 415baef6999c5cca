"""The two hops: what runs when, what is kept in between, and whatever users do around them."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from models import Regressor, build, microbatch, regression_loss
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_mics import (
    Hop,
    MiCSConfig,
    MiCSError,
    UnsyncedGradientsError,
    clip_grad_norm_,
    communication_ledger,
    defer_replication_sync,
    mics_shard,
    sync_gradients,
)
from lightning_mics.core.runtime import runtime_of
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

ROWS = 8
CONFIG = MiCSConfig(shard_size=2, node_size=2)


def rows(step: int) -> Tensor:
    """Returns this rank's part of a global batch."""
    return microbatch("uneven", step, ROWS).chunk(dist.get_world_size())[dist.get_rank()]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int = 4) -> None:
    for index in range(accumulate):
        with defer_replication_sync(model, enabled=index + 1 < accumulate):
            (regression_loss(model, rows(index)) / accumulate).backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


# --- counts and memory ------------------------------------------------------------------------------------------------


def count_calls(shard_size: int, hierarchical: bool) -> dict[str, tuple[int, int]]:
    """Returns partition reductions and replication reductions of each unit in one step after the first."""
    model = mics_shard(build("uneven"), CONFIG.replace(shard_size=shard_size, hierarchical=hierarchical))
    optimizer = sgd(model)
    train_step(model, optimizer)
    ledger = communication_ledger(model)
    ledger.reset()
    train_step(model, optimizer)
    return {
        unit.name: tuple(ledger.total(hop, unit.name).calls for hop in (Hop.PARTITION_REDUCE, Hop.REPLICATION_REDUCE))
        for unit in runtime_of(model).window.units
    }


@pytest.mark.parametrize(
    ("world_size", "shard_size", "hierarchical", "calls"),
    [(4, 2, False, (4, 1)), (4, 1, False, (0, 1)), (4, 4, True, (4, 0)), (8, 4, True, (4, 1))],
)
def test_a_unit_reduces_in_its_partition_every_microstep_and_between_replicas_once(
    pool: WorkerPool, world_size: int, shard_size: int, hierarchical: bool, calls: tuple[int, int]
) -> None:
    expected = dict.fromkeys(["(root)", "blocks.0", "blocks.1"], calls)
    assert pool.run(count_calls, shard_size, hierarchical, world_size=world_size) == [expected] * world_size


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64)) for _ in range(2))
        self.last = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def live_bytes() -> int:
    """Returns the memory of all tensors that Python or a gradient can reach."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter, DTensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = {}
    for tensor in tensors:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def settled_bytes(most: int) -> int:
    """Returns the least of `live_bytes` within 10 seconds, or the first that is at most `most`.

    A gloo thread lets go of its tensors a moment after the wait for its work has returned.
    """
    least, deadline = live_bytes(), time.monotonic() + 10
    while least > most and time.monotonic() < deadline:
        time.sleep(0.01)
        least = min(least, live_bytes())
    return least


def gradient_memory() -> tuple[list[int], int]:
    """Returns the memory that gradients take after each microstep of a window, and that of the model."""
    alone = live_bytes()
    model = mics_shard(Wide(), CONFIG)
    whole = sum(param.numel() for param in model.parameters()) * 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer)
    before, taken = settled_bytes(alone + int(whole / 2 * 1.01)), []
    for step in range(3):
        with defer_replication_sync(model):
            regression_loss(model, rows(step)).backward()
        taken.append(settled_bytes(before + int(whole / 2 * 1.01)) - before)
    return taken, whole


def test_between_microsteps_a_rank_holds_the_gradients_of_its_shard(pool: WorkerPool) -> None:
    for taken, whole in pool.run(gradient_memory, world_size=4):
        shard = whole // 2
        assert all(shard <= held <= shard * 1.01 for held in taken), (taken, whole)


def launch_order() -> list[str]:
    """Returns reductions (-) and launches of hop two (+) in the order in which they happened."""
    model = mics_shard(Wide(), CONFIG)
    log: list[str] = []
    for unit in runtime_of(model).window.units:
        reduce, launch = unit.reduce, unit.launch

        def noted_reduce(*args: Any, unit: Any = unit, inner: Any = reduce, **kwargs: Any) -> None:
            inner(*args, **kwargs)
            log.append(f"-{unit.name}")

        def noted_launch(*args: Any, unit: Any = unit, inner: Any = launch) -> int:
            log.append(f"+{unit.name}")
            return inner(*args)

        unit.reduce, unit.launch = noted_reduce, noted_launch
    regression_loss(model, rows(0)).backward()
    return log


def test_hop_two_starts_as_soon_as_a_unit_is_reduced(pool: WorkerPool) -> None:
    expected = ["-blocks.1", "+blocks.1", "-blocks.0", "+blocks.0", "-(root)", "+(root)"]
    assert pool.run(launch_order, world_size=4) == [expected] * 4


# --- everything that a single process takes in its stride -------------------------------------------------------------


class Run:
    """One training run, sharded or in one process, with the same interface."""

    def __init__(self, model: nn.Module, is_sharded: bool) -> None:
        self.model, self.is_sharded = model, is_sharded
        self.optimizer = sgd(model)

    def loss(self, step: int) -> Tensor:
        return regression_loss(self.model, rows(step) if self.is_sharded else microbatch("uneven", step, ROWS))

    def defer(self, enabled: bool = True) -> contextlib.AbstractContextManager[None]:
        return defer_replication_sync(self.model, enabled) if self.is_sharded else contextlib.nullcontext()

    def microstep(self, step: int, *, last: bool) -> None:
        with self.defer(not last):
            (self.loss(step) / 2).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def window(self, step: int) -> None:
        self.microstep(step, last=False)
        self.microstep(step + 1, last=True)
        self.update()


def clear_mid_window(run: Run, set_to_none: bool) -> None:
    run.window(0)
    run.microstep(7, last=False)
    run.optimizer.zero_grad(set_to_none=set_to_none)
    run.window(2)


def clear_to_none_mid_window(run: Run) -> None:
    clear_mid_window(run, True)


def clear_to_zero_mid_window(run: Run) -> None:
    clear_mid_window(run, False)


def clear_and_close_a_window(run: Run) -> None:
    run.window(0)
    run.microstep(7, last=False)
    run.optimizer.zero_grad()
    if run.is_sharded:
        sync_gradients(run.model)
    run.update()  # without gradients, not even momentum moves a weight
    run.window(2)


def clear_to_zero_between_windows(run: Run) -> None:
    for step in range(3):
        run.microstep(2 * step, last=False)
        run.microstep(2 * step + 1, last=True)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)


def second_backward_in_one_window(run: Run) -> None:
    run.loss(0).backward()
    run.loss(1).backward()
    run.update()
    run.microstep(2, last=False)
    run.microstep(3, last=True)
    run.microstep(4, last=True)
    run.update()
    loss = run.loss(5)
    loss.backward(retain_graph=True)
    loss.backward()
    run.update()


def several_forwards_before_one_backward(run: Run) -> None:
    for step in range(2):
        with run.defer():
            ((run.loss(4 * step) + run.loss(4 * step + 1)) / 4).backward()
        ((run.loss(4 * step + 2) + run.loss(4 * step + 3)) / 4).backward()
        run.update()


def requires_grad_changes_between_windows(run: Run) -> None:
    run.window(0)
    run.model.blocks[0].requires_grad_(False)
    run.model.first.weight.requires_grad_(False)
    run.window(2)
    run.model.blocks[0].requires_grad_(True)
    run.model.blocks[1].up.bias.requires_grad_(False)
    run.window(4)
    run.model.requires_grad_(True)
    run.window(6)


def requires_grad_changes_inside_a_window(run: Run) -> None:
    for step in range(2):
        run.microstep(2 * step, last=False)
        run.model.blocks[0].up.weight.requires_grad_(False)
        run.model.blocks[1].requires_grad_(step == 0)
        run.microstep(2 * step + 1, last=True)
        run.model.requires_grad_(True)
        run.update()


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("on purpose")


def fail(module: nn.Module, args: Any) -> None:
    raise RuntimeError("on purpose")


def failed_passes(run: Run, start: int) -> None:
    """Passes that die, in all places; on one process they leave nothing that matters."""
    if not run.is_sharded:
        return
    block = run.model.blocks[0]
    for last in (True, False):
        handle = block.register_forward_hook(lambda module, args, output: FailsInBackward.apply(output))
        with pytest.raises(RuntimeError, match="on purpose"):
            run.microstep(start, last=last)
        handle.remove()
        run.optimizer.zero_grad()
        handle = block.norm.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            run.microstep(start, last=last)
        handle.remove()


def failures_before_the_first_window(run: Run) -> None:
    failed_passes(run, 9)
    run.window(0)
    run.window(2)


def failures_between_windows(run: Run) -> None:
    run.window(0)
    failed_passes(run, 9)
    run.window(2)
    run.window(4)


def evaluate(run: Run, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    run.model.eval()
    with context():
        run.loss(11).item()
    run.model.train()


def evaluations_everywhere(run: Run, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    evaluate(run, context)
    for step in range(2):
        run.microstep(2 * step, last=False)
        evaluate(run, context)
        run.microstep(2 * step + 1, last=True)
        evaluate(run, context)  # leaves gathered parameters that the step makes stale
        if run.is_sharded:
            clip_grad_norm_(run.model, 0.1)
        else:
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.update()
        evaluate(run, context)


def evaluations_without_gradients(run: Run) -> None:
    evaluations_everywhere(run, torch.no_grad)


def evaluations_in_inference_mode(run: Run) -> None:
    evaluations_everywhere(run, torch.inference_mode)


def forwards_without_backwards(run: Run) -> None:
    evaluations_everywhere(run, contextlib.nullcontext)


def gradient_of_the_input(run: Run) -> None:
    batch = (rows(3) if run.is_sharded else microbatch("uneven", 3, ROWS)).clone().requires_grad_()
    torch.autograd.grad(regression_loss(run.model, batch), [batch])
    run.window(0)
    run.window(2)


SCENARIOS = [
    clear_to_none_mid_window,
    clear_to_zero_mid_window,
    clear_and_close_a_window,
    clear_to_zero_between_windows,
    second_backward_in_one_window,
    several_forwards_before_one_backward,
    requires_grad_changes_between_windows,
    requires_grad_changes_inside_a_window,
    failures_before_the_first_window,
    failures_between_windows,
    evaluations_without_gradients,
    evaluations_in_inference_mode,
    forwards_without_backwards,
    gradient_of_the_input,
]
LAYOUTS = {
    "replicas only": {"shard_size": 1},
    "both": {"shard_size": 2},
    "both, kept after forward": {"shard_size": 2, "reshard_after_forward": False},
    "shards only": {"shard_size": 4},
}


def differences(
    scenario: Callable[[Run], None], builder: Callable[[], nn.Module] | None = None
) -> dict[str, tuple[str, float]]:
    """Returns the layouts in which a scenario ends with other weights than in one process."""

    def new_model() -> nn.Module:
        torch.manual_seed(0)
        return (builder or Regressor)()

    alone = Run(new_model(), is_sharded=False)
    scenario(alone)
    expected = {name: value.detach() for name, value in alone.model.state_dict().items()}
    wrong = {}
    for name, settings in LAYOUTS.items():
        sharded = Run(mics_shard(new_model(), CONFIG.replace(**settings)), is_sharded=True)
        scenario(sharded)
        shares = weight_differences(full_state_dict(sharded.model), expected)
        worst = max(shares, key=shares.__getitem__)
        if shares[worst] > 1e-5:
            wrong[name] = (worst, shares[worst])
    return wrong


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_what_users_do_ends_as_in_one_process(pool: WorkerPool, scenario: Callable[[Run], None]) -> None:
    assert pool.run(differences, scenario, world_size=4) == [{}] * 4


class Reentrant(Regressor):
    use_reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.last(torch.tanh(self.narrow(x)))


class NonReentrant(Reentrant):
    use_reentrant = False


def three_windows(run: Run) -> None:
    for step in range(3):
        run.window(2 * step)


@pytest.mark.parametrize("builder", [Reentrant, NonReentrant])
def test_the_users_own_activation_checkpointing(pool: WorkerPool, builder: Callable[[], nn.Module]) -> None:
    assert pool.run(differences, three_windows, builder, world_size=4) == [{}] * 4


# --- parameters that get no gradient ----------------------------------------------------------------------------------


def routed_rows(step: int, route: int) -> Tensor:
    part = rows(step)
    return torch.cat([part, torch.full((len(part), 1), float(route)), torch.zeros(len(part), 1)], 1)


def unused_everywhere() -> list[list[str]]:
    """Returns the blocks and shifts with gradients, after several windows."""
    model = mics_shard(build("routed"), CONFIG)

    def graded() -> list[str]:
        return [n for n, p in model.named_parameters() if p.grad is not None and not n.startswith(("first", "last"))]

    found = []
    regression_loss(model, routed_rows(0, -1)).backward()
    found.append(graded())
    model.zero_grad()
    # Used, cleared, not used again: the clearing must hold.
    with defer_replication_sync(model):
        regression_loss(model, routed_rows(0, 0)).backward()
    model.zero_grad()
    with defer_replication_sync(model):
        regression_loss(model, routed_rows(1, -1)).backward()
    regression_loss(model, routed_rows(2, -1)).backward()
    found.append(graded())
    model.zero_grad()
    # Used by one replica, in one microstep.
    replica = dist.get_rank() // 2
    with defer_replication_sync(model):
        regression_loss(model, routed_rows(0, 1 if replica == 0 else -1)).backward()
    regression_loss(model, routed_rows(1, -1)).backward()
    found.append(sorted({name.rsplit(".", 2)[0] for name in graded()}))
    return found


def test_what_nobody_used_gets_no_gradient(pool: WorkerPool) -> None:
    assert pool.run(unused_everywhere, world_size=4) == [[[], [], ["blocks.1"]]] * 4


# --- low precision ----------------------------------------------------------------------------------------------------


def accumulate_in_bfloat16(reduce_dtype: str | None, num_microsteps: int) -> list[float]:
    """Accumulates gradients of 1 and many of 1/256; returns the distinct values of the sum."""
    torch.manual_seed(0)
    model = mics_shard(nn.Linear(4, 4, bias=False).bfloat16(), CONFIG.replace(reduce_dtype=reduce_dtype))
    for index in range(num_microsteps):
        batch = torch.full((1, 4), 1.0 if index == 0 else 1 / 256, dtype=torch.bfloat16)
        with defer_replication_sync(model, enabled=index + 1 < num_microsteps):
            model(batch).sum().backward()
    return model.weight.grad.full_tensor().float().unique().tolist()


def test_long_windows_of_bfloat16_parameters_add_up(pool: WorkerPool) -> None:
    # 1 + 1/256 rounds to 1 in bfloat16.
    assert pool.run(accumulate_in_bfloat16, "float32", 65, world_size=4) == [[1.25]] * 4
    assert pool.run(accumulate_in_bfloat16, None, 65, world_size=4) == [[1.0]] * 4


def change_gradients_mid_window() -> list[list[float]]:
    found = []
    for change in (lambda grad: grad.zero_(), lambda grad: grad.mul_(0.5), lambda grad: grad.to_local().mul_(0.5)):
        model = mics_shard(nn.Linear(4, 4, bias=False).bfloat16(), CONFIG)
        batch = torch.ones(1, 4, dtype=torch.bfloat16)
        for _ in range(2):
            with defer_replication_sync(model):
                model(batch).sum().backward()
        with torch.no_grad():
            change(model.weight.grad)
        with defer_replication_sync(model):
            model(batch).sum().backward()
        model(batch).sum().backward()
        found.append(model.weight.grad.full_tensor().unique().tolist())
    return found


def test_changes_of_gradients_in_a_window_count(pool: WorkerPool) -> None:
    assert pool.run(change_gradients_mid_window, world_size=4) == [[[2.0], [3.0], [3.0]]] * 4


# --- misuse -----------------------------------------------------------------------------------------------------------


def step_inside_a_window(with_closure: bool) -> None:
    model = mics_shard(build("uneven"), CONFIG)
    optimizer, other = sgd(model), sgd(nn.Linear(2, 2))

    def backward() -> Tensor:
        with defer_replication_sync(model):
            loss = regression_loss(model, rows(0))
            loss.backward()
        return loss

    if with_closure:
        optimizer.step(backward)
    backward()
    other.step()  # not the model's: none of our business
    optimizer.step()


@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
def test_a_step_inside_a_window_is_refused_on_every_rank(pool: WorkerPool, with_closure: bool) -> None:
    for failure in pool.attempt(step_inside_a_window, with_closure, world_size=4):
        assert failure.kind == UnsyncedGradientsError.__name__
        assert "sync_gradients(model)" in failure.message


def steps_that_are_fine() -> bool:
    model = mics_shard(build("uneven"), CONFIG)
    optimizer = sgd(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = regression_loss(model, rows(0))
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)), float(optimizer.step(closure=closure))]
    with defer_replication_sync(model):
        regression_loss(model, rows(0)).backward()
    sync_gradients(model)
    before = model.first.weight.grad.to_local().clone()
    sync_gradients(model)  # nothing waits: nothing happens
    same = torch.equal(before, model.first.weight.grad.to_local())
    optimizer.step()
    lone = mics_shard(build("uneven"), CONFIG.replace(shard_size=4))
    with defer_replication_sync(lone):
        regression_loss(lone, rows(0)).backward()
    sgd(lone).step()  # one replica only: there is nothing to exchange
    return losses[1] < losses[0] and same


def test_closures_and_hand_closed_windows_step(pool: WorkerPool) -> None:
    assert pool.run(steps_that_are_fine, world_size=4) == [True] * 4


def nested_contexts() -> list[bool]:
    model = mics_shard(build("uneven"), CONFIG)
    window, seen = runtime_of(model).window, []
    with defer_replication_sync(model):
        with defer_replication_sync(model, enabled=False):
            seen.append(window.deferring)
        seen.append(window.deferring)
    seen.append(window.deferring)
    with contextlib.suppress(ValueError), defer_replication_sync(model):
        raise ValueError
    return [*seen, window.deferring]


def test_contexts_nest_and_restore(pool: WorkerPool) -> None:
    assert pool.run(nested_contexts, world_size=2) == [[True, True, False, False]] * 2


def unsharded_accumulation() -> None:
    model = mics_shard(build("uneven"), CONFIG)
    model.set_requires_gradient_sync(False)
    regression_loss(model, rows(0)).backward()


def test_accumulating_whole_gradients_is_refused(pool: WorkerPool) -> None:
    for failure in pool.attempt(unsharded_accumulation, world_size=2):
        assert MiCSError.__name__ in failure.bases
        assert "Use lightning_mics.defer_replication_sync(model) instead" in failure.message


def test_contexts_want_a_sharded_model() -> None:
    with pytest.raises(MiCSError, match="Linear is not sharded by MiCS"), defer_replication_sync(nn.Linear(2, 2)):
        pass


# --- several models, and norms ----------------------------------------------------------------------------------------


def two_models() -> list[float]:
    """Trains a generator and a critic of different layouts, together and in turn."""

    def train(first: nn.Module, second: nn.Module, is_sharded: bool) -> None:
        def batch(step: int) -> Tensor:
            return rows(step) if is_sharded else microbatch("uneven", step, ROWS)

        optimizers = [sgd(first), sgd(second)]
        for step in range(3):
            regression_loss(second, first(batch(step))).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with defer_replication_sync(second) if is_sharded else contextlib.nullcontext():
                regression_loss(second, batch(step + 1)).backward()
            first(batch(step)).square().mean().backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
            regression_loss(second, batch(step + 2)).backward()
            optimizers[1].step()
            optimizers[1].zero_grad()

    def models() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)), build("frozen")

    alone, sharded = models(), models()
    mics_shard(sharded[0], CONFIG)
    mics_shard(sharded[1], CONFIG.replace(shard_size=4))
    train(*alone, is_sharded=False)
    train(*sharded, is_sharded=True)
    worst = []
    for model, expected in zip(sharded, alone, strict=True):
        shares = weight_differences(
            full_state_dict(model), {name: value.detach() for name, value in expected.state_dict().items()}
        )
        worst.append(max(shares.values()))
    return worst


def test_two_models_in_one_process(pool: WorkerPool) -> None:
    assert all(max(worst) <= 1e-5 for worst in pool.run(two_models, world_size=4))


def norms() -> list[tuple[float, float]]:
    """Returns pairs of the sharded norm and that of one process."""
    alone, model = build("frozen"), mics_shard(build("frozen"), CONFIG)
    empty = clip_grad_norm_(model, 1.0)
    assert not isinstance(empty, DTensor)
    pairs = [(empty.item(), 0.0)]
    for norm_type in (2.0, 1.0, float("inf")):
        alone.zero_grad()
        model.zero_grad()
        regression_loss(alone, microbatch("uneven", 0, ROWS)).backward()
        regression_loss(model, rows(0)).backward()
        norm = clip_grad_norm_(model, 0.1, norm_type)
        assert not isinstance(norm, DTensor) and norm.dim() == 0
        pairs.append((norm.item(), nn.utils.clip_grad_norm_(alone.parameters(), 0.1, norm_type).item()))
        left = clip_grad_norm_(model, 1e9, norm_type).item()
        pairs.append((left, min(0.1, left)))
    return pairs


def test_norms_are_those_of_one_process(pool: WorkerPool) -> None:
    for pairs in pool.run(norms, world_size=4):
        for actual, expected in pairs:
            assert actual == pytest.approx(expected, rel=1e-5)


def step_by_lbfgs() -> None:
    model = mics_shard(build("uneven"), MiCSConfig(shard_size=2))
    regression_loss(model, microbatch("uneven", 0, 2)).backward()
    torch.optim.LBFGS(model.parameters()).step(lambda: torch.zeros(()))


def step_others_by_lbfgs() -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain, other = nn.Linear(2, 1), fully_shard(nn.Linear(2, 1), mesh=mesh)
    mics_shard(build("uneven"), MiCSConfig(shard_size=2, node_size=2))
    for model in (plain, other):
        torch.optim.LBFGS(model.parameters()).step(lambda: torch.zeros(()))
    return 0.0


def test_lbfgs_on_the_parameters_of_other_models_is_none_of_ours(pool: WorkerPool) -> None:
    assert pool.run(step_others_by_lbfgs, world_size=2) == [0.0] * 2


def test_lbfgs_is_refused(pool: WorkerPool) -> None:
    for failure in pool.attempt(step_by_lbfgs, world_size=2):
        assert failure.kind == "MiCSError" and "Use another optimizer" in failure.message
