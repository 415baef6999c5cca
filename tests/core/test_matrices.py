"""Optimizers that look at whole matrices: each matrix has an owner, which takes the step on it for all."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor as TransformersAdafactor
from works import refused, works

from lightning_mics import MiCSConfig, load_checkpoint, mics_shard, save_checkpoint
from lightning_mics.core import owners
from lightning_mics.core.slices import is_slice
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

BOUND = 1e-5
NUM_MATRICES = 6


counts: Counter[int] = Counter()  # of what was orthogonalised on this rank


def zeropower_via_newtonschulz5(grad: Tensor, steps: int) -> Tensor:
    """As users write it: five steps in bfloat16, of the wide form of a matrix."""
    counts[0] += 1
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = grad.bfloat16()
    if grad.size(-2) > grad.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if grad.size(-2) > grad.size(-1) else x


def muon_update(grad: Tensor, momentum: Tensor, beta: float = 0.95, ns_steps: int = 5) -> Tensor:
    momentum.lerp_(grad, 1 - beta)
    update = zeropower_via_newtonschulz5(grad.lerp(momentum, beta), steps=ns_steps)
    return update * max(1, grad.size(-2) / grad.size(-1)) ** 0.5


class OwnMuon(torch.optim.Optimizer):
    """The common form of Muon outside of PyTorch, which also steps where there is no gradient."""

    def __init__(self, params: Any, lr: float = 0.02, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                state = self.state[p]
                if len(state) == 0:
                    state["momentum_buffer"] = torch.zeros_like(p)
                update = muon_update(p.grad, state["momentum_buffer"], beta=group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"])
        return loss


class OfBase(torch.optim.Muon):
    """A step around PyTorch's own."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
        return loss


class Spectral(torch.optim.Optimizer):
    """Shampoo in short: roots of both factors, with states of other shapes than the parameter."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad
                if not state:
                    state["step"] = 0
                    state["left"] = 0.1 * torch.eye(len(g), dtype=g.dtype)
                    state["right"] = 0.1 * torch.eye(g.shape[1], dtype=g.dtype)
                state["step"] += 1
                state["left"] += g @ g.T
                state["right"] += g.T @ g
                left, right = (self.root(state[name]) for name in ("left", "right"))
                p.add_(left @ g @ right, alpha=-group["lr"])

    @staticmethod
    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp(min=1e-6) ** -0.25) @ vectors.T


class Lamb(torch.optim.Optimizer):
    """Layer-wise trust ratios, with norms taken off the device."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].mul_(0.9).add_(p.grad, alpha=0.1)
                state["exp_avg_sq"].mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-3) + 0.01 * p
                ratio = p.norm().item() / max(update.norm().item(), 1e-6)
                p.add_(update, alpha=-group["lr"] * ratio)


class Sharing(OwnMuon):
    """Shares out matrices among ranks itself."""

    def step(self, closure: Any = None) -> Any:
        dist.all_gather([torch.zeros(1) for _ in range(dist.get_world_size())], torch.zeros(1))


class Declared(Lamb):
    """A step that says of itself what it needs, and fails where it meets a certain shape."""

    steps_on_whole_parameters = True

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                assert not isinstance(p, DTensor)
                if p.shape == (3, 5):
                    raise ValueError("no matrix of 3 rows")


OPTIMIZERS: dict[str, Any] = {
    "torch.optim.Muon": lambda params: torch.optim.Muon(params, lr=0.02),
    "a Muon of one's own (`zeropower_via_newtonschulz5`)": OwnMuon,
    "a class derived from `torch.optim.Muon`": OfBase,
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.02),
    "transformers' Adafactor": TransformersAdafactor,
    "Shampoo (`torch.linalg.eigh` of factors)": Spectral,
    "LAMB (`norm().item()`)": Lamb,
}


