"""What is set on, written to and kept of ``parameters()``, while they are gathered or not, and norms of shards."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication
from works import refused, works

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core.runtime import is_sharded
from lightning_mics.errors import MiCSError, SelfCheckError
from lightning_mics.testing import WorkerPool, assert_parity, full_state_dict, weight_differences

STEPS, ROWS, WIDTH = 2, 4, 6


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.down(torch.tanh(self.up(rows)))


class Net(nn.Module):
    """Two units and layers of the root; may do something inside of its forward pass."""

    def __init__(self, inside: Callable[[Net], None] | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.parts = nn.ModuleList(Part() for _ in range(2))
        self.inside = inside

    def forward(self, rows: Tensor) -> Tensor:
        if self.inside is not None:
            self.inside(self)
        rows = self.first(rows)
        for part in self.parts:
            rows = part(rows)
        return self.last(rows)

    def step(self, rows: Tensor) -> Tensor:
        return self(rows).square().mean()


class NormedPart(Part):
    """Normalises its own weight in each forward pass."""

    def forward(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.weight.copy_(F.normalize(self.up.weight, dim=1))
        return super().forward(rows)


@torch.no_grad()
def normalise(model: Net) -> None:
    """Also by way of aliases, of which autograd keeps no version."""
    model.last.weight.copy_(F.normalize(model.last.weight, dim=1))
    model.first.weight.data.copy_(F.normalize(model.first.weight.data, dim=1))
    model.first.bias.data[:2].clamp_(-0.1, 0.1)


@torch.no_grad()
def assign(model: Net) -> None:
    model.last.weight.data = F.normalize(model.last.weight.data, dim=1)


def freeze(model: Net) -> None:
    model.first.requires_grad_(False)
    model.parts[0].up.weight.requires_grad_(False)


def freeze_layer(model: Net) -> None:
    model.first.weight.requires_grad = False


@torch.no_grad()
def clamp(model: nn.Module) -> None:
    for param in model.parameters():
        param.clamp_(-0.2, 0.2)


def clamp_data(model: nn.Module) -> None:
    for param in model.parameters():
        param.data.clamp_(-0.2, 0.2)


def assign_data(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = param.data * 0.9
        param.data = param.data.clamp(-0.2, 0.2)


@torch.no_grad()
def clamp_together(model: nn.Module) -> None:
    torch._foreach_clamp_max_(list(model.parameters()), 0.2)


@torch.no_grad()
def assign_whole(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = torch.linspace(-0.3, 0.3, param.numel()).view(param.shape)


def swap(model: nn.Module) -> None:
    """As an evaluation with averaged weights does: there and back, and there for good."""
    averages = [param.data * 0.5 for param in model.parameters()]
    for _ in range(3):
        for index, param in enumerate(model.parameters()):
            kept = param.data
            param.data, averages[index] = averages[index], kept


def local_rows(model: nn.Module, index: int) -> list[Tensor]:
    """Returns the rows of this rank, or those of all ranks where nothing is sharded."""
    generator = torch.Generator().manual_seed(index)
    rows = torch.randn(dist.get_world_size(), ROWS, WIDTH, generator=generator)
    return [rows[dist.get_rank()]] if is_sharded(model) else list(rows)


def train(
    model: nn.Module,
    accumulate: int,
    *,
    before: Callable[[nn.Module], None] = lambda model: None,
    evaluates: Callable[[], Any] = torch.enable_grad,
    update: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, optimizer: optimizer.step(),
    early: bool = True,
) -> None:
    """Trains; each step begins with a forward pass without a backward pass, after which ``before`` is called."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if early else None
    for step in range(STEPS):
        with evaluates():
            for rows in local_rows(model, 100 + step):
                model(rows)
        if optimizer is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        before(model)
        for micro in range(accumulate):
            mine = local_rows(model, step * accumulate + micro)
            with defer_replication_sync(model) if is_sharded(model) and micro < accumulate - 1 else nullcontext():
                for rows in mine:
                    (model.step(rows) / accumulate / len(mine)).backward()
        update(model, optimizer)
        optimizer.zero_grad()


