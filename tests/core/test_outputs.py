"""Results wherever a model leaves them, and graphs of graphs, train as in one process."""

from __future__ import annotations

import functools
import types
from collections import UserDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, distributions, nn
from torch.autograd import grad
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.utils.checkpoint import checkpoint
from works import refused, works

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core import outputs
from lightning_mics.core.outputs import look_into
from lightning_mics.core.runtime import runtime_of
from lightning_mics.errors import MiCSError
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict

ROWS = 3
CASES = [(2, 3), (4, 1)]  # shard size, accumulation


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Private:
    def __init__(self, value: Tensor) -> None:
        self._value = [{"deep": value}]

    @property
    def value(self) -> Tensor:
        return self._value[0]["deep"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.loss: Any = None

    def forward(self, hidden: Any) -> Any:
        return torch.tanh(self.linear(hidden))


class BetweenBlock(Block):
    """Takes and returns an object."""

    def forward(self, hidden: Any) -> Any:
        return Slotted(super().forward(hidden.value))


class BalancedBlock(Block):
    """Keeps a loss of its own, whose graph needs the weights once more behind the output's."""

    def forward(self, hidden: Any) -> Any:
        output = super().forward(hidden)
        self.loss = [self.linear(output).square().mean()]
        return output


class HidingBlock(Block):
    """Returns nothing, and adds to a list in what it was given."""

    def forward(self, hidden: Any) -> Any:
        hidden.items.append(super().forward(hidden.items.pop()))


class ViewBlock(Block):
    """Returns a view, which is changed in place."""

    def forward(self, hidden: Any) -> Any:
        return (super().forward(hidden) + 1).view(-1).view(hidden.shape)


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.last = nn.Linear(8, 3)
        self.loss: Any = None

    def hidden(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def forward(self, rows: Tensor) -> Any:
        return nn.functional.softplus(self.last(self.hidden(rows)))


class Returns(Net):
    """Returns something that a function makes of the output."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, rows: Tensor) -> Any:
        return self.make(super().forward(rows))


class Between(Net):
    def __init__(self) -> None:
        super().__init__(BetweenBlock)

    def hidden(self, rows: Tensor) -> Tensor:
        hidden: Any = Slotted(self.first(rows))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.value


class Hiding(Net):
    def __init__(self) -> None:
        super().__init__(HidingBlock)

    def hidden(self, rows: Tensor) -> Tensor:
        # In the place of a list, in torch 2.11 also of a deque, FSDP2 hands a unit another one.
        hidden = types.SimpleNamespace(items=[self.first(rows)])
        for block in self.blocks:
            block(hidden)
        output: Tensor = hidden.items[0]
        return output


class InPlace(Net):
    def __init__(self) -> None:
        super().__init__(ViewBlock)

    def hidden(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows)
        for block in self.blocks:
            hidden = block(hidden)
            hidden += 1
        return hidden


class Forces(Net):
    """Takes the gradient of its energy inside of ``forward``, and needs its own weights once more."""

    def forward(self, rows: Tensor) -> Any:
        places = rows.detach().requires_grad_()
        energy = super().forward(places)
        forces = grad(energy.sum(), places, create_graph=True)[0]
        return energy, forces, self.last(self.hidden(rows))


class Recomputes(Net):
    def hidden(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=True)
        return hidden


class KeepsLoss(Net):
    def forward(self, rows: Tensor) -> Any:
        self.loss = super().forward(rows).square().mean()


class Appends(Net):
    def forward(self, rows: Tensor, results: list[Tensor]) -> Any:
        results.append(super().forward(rows))


Backward = Callable[[nn.Module, Tensor, float], None]


def backward_of(loss: Callable[[nn.Module, Tensor], Tensor]) -> Backward:
    def run(model: nn.Module, rows: Tensor, share: float) -> None:
        (loss(model, rows) * share).backward()

    return run


def of_categorical(model: nn.Module, rows: Tensor) -> Tensor:
    return -model(rows).log_prob(torch.arange(len(rows)) % 3).mean()


def of_normal(model: nn.Module, rows: Tensor) -> Tensor:
    return -model(rows).log_prob(rows[:, :3]).mean()


def of_mixture(model: nn.Module, rows: Tensor) -> Tensor:
    return -model(rows).log_prob(rows[:, 0]).mean()


def of_value(model: nn.Module, rows: Tensor) -> Tensor:
    return model(rows).value.square().mean()


def of_output(model: nn.Module, rows: Tensor) -> Tensor:
    return model(rows).square().mean()


def of_block_losses(model: Any, rows: Tensor) -> Tensor:
    return of_output(model, rows) + sum(block.loss[0] for block in model.blocks)


def of_kept(model: Any, rows: Tensor) -> Tensor:
    model(rows)
    return model.loss


def of_appended(model: nn.Module, rows: Tensor) -> Tensor:
    results: list[Tensor] = []
    model(rows, results)
    return results[0].square().mean()


def of_changed_view(model: nn.Module, rows: Tensor) -> Tensor:
    output = model(rows).view(-1)
    output *= 2
    return output.square().mean()


def of_all(model: nn.Module, rows: Tensor) -> Tensor:
    return sum(part.square().mean() for part in model(rows))


def mixture(output: Tensor) -> Any:
    normal = distributions.Normal(output, 1 + output)
    return distributions.MixtureSameFamily(distributions.Categorical(logits=output), normal)


# Gradients of gradients.


def gradient_of(model: nn.Module, rows: Tensor) -> Tensor:
    inputs = rows.clone().requires_grad_()
    return grad(model(inputs).sum(), inputs, create_graph=True)[0]


def penalty(model: nn.Module, rows: Tensor) -> Tensor:
    return (gradient_of(model, rows).norm(dim=1) - 1).square().mean()


def wasserstein(model: nn.Module, rows: Tensor) -> Tensor:
    return model(rows + 1).mean() - model(rows - 1).mean()


def penalty_first(model: nn.Module, rows: Tensor) -> Tensor:
    return penalty(model, rows) + wasserstein(model, rows)


def penalty_last(model: nn.Module, rows: Tensor) -> Tensor:
    return wasserstein(model, rows) + penalty(model, rows)


def penalty_apart(model: nn.Module, rows: Tensor, share: float) -> None:
    early = penalty(model, rows) * share
    (wasserstein(model, rows) * share).backward()
    early.backward()


def penalty_twice(model: nn.Module, rows: Tensor, share: float) -> None:
    gradient = gradient_of(model, rows)
    (gradient.square().mean() * share).backward(retain_graph=True)
    (gradient.sum(1).square().mean() * share).backward()


def third_order(model: nn.Module, rows: Tensor) -> Tensor:
    inputs = rows.clone().requires_grad_()
    first = grad(model(inputs).sum(), inputs, create_graph=True)[0]
    return grad(first.square().sum(), inputs, create_graph=True)[0].square().mean()


def graph_of_backward(model: nn.Module, rows: Tensor, share: float) -> None:
    (of_output(model, rows) * share).backward(create_graph=True)


def two_passes(model: nn.Module, rows: Tensor, share: float) -> None:
    output = model(rows)
    (output.mean() * share).backward(retain_graph=True)
    (output.square().mean() * share).backward()


def adversarial(model: nn.Module, rows: Tensor) -> Tensor:
    inputs = rows.clone().requires_grad_()
    gradient = grad(of_output(model, inputs), inputs)[0]
    return of_output(model, (inputs + 0.1 * gradient.sign()).detach())


@dataclass(frozen=True)
class Kind:
    """One way to leave results, or to go through graphs.

    Attributes:
        make: Makes the model.
        run: Runs a microstep's passes on some rows, with the loss multiplied by a share.
        row: Its row in the table of what works.
    """

    make: Callable[[], nn.Module]
    run: Backward
    row: tuple[str, str] | None = None


def returning(make: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return functools.partial(Returns, make)


MODELS, LOOPS = "Model kinds", "Training loops"
KINDS = {
    "categorical": Kind(
        returning(lambda output: distributions.Categorical(logits=output)),
        backward_of(of_categorical),
        (MODELS, "Returns a torch distribution"),
    ),
    "independent": Kind(
        returning(lambda output: distributions.Independent(distributions.Normal(output, 1 + output), 1)),
        backward_of(of_normal),
    ),
    "mixture": Kind(returning(mixture), backward_of(of_mixture)),
    "namespace": Kind(returning(lambda output: SimpleNamespace(value=output)), backward_of(of_value)),
    "user dictionary": Kind(
        returning(lambda output: UserDict(value=output)),
        backward_of(lambda model, rows: model(rows)["value"].square().mean()),
    ),
    "slots": Kind(returning(Slotted), backward_of(of_value), (MODELS, "Returns an object of an own class")),
    "private": Kind(returning(Private), backward_of(of_value)),
    "closure": Kind(
        returning(lambda output: lambda factor: output * factor),
        backward_of(lambda model, rows: model(rows)(2).square().mean()),
        (MODELS, "Returns a function"),
    ),
    "iterator": Kind(
        returning(lambda output: iter([output])),
        backward_of(lambda model, rows: next(model(rows)).square().mean()),
    ),
    "attribute": Kind(KeepsLoss, backward_of(of_kept), (MODELS, "Keeps its loss as an attribute")),
    "appended": Kind(Appends, backward_of(of_appended), (MODELS, "Adds results to a list of the caller")),
    "between units": Kind(Between, backward_of(of_output), (MODELS, "Hands objects from block to block")),
    "hidden by units": Kind(Hiding, backward_of(of_output)),
    "losses of units": Kind(
        functools.partial(Net, BalancedBlock),
        backward_of(of_block_losses),
        (MODELS, "Blocks keep losses of their own (load balancing)"),
    ),
    "changed view": Kind(Net, backward_of(of_changed_view)),
    "changed view of a unit": Kind(InPlace, backward_of(of_output), (MODELS, "A block's output is changed in place")),
    "forces": Kind(Forces, backward_of(of_all), (MODELS, "Takes gradients inside of forward (forces)")),
    "penalty first": Kind(Net, backward_of(penalty_first), (LOOPS, "Gradient penalty (double backward)")),
    "penalty last": Kind(Net, backward_of(penalty_last)),
    "penalty apart": Kind(Net, penalty_apart),
    "penalty twice": Kind(Net, penalty_twice),
    "penalty alone": Kind(Net, backward_of(penalty)),
    "third order": Kind(Net, backward_of(third_order)),
    "graph of a backward pass": Kind(Net, graph_of_backward),
    "recomputed twice": Kind(
        Recomputes,
        backward_of(lambda model, rows: of_output(model, rows) + of_output(model, rows + 1)),
        (LOOPS, "Reentrant checkpointing, two forward passes before backward"),
    ),
    "two passes": Kind(Net, two_passes, (LOOPS, "Two backward passes through one graph")),
    "adversarial": Kind(Net, backward_of(adversarial), (LOOPS, "Adversarial training (FGSM)")),
}


def train(model: nn.Module, kind: Kind, accumulate: int, rank: int, world: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        for index in range(accumulate):
            rows = torch.randn(4 * ROWS, 4, generator=generator).chunk(world)[rank]
            last = index + 1 == accumulate
            with defer_replication_sync(model, enabled=not last) if world > 1 else nullcontext():
                kind.run(model, rows, 1 / accumulate)
        optimizer.step()
        optimizer.zero_grad()


@functools.cache
def trained_alone(name: str, accumulate: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = KINDS[name].make()
    train(model, KINDS[name], accumulate, 0, 1)
    return model.state_dict()


def trained_sharded(name: str, cases: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    states = []
    for shard_size, accumulate in cases:
        torch.manual_seed(0)
        model: Any = KINDS[name].make()
        block = type(model.blocks[0]).__name__
        mics_shard(model, MiCSConfig(shard_size=shard_size, node_size=2, wrap=block))
        train(model, KINDS[name], accumulate, dist.get_rank(), dist.get_world_size())
        states.append(full_state_dict(model))
    return states


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[works(*kind.row)] if kind.row else []) for name, kind in KINDS.items()]
)
def test_results_are_found_wherever_they_are(pool: WorkerPool, name: str) -> None:
    for states in pool.run(trained_sharded, name, CASES, world_size=4):
        for (_, accumulate), state in zip(CASES, states, strict=True):
            assert_parity(state, trained_alone(name, accumulate))


def counted() -> tuple[list[int], bool]:
    """Returns how often each unit reduced, and whether a window is open, after gradients of inputs alone."""
    model = mics_shard(Net(), MiCSConfig(shard_size=2, node_size=2, wrap="Block"))
    inputs = torch.randn(2, 4, requires_grad=True)
    loss = of_output(model, inputs)
    grad(loss, inputs, retain_graph=True)
    window = runtime_of(model).window
    found = [unit.num_reductions for unit in window.units], window.pending
    loss.backward()
    assert all(unit.group.is_idle for unit in window.units)
    return found


def test_gradients_of_inputs_alone_are_no_microstep(pool: WorkerPool) -> None:
    for counts, is_pending in pool.run(counted, world_size=4):
        assert counts == [0, 0, 0]
        assert not is_pending


GENERATOR = refused(
    MODELS, "Returns a generator", says="whose body would run after the pass, when parameters are shards."
)


def generating() -> str:
    model = mics_shard(returning(lambda output: (row for row in output))(), MiCSConfig(shard_size=2, node_size=2))
    with pytest.raises(MiCSError) as caught:
        model(torch.randn(2, 4))
    return str(caught.value)


@GENERATOR
def test_a_generator_is_refused(pool: WorkerPool) -> None:
    for message in pool.run(generating, world_size=2):
        GENERATOR.check(message)


STALE = refused(
    LOOPS,
    "Backward through a graph from before optimizer.step()",
    says="has been modified by an inplace operation",
)


def backward_after_step() -> str:
    model = mics_shard(Net(), MiCSConfig(shard_size=2, node_size=2, wrap="Block"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    early, late = (of_output(model, torch.randn(2, 4)) for _ in range(2))
    late.backward()
    optimizer.step()
    with pytest.raises(RuntimeError) as caught:
        early.backward()
    return str(caught.value)


@STALE
def test_a_graph_of_older_values_is_refused(pool: WorkerPool) -> None:
    for message in pool.run(backward_after_step, world_size=2):
        STALE.check(message)


def unwatched() -> str:
    """Uses gathered parameters of a unit behind everybody's back."""
    model: Any = mics_shard(Net(), MiCSConfig(shard_size=2, node_size=2, wrap="Block"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    of_output(model, torch.randn(2, 4)).backward()
    model.blocks[0].unshard()
    model.blocks[0].linear(torch.randn(2, 8)).sum().backward()
    with pytest.raises(MiCSError) as caught:
        optimizer.step()
    return str(caught.value)


UNREDUCED = refused(
    LOOPS, "optimizer.step() on gradients that were never reduced", says="gradients of unit 'blocks.0' were never"
)


@UNREDUCED
def test_a_step_on_unreduced_gradients_is_refused(pool: WorkerPool) -> None:
    for message in pool.run(unwatched, world_size=2):
        UNREDUCED.check(message)


def with_step_in_backward(by_pytorch: bool, shard_size: int) -> tuple[dict[str, Tensor], str]:
    """Steps in hooks of the backward pass; returns the weights, and what is said where microsteps accumulate."""
    torch.manual_seed(0)
    model = mics_shard(Net(), MiCSConfig(shard_size=shard_size, node_size=2, wrap="Block"))
    step_in_backward(model, by_pytorch)
    steps_without_optimizer(model, dist.get_rank(), dist.get_world_size())
    state = full_state_dict(model)
    with pytest.raises(MiCSError) as caught, defer_replication_sync(model):
        of_output(model, torch.randn(2, 4)).backward()
    return state, str(caught.value)


def step_in_backward(model: nn.Module, by_pytorch: bool) -> None:
    if by_pytorch:
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
        return
    optimizers = {param: torch.optim.SGD([param], lr=0.1) for param in model.parameters()}

    def step(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)


def steps_without_optimizer(model: nn.Module, rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        rows = torch.randn(4 * ROWS, 4, generator=generator).chunk(world)[rank]
        of_output(model, rows).backward()


IN_BACKWARD = refused(
    "Optimizers",
    "Optimizer in backward, with accumulation",
    says="A hook that steps the optimizer in the backward pass cannot accumulate gradients",
)


@works("Optimizers", "Optimizer in backward")
@IN_BACKWARD
@pytest.mark.parametrize("by_pytorch", [False, True])
def test_optimizers_step_in_backward(pool: WorkerPool, by_pytorch: bool) -> None:
    torch.manual_seed(0)
    alone = Net()
    step_in_backward(alone, by_pytorch)
    steps_without_optimizer(alone, 0, 1)
    for shard_size in (1, 2, 4):
        for state, message in pool.run(with_step_in_backward, by_pytorch, shard_size, world_size=4):
            assert_parity(state, alone.state_dict())
            IN_BACKWARD.check(message)


def test_all_that_an_object_consists_of_is_looked_into() -> None:
    tensor = torch.ones(1)
    cyclic: Any = SimpleNamespace(value=[tensor])
    cyclic.itself = cyclic
    for item in (cyclic, {tensor}, functools.partial(print, tensor), Private(tensor).__init__, lambda x=tensor: x):
        found = look_into(item)
        assert [*found.seen, *found.hidden] == [tensor]
        assert found.is_whole
    assert look_into((tensor, {"a": tensor})).seen == [tensor, tensor]
    assert not look_into(iter([tensor])).is_whole


def objects_looked_into() -> int:
    model = nn.Sequential(Block(), Block())
    mics_shard(model, MiCSConfig(shard_size=1, node_size=1, wrap="Block", verify=False))
    model(torch.ones(2, 8)).sum().backward()
    with mock.patch.object(outputs, "_parts", wraps=outputs._parts) as parts:
        model(torch.ones(2, 8)).sum().backward()
    return parts.call_count


def test_what_fsdp_hangs_on_modules_is_not_looked_into(pool: WorkerPool) -> None:
    # It leads to all groups and hooks: thousands of objects in each pass of a unit.
    assert max(pool.run(objects_looked_into, world_size=2)) < 40
