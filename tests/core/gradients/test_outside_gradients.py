"""What reaches the gradients of shards beside the model's own backward pass: penalties, hypernetworks, hooks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._api import _ToTorchTensor
from works import refused, works

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core._torch import dtensor_gradients, dtensors
from lightning_mics.errors import SelfCheckError
from lightning_mics.testing import WorkerPool

BOUND = 1e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Net(nn.Module):
    """Uneven shards, scalars, a unit that no rank runs, and a loss that may look at another unit's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 1)
        self.scale, self.level = nn.Parameter(torch.tensor(1.2)), nn.Parameter(torch.tensor(0.3))
        self.looks_inside = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        y = self.head(x) * self.scale + self.level
        return y + 0.1 * whole(self.blocks[0].a.weight).pow(2).sum() * x.mean() if self.looks_inside else y


def whole(param: Tensor) -> Tensor:
    return param.full_tensor() if isinstance(param, DTensor) else param


def gathered(param: Tensor) -> Tensor:
    return param.redistribute(placements=[Replicate()]).to_local() if isinstance(param, DTensor) else param


def weights(model: nn.Module) -> Iterator[Tensor]:
    """Returns the parameters that are shards outside of passes, and some that are not used by any rank."""
    return (param for param in model.blocks.parameters())


# Each takes the model, its input and what computes the model's loss; returns losses that run backward one by one.
Loss = Callable[[Any, Tensor, Callable[[], Tensor]], "list[Tensor]"]