def lars(model: nn.Module, optimizer: object) -> None:
    """Layer-wise adaptive rates, with numbers taken off the device."""
    with torch.no_grad():
        for param in model.parameters():
            if not torch.isnan(param.grad).any() and float(param.norm()) > 0:
                param.sub_(param.grad * (0.01 * param.norm().item() / (param.grad.norm().item() + 1e-6)))
                param.mul_(1 if param.grad.abs().sum().item() < 0.1 else 0.9)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "frozen between passes": (Net, {"before": freeze}),
    "frozen in forward": (partial(Net, freeze), {}),
    "a weight frozen in forward": (partial(Net, freeze_layer), {}),
    "clamped": (Net, {"before": clamp}),
    "clamped after an evaluation": (Net, {"before": clamp_together, "evaluates": torch.no_grad}),
    "data clamped": (Net, {"before": clamp_data}),
    "data assigned": (Net, {"before": assign_data}),
    "whole data assigned": (Net, {"before": assign_whole}),
    "data swapped": (Net, {"before": swap}),
    "optimizer after a pass": (Net, {"early": False}),
    "normalised in forward": (partial(Net, normalise), {}),
    "assigned in forward": (partial(Net, assign), {}),
    "norms": (Net, {"update": lars}),
}


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    if isinstance(model, Net) and model.inside is normalise:
        model.parts[0] = NormedPart()
    return model


def layouts() -> Iterator[MiCSConfig]:
    world = dist.get_world_size()
    for shard_size in {1, 2, world}:
        for reshard in (True, False):
            yield MiCSConfig(shard_size=shard_size, node_size=world, wrap=Part, reshard_after_forward=reshard)


def _every_case() -> None:
    failures = []
    for index, (name, (make, how)) in enumerate(CASES.items()):
        for accumulate in (1, 3):
            alone = build(make)
            train(alone, accumulate, **how)
            for config in list(layouts())[(index + accumulate) % 2 :: 2]:
                model = mics_shard(build(make), config)
                train(model, accumulate, **how)
                off = max(weight_differences(full_state_dict(model), alone.state_dict()).values())
                if off > 1e-5:
                    failures.append((name, accumulate, config.shard_size, config.reshard_after_forward, off))
    assert not failures, failures


@works("Training loops", "Parameters clamped, frozen, assigned or swapped (`p.data = x`) between passes")
@works("Training loops", "Weights normalised, assigned or frozen inside of `forward`, also by way of `p.data`")
@works("Training loops", "`torch._foreach_` operations on `parameters()`")
@works("Training loops", "An optimizer made after a forward pass")
@works("Training loops", "LARS and LAMB code with `p.grad.norm().item()`")
@pytest.mark.parametrize("world_size", [2, 4])
def test_what_is_done_to_parameters_counts(pool: WorkerPool, world_size: int) -> None:
    pool.run(_every_case, world_size=world_size, timeout=150)


def _adversaries(ranks: Iterable[int], generator: nn.Module, judge: nn.Module, average: nn.Module) -> None:
    """Trains one of two networks at a time, the other one frozen; an average follows the judge, and helps it."""
    ranks = list(ranks)
    average.requires_grad_(False)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (generator, judge)]
    for step in range(STEPS):
        for trained, frozen, optimizer in zip((judge, generator), (generator, judge), optimizers[::-1], strict=True):
            frozen.requires_grad_(False)
            trained.requires_grad_(True)
            for rank in ranks:
                rows = rows_of(rank, step)
                made = F.pad(generator(rows), (0, 1))
                score = judge(made).square().mean() + average(made).square().mean()
                loss = score if trained is generator else judge(rows).square().mean() - 0.1 * score
                (loss / len(ranks)).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mean, param in zip(average.parameters(), judge.parameters(), strict=True):
                    mean.mul_(0.9).add_(param, alpha=0.1)


def rows_of(rank: int, index: int) -> Tensor:
    return torch.randn(8, ROWS, WIDTH, generator=torch.Generator().manual_seed(index))[rank]