class Net(nn.Module):
    """Matrices that are wide, tall, uneven, of fewer rows than ranks, unused, with rates of their own."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(7, 10), (10, 5), (5, 3), (3, 12), (12, 1)]
        self.layers = nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)
        self.unused = nn.Linear(4, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def groups(self) -> list[dict[str, Any]]:
        rest = [param for name, param in self.named_parameters() if name != "layers.1.weight"]
        return [{"params": rest}, {"params": self.layers[1].parameters(), "lr": 0.01}]


def rows(rank: int, step: int) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * step + rank))


def sharded(reference: nn.Module, p: int, q: Any) -> Any:
    config = MiCSConfig(shard_size=p, node_size=2, optimizer_shard_size=q, wrap=nn.Linear)
    return mics_shard(copy.deepcopy(reference), config)


def train(name: str, p: int, q: Any, steps: int) -> float:
    """Returns how far weights are from those of one process."""
    rank, world, make = dist.get_rank(), dist.get_world_size(), OPTIMIZERS[name]
    torch.manual_seed(0)
    reference = Net()
    model = sharded(reference, p, q)
    optimizer, expected = make(model.groups()), make(reference.groups())
    for step in range(steps):
        everyones = torch.cat([rows(other, step) for other in range(world)])
        for each, stepping, x in ((model, optimizer, rows(rank, step)), (reference, expected, everyones)):
            (each(x) - 0.5).square().mean().backward()
            stepping.step()
            stepping.zero_grad()
    for group, wanted in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert group.get("taken") == wanted.get("taken")
    for param, states in optimizer.state.items():
        for value in states.values():
            divided = isinstance(value, Tensor) and value.shape == param.shape
            assert not divided or (isinstance(value, DTensor) and is_slice(value) == (q != "partition"))
    return max(weight_differences(full_state_dict(model), reference.state_dict()).values())


def differences(names: list[str], layouts: list[tuple[int, Any]], steps: int) -> dict[str, float]:
    return {f"{name}, p={p}, q={q}": train(name, p, q, steps) for name in names for p, q in layouts}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=works("Optimizers", f"{name} with optimizer_shard_size")) for name in OPTIMIZERS]
)
def test_training_equals_one_process(pool: WorkerPool, name: str) -> None:
    is_muon = "Muon" in name
    layouts: list[tuple[int, Any]] = [(2, "world"), *([(2, "partition"), (1, 2)] if is_muon else [])]
    for found in pool.run(differences, [name], layouts, 5 if is_muon else 3, world_size=4):
        assert {key: value for key, value in found.items() if not value <= BOUND} == {}


def orthogonalised(p: int, q: Any, elements: int) -> tuple[float, int]:
    """Returns how far weights are from those of one process, and how much this rank has worked on shards."""
    counts.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "_ELEMENTS", elements)
        difference = train("a Muon of one's own (`zeropower_via_newtonschulz5`)", p, q, 2)
    return difference, counts[0] - 2 * NUM_MATRICES


@pytest.mark.parametrize("p, q, instances, elements", [(2, "world", 1, 2**24), (2, "partition", 2, 1), (1, 2, 2, 20)])
def test_each_matrix_has_one_owner(pool: WorkerPool, p: int, q: Any, instances: int, elements: int) -> None:
    found = pool.run(orthogonalised, p, q, elements, world_size=4)
    assert sum(number for _, number in found) == 2 * NUM_MATRICES * instances
    assert max(difference for difference, _ in found) <= BOUND


def resumed(folder: Path) -> dict[str, float]:
    """Returns how far weights are from those of one process after a resumption at another layout."""
    found = {}
    layouts: list[tuple[int, Any]] = [(2, "world"), (1, 2), (4, "partition"), (1, "world")]
    for name in ("torch.optim.Muon", "Adafactor", "Shampoo (`torch.linalg.eigh` of factors)"):
        torch.manual_seed(0)
        reference = Net()
        expected = OPTIMIZERS[name](reference.groups())
        for step, (p, q) in enumerate(layouts):
            torch.manual_seed(1)
            model = sharded(Net() if step else reference, p, q)
            optimizer = OPTIMIZERS[name](model.groups())
            if step:
                load_checkpoint(folder / name.split()[0], model, optimizer)
            everyones = torch.cat([rows(other, step) for other in range(dist.get_world_size())])
            for each, x in ((model, rows(dist.get_rank(), step)), (reference, everyones)):
                (each(x) - 0.5).square().mean().backward()
            optimizer.step()
            expected.step()
            expected.zero_grad()
            save_checkpoint(folder / name.split()[0], model, optimizer, sharded=bool(step % 2))
        found[name] = max(weight_differences(full_state_dict(model), reference.state_dict()).values())
    return found


@works("Savers", "States of Muon, Adafactor and Shampoo, loaded at any other layout")
def test_states_go_to_other_layouts(pool: WorkerPool, tmp_path: Path) -> None:
    for found in pool.run(resumed, tmp_path, world_size=4):
        assert max(found.values()) <= BOUND, found


def stepping(cls: Any) -> None:
    torch.manual_seed(0)
    model = sharded(Net(), 2, "world")
    optimizer = cls(model.parameters())
    model(rows(dist.get_rank(), 0)).square().mean().backward()
    optimizer.step()


def test_a_step_that_fails_at_an_owner_fails_everywhere(pool: WorkerPool) -> None:
    kinds = {failure.kind for failure in pool.attempt(stepping, Declared, world_size=4)}
    assert kinds == {"ValueError", "MiCSError"}
    for failure in pool.attempt(stepping, Declared, world_size=4):
        assert "no matrix of 3 rows" in failure.message


SHARING = refused("Optimizers", "Muon that shares out matrices by itself", says="by itself (all_gather)")


@SHARING
def test_a_step_that_shares_out_matrices_itself_is_refused(pool: WorkerPool) -> None:
    for failure in pool.attempt(stepping, Sharing, world_size=2):
        SHARING.check(failure.message)