def l1_before(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    penalty = sum(whole(param).abs().sum() for param in model.parameters())
    return [loss() + 0.01 * penalty]


def l1_after(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    return [loss() + 0.01 * sum(whole(param).abs().sum() for param in weights(model))]


def l2_sp(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    start = [torch.linspace(-1, 1, param.numel()).view(param.shape) for param in weights(model)]
    penalty = sum((whole(p) - q).pow(2).sum() for p, q in zip(weights(model), start, strict=True))
    return [0.1 * penalty + loss()]


def elastic(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    kept = [whole(param.detach()).clone() + 0.1 for param in weights(model)]
    fisher = [torch.linspace(0, 1, param.numel()).view(param.shape) for param in weights(model)]
    value = loss()
    everything = zip(weights(model), kept, fisher, strict=True)
    return [value + sum((f * (whole(param) - q).pow(2)).sum() for param, q, f in everything)]


def on_shards(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Operations of DTensor, whose gradients are shards, replicated (of sums) or partial (of norms)."""
    terms = [term for param in weights(model) for term in (param.abs().sum(), param.sum(), param.norm())]
    return [loss() + 0.01 * sum(map(whole, terms))]


def hypernetwork(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Weights that make something of the rank's data."""
    made = whole(model.blocks[2].a.weight) @ x.t() + whole(model.blocks[1].a.bias)[:, None]
    return [loss() + made.pow(2).mean() + (gathered(model.blocks[0].b.weight) @ made).mean()]


def scaled_by_data(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    norms = [whole(param.norm()) * x.mean() for param in weights(model)]
    return [loss() + sum(norms) + whole((model.blocks[1].a.weight * 2).relu()).sum() * x[0, 0]]


def on_the_way(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    """A unit's weights that the root looks at while the unit is not gathered."""
    model.looks_inside = True
    try:
        return [loss()]
    finally:
        model.looks_inside = False


def two_losses(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    first = sum(whole(param).pow(2).sum() for param in weights(model))
    value = loss()
    return [value + 0.1 * first + sum(whole(param).abs().sum() for param in weights(model)) + value.detach() * first]


def alone_after(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    return [loss(), whole(model.blocks[0].a.weight).pow(2).sum() * x.mean()]


def alone_before(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    return [sum(whole(param).pow(2).sum() for param in weights(model)) * x.mean(), loss()]


LOSSES: list[Loss] = [
    *(l1_before, l1_after, l2_sp, elastic, on_shards, hypernetwork, scaled_by_data, on_the_way, two_losses),
    *(alone_after, alone_before),
]


def backward(model: Any, losses: Loss, x: Tensor, scale: float) -> None:
    pending = losses(model, x, lambda: model(x).pow(2).mean())
    for loss in pending:
        (loss * scale).backward()


def data(rank: int, microstep: int) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(17 * rank + microstep))


def worst(model: nn.Module, reference: nn.Module) -> float:
    """Returns the largest difference of a gradient, relative to the largest value of the reference's."""
    found = [0.0]
    for (name, param), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (param.grad is None) == (expected.grad is None), f"{name} has a gradient in one of both only"
        if expected.grad is not None:
            difference = (whole(param.grad) - expected.grad).abs().max() / expected.grad.abs().max().clamp(min=1e-6)
            found.append(difference.item())
    return max(found)


Prepare = Callable[[Any], object]


def gradients(losses: Loss, model: Any, reference: Any, accumulate: int) -> float:
    """Runs a window here and in one process that sees all ranks' data; returns how far gradients differ."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for microstep in range(accumulate):
        with defer_replication_sync(model, enabled=microstep + 1 < accumulate):
            backward(model, losses, data(rank, microstep), 1 / accumulate)
        # One loss for all ranks: hooks of a backward pass see the sum.
        inputs = [data(other, microstep) for other in range(world)]
        every = [losses(reference, x, lambda x=x: reference(x).pow(2).mean()) for x in inputs]
        for together in zip(*every, strict=True):
            (torch.stack(together).mean() / accumulate).backward()
    found = worst(model, reference)
    for each in (model, reference):
        each.zero_grad()
    return found


def parity(losses: list[Loss], layouts: list[tuple[int, int]]) -> dict[str, float]:
    """Returns how far gradients are off, for each shard size and number of microsteps."""
    found = {}
    for shard in dict.fromkeys(shard for shard, _ in layouts):
        torch.manual_seed(0)
        reference = Net()
        model = mics_shard(copy.deepcopy(reference), MiCSConfig(shard_size=shard, node_size=2))
        for accumulate in [microsteps for size, microsteps in layouts if size == shard]:
            for loss in losses:
                found[f"{loss.__name__}, p={shard}, {accumulate}"] = gradients(loss, model, reference, accumulate)
    return found


def check(found: dict[str, float]) -> None:
    wrong = {name: value for name, value in found.items() if not value <= BOUND}
    assert not wrong, wrong


@works("Training loops", "L1 penalty on full_tensor(), before or after the forward pass")
@works("Training loops", "L2-SP and elastic weight consolidation")
@works("Training loops", "Penalties on the shards themselves (p.abs().sum())")
@works("Training loops", "Hypernetwork on full_tensor()")
@works("Training loops", "A penalty's backward() of its own")
@pytest.mark.parametrize("world_size, layouts", [(2, [(2, 1)]), (4, [(1, 1), (2, 3), (4, 1)])], ids=["two", "four"])
def test_gradients_from_outside_of_the_model_are_added_as_in_one_process(
    pool: WorkerPool, world_size: int, layouts: list[tuple[int, int]]
) -> None:
    for found in pool.run(parity, LOSSES, layouts, world_size=world_size, timeout=120):
        check(found)


def plain(model: Any, x: Tensor, loss: Callable[[], Tensor]) -> list[Tensor]:
    return [loss()]


def freeze_rows(grad: Tensor) -> Tensor:
    grad = grad.clone()
    grad[:2] = 0
    return grad


MASK = torch.arange(42.0).view(7, 6).remainder(2)


def halve(param: nn.Parameter) -> None:
    assert param.grad is not None
    param.grad.mul_(0.5)


def hook_all(model: Any) -> None:
    """Functions that are linear or not, elementwise or not, and one that only looks."""
    model.seen = []
    a, b = model.blocks[0].a, model.blocks[1].b
    a.weight.register_hook(lambda grad: grad * MASK)
    a.bias.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))
    b.weight.register_hook(lambda grad: grad / (grad.norm() + 1e-2))
    b.weight.register_hook(freeze_rows)
    b.bias.register_hook(lambda grad: model.seen.append(grad.norm().item()))
    model.head.weight.register_hook(lambda grad: grad + 1)
    model.head.bias.register_post_accumulate_grad_hook(halve)
    model.scale.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))
    model.level.register_hook(lambda grad: grad / (grad.abs() + 0.1))
    model.level.register_post_accumulate_grad_hook(halve)
    model.blocks[2].a.weight.register_hook(lambda grad: grad + 1)  # no gradient, so it is never called
    model.removed = a.weight.register_hook(lambda grad: grad * 0)


def prune(model: Any) -> None:
    for param in weights(model):
        param.register_hook(lambda grad, param=param: grad * (param.detach() > 0))


def clamp_when_gathered(model: Any) -> None:
    """Registers hooks in the first forward pass, on the whole parameters that it works with."""

    def register(module: Any, args: object) -> None:
        for param in module.parameters(recurse=False):
            assert not isinstance(param, DTensor)
            param.register_hook(lambda grad: (grad * 2).clamp(-0.1, 0.1))
        handles.pop(module).remove()

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = {layer: layer.register_forward_pre_hook(register) for layer in layers}


def hooked(prepare: Prepare, before: bool, losses: Loss, shard: int) -> dict[str, float]:
    """Returns how far gradients are off with hooks that were registered before sharding or after it."""
    torch.manual_seed(0)
    reference = Net()
    model = copy.deepcopy(reference)
    for each in (reference, model) if before else (reference,):
        prepare(each)
    mics_shard(model, MiCSConfig(shard_size=shard, node_size=2))
    if not before:
        prepare(model)
    found = {}
    for accumulate in (1, 3, 1):
        name = f"{prepare.__name__}, before={before}, {losses.__name__}, p={shard}, {accumulate}"
        found[name] = gradients(losses, model, reference, accumulate)
        if hasattr(model, "removed"):
            found[f"{name}, seen"] = max(abs(a - b) for a, b in zip(model.seen, reference.seen, strict=True))
            model.removed.remove()
            reference.removed.remove()
    return found


def all_hooked() -> dict[str, float]:
    world = dist.get_world_size()
    return {
        **hooked(hook_all, True, plain, 2),
        **hooked(hook_all, False, l1_after, 2),
        **hooked(hook_all, False, two_losses, world),
        **hooked(prune, False, l1_before, 1),
        **hooked(clamp_when_gathered, False, plain, 2),
    }


@works("Training loops", "Gradient hooks: p.register_hook, also from before sharding or in a pass")
@works("Training loops", "Gradient hooks: p.register_post_accumulate_grad_hook")
def test_hooks_see_the_gradient_that_one_process_would_have(pool: WorkerPool) -> None:
    for found in pool.run(all_hooked, world_size=4, timeout=120):
        check(found)


def hook_on_one_rank() -> str:
    model: Any = mics_shard(Net(), MiCSConfig(shard_size=2, node_size=2))
    model(data(dist.get_rank(), 0)).sum().backward()
    if dist.get_rank() == 0:
        model.blocks[0].a.weight.register_hook(lambda grad: print(grad.norm()))
    with pytest.raises(SelfCheckError) as error:
        model(data(dist.get_rank(), 0)).sum().backward()
    return str(error.value)


ON_ONE_RANK = refused("Training loops", "Gradient hooks on some ranks only", says="register them on every rank")


@ON_ONE_RANK
def test_hooks_on_one_rank_are_refused(pool: WorkerPool) -> None:
    first, *others = pool.run(hook_on_one_rank, world_size=4)
    assert "blocks.0.a.weight" in first
    for message in [first, *others]:
        ON_ONE_RANK.check(message)


def look_without_adding() -> list[float]:
    """Returns gradients before and after ``torch.autograd.grad``, which reaches a shard and adds nothing."""
    torch.manual_seed(0)
    model: Any = mics_shard(Net(), MiCSConfig(shard_size=2, node_size=2))
    weight = model.blocks[0].a.weight
    weight.register_hook(lambda grad: grad * 2)
    model(data(dist.get_rank(), 0)).sum().backward()
    before = whole(weight.grad).clone()
    (looked,) = torch.autograd.grad(whole(weight).pow(2).sum(), [weight])
    return [
        (whole(weight.grad) - before).abs().max().item(),
        (whole(looked) - 2 * whole(weight.detach())).abs().max().item(),
    ]


def test_autograd_grad_of_a_penalty_adds_nothing(pool: WorkerPool) -> None:
    for differences in pool.run(look_without_adding, world_size=4):
        assert max(differences) <= BOUND


@pytest.mark.parametrize("averages_first", [True, False])
def test_what_wraps_full_tensor_stays_whichever_comes_first(
    averages_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or ranks whose first models differ would send other collectives for one gradient."""
    for owner, name in ((_ToTorchTensor, "forward"), (_ToTorchTensor, "backward"), (DTensor, "data")):
        monkeypatch.setattr(owner, name, vars(owner).get(name, getattr(owner, name)))
    monkeypatch.setattr(DTensor, "full_tensor", inspect.unwrap(DTensor.full_tensor))
    installs = [dtensor_gradients._install.__wrapped__, dtensors._install.__wrapped__]
    for install in installs if averages_first else reversed(installs):
        install()
    wrappers, function = set(), DTensor.full_tensor
    while hasattr(function, "__wrapped__"):
        wrappers.add(function.__code__.co_filename)
        function = function.__wrapped__
    assert wrappers == {dtensor_gradients.__file__, dtensors.__file__}