def _toggled() -> None:
    nets = [build(Net, seed=seed) for seed in (1, 2, 2)]
    _adversaries(range(dist.get_world_size()), *nets)
    for config in layouts():
        sharded = [mics_shard(build(Net, seed=seed), config) for seed in (1, 2, 2)]
        _adversaries([dist.get_rank()], *sharded)
        for net, alone in zip(sharded, nets, strict=True):
            assert_parity(full_state_dict(net), alone.state_dict())


@works("Training loops", "Adversaries, each frozen while the other one trains; momentum encoders")
def test_requires_grad_and_momentum_between_networks(pool: WorkerPool) -> None:
    pool.run(_toggled, world_size=4)


@torch.no_grad()
def _scale(model: Net) -> None:
    model.last.bias.mul_(0.5)


LOW_PRECISION = refused("Training loops", "Parameters written in a bfloat16 gather", says="and its shard keeps float32")
GATHERED = refused(
    "Training loops", "An optimizer made inside of `forward`", says="Create the optimizer outside of forward"
)
REPLACED = refused("Training loops", "Parameters replaced after `mics_shard`", says="was sharded has")
PICKLED = refused("Savers", "`torch.save(model)`, pickle", says="pickle (torch.save of a whole module) cannot copy")
PART = refused("Training loops", "Writing to rows, slices or diagonals of a shard", says="so the write would be lost")
FUNCTIONAL = refused("Training loops", "`torch.func.functional_call`", says="works with models that are not sharded")
NUMPY = refused("Training loops", "`p.numpy()` inside of `forward`", says="Copy it first")
OTHER_SHAPE = refused("Training loops", "`p.data = x` of another dtype", says="Assign the same shape and dtype")


def _refusals() -> list[str]:
    rows, said = rows_of(dist.get_rank(), 0), []

    def note(call: Callable[[], object]) -> None:
        with pytest.raises(MiCSError) as caught:
            call()
        said.append(str(caught.value))

    low = mics_shard(build(partial(Net, _scale)), MiCSConfig(wrap=Part, shard_size=2, param_dtype="bf16"))
    note(lambda: low(rows))

    made: list[torch.optim.Optimizer] = []
    early = build(partial(Net, lambda model: made.append(torch.optim.SGD(model.last.parameters(), lr=0.1))))
    mics_shard(early, MiCSConfig(wrap=Part, shard_size=2))(rows).sum().backward()
    note(made[0].step)

    model = mics_shard(build(Net), MiCSConfig(wrap=Part, shard_size=2))
    with torch.no_grad():
        model(rows)
    note(lambda: pickle.dumps(model))
    note(lambda: setattr(model.last.weight, "data", model.last.weight.data.bfloat16()))
    note(lambda: model.last.weight.data[0].zero_())
    note(lambda: torch._foreach_mul_([model.parts[0].up.weight.detach()[:2]], 2.0))
    note(lambda: torch.func.functional_call(model, {"last.bias": torch.zeros(5)}, (rows,)))
    torch.nn.utils.parametrizations.weight_norm(model.last)
    note(lambda: model(rows))
    other = mics_shard(build(Net), MiCSConfig(wrap=Part, shard_size=2))
    other.parts[1].up.weight = nn.Parameter(torch.zeros(9, WIDTH))
    note(lambda: other(rows))
    looks = build(partial(Net, lambda model: model.last.weight.detach().numpy().sum()))
    note(lambda: mics_shard(looks, MiCSConfig(wrap=Part, shard_size=2))(rows).sum().backward())
    return said


@LOW_PRECISION
@GATHERED
@REPLACED
@PICKLED
@OTHER_SHAPE
@PART
@FUNCTIONAL
@NUMPY
def test_what_cannot_count_is_refused(pool: WorkerPool) -> None:
    for said in pool.run(_refusals, world_size=2):
        LOW_PRECISION.check(said[0])
        GATHERED.check(said[1])
        PICKLED.check(said[2])
        OTHER_SHAPE.check(said[3])
        for text in said[4:6]:
            PART.check(text)
        FUNCTIONAL.check(said[6])
        NUMPY.check(said[9])
        for text, name in zip(said[7:9], ("last.weight", "parts.1.up.weight"), strict=True):
            REPLACED.check(text)
            assert name in text


def _stale_graph() -> None:
    """A graph that has saved parameters is of no use after they have changed, as on one process."""
    for config in layouts():
        for make_step in (lambda p: torch.optim.SGD(p, lr=0.1).step, lambda p: partial(clamp_all, p)):
            model = mics_shard(build(Net), config)
            model(rows_of(0, 0)).sum().backward()
            step = make_step(list(model.parameters()))
            loss = model(rows_of(0, 1)).sum()
            step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            model(rows_of(0, 2)).sum().backward()


@torch.no_grad()
def clamp_all(params: list[nn.Parameter]) -> None:
    for param in params:
        param.clamp_(-0.1, 0.1)


def test_a_graph_older_than_its_parameters_is_refused(pool: WorkerPool) -> None:
    pool.run(_stale_graph, world_size=2)


class Table(nn.Module):
    """Embeddings whose rows are renormalised when they are looked up, in the root and in a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, WIDTH, max_norm=1.0)
        self.bag = nn.EmbeddingBag(11, WIDTH, max_norm=0.7, norm_type=1.0)
        self.parts = nn.ModuleList([Part()])

    def forward(self, rows: Tensor) -> Tensor:
        words = (rows * 3).long().abs() % 11
        return self.parts[0](self.table(words).sum(1) + self.bag(words))

    def step(self, rows: Tensor) -> Tensor:
        return self(rows).square().mean()


def _tables() -> None:
    for accumulate in (1, 3):
        alone = build(Table)
        train(alone, accumulate)
        for config in layouts():
            model = mics_shard(build(Table), config)
            train(model, accumulate)
            assert_parity(full_state_dict(model), alone.state_dict())


@works("Model kinds", "`nn.Embedding(max_norm=)`, `nn.EmbeddingBag(max_norm=)`")
def test_rows_that_any_rank_looked_up_are_renormalised(pool: WorkerPool) -> None:
    pool.run(_tables, world_size=4)


class Centres(Net):
    """Writes what its own rank has seen."""

    def forward(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.bias.add_(rows.mean())
        return super().forward(rows)


def _different_writes() -> str:
    model = mics_shard(build(Centres), MiCSConfig(wrap=Part, shard_size=2))
    with pytest.raises(SelfCheckError) as caught:
        model(rows_of(dist.get_rank(), 0)).sum().backward()
    return str(caught.value)


DIFFERENT = refused(
    "Training loops", "Parameters written differently by ranks in `forward`", says="Ranks wrote different values"
)


@DIFFERENT
def test_writes_that_differ_are_refused(pool: WorkerPool) -> None:
    for said in pool.run(_different_writes, world_size=4):
        DIFFERENT.check(said)
        assert "last.bias" in said


def write_rows() -> list[float]:
    """Writes that DTensor works out of other operations, of which it would keep nothing."""
    model = mics_shard(nn.Linear(4, 6), MiCSConfig(shard_size=2))
    weight: Any = model.weight
    rows, values = torch.tensor([1, 4]), torch.full((2, 4), 7.0)
    found = []
    with implicit_replication():
        for write in (
            lambda tensor: tensor.index_copy_(0, rows, values),
            lambda tensor: tensor.index_add_(0, rows, values),
            lambda tensor: tensor.scatter_add_(0, rows[:, None].expand(2, 4), values),
            lambda tensor: tensor.cumsum_(0),
            lambda tensor: tensor.tril_(),
        ):
            expected = write(weight.full_tensor().detach().clone())
            version = weight._version
            write(weight.data)
            assert weight._version > version
            found.append((weight.full_tensor() - expected).abs().max().item())
    return found


@works("Training loops", "`index_copy_`, `index_add_`, `scatter_add_`, `tril_` and the like on shards")
def test_writes_made_of_other_operations_count(pool: WorkerPool) -> None:
    assert pool.run(write_rows, world_size=2) == [[0.0] * 5] * 2
