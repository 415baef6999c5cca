"""Clipping takes the shards, whatever is gathered at the moment, and through every way in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate_tools import make_accelerator
from lightning.fabric import Fabric
from lightning_tools import PoolEnvironment
from torch import Tensor, nn
from works import works

from lightning_mics import MiCSConfig, clip_grad_norm_, defer_replication_sync, mics_shard, sync_gradients
from lightning_mics.fabric import MiCSStrategy
from lightning_mics.testing import WorkerPool

SETTINGS: dict[str, Any] = {"shard_size": 2, "node_size": 2}


class Net(nn.Module):
    """Owns parameters outside of its units, and fails where it is told to."""

    fails = ""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Tanh())) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.first(x))
        if self.fails == "forward":
            raise ValueError("a sample that is too long")
        if self.fails == "backward":
            x = _Failing.apply(x)
        return self.head(self.blocks[1](x))


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ValueError("out of memory, say")


# Each leaves parameters gathered, or did once.


def nothing(model: Any, x: Tensor) -> None:
    pass


def extra_pass(model: Any, x: Tensor) -> None:
    model(x)


def evaluation(model: Any, x: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()


def failed_forward(model: Any, x: Tensor) -> None:
    failing(model, x, "forward")


def failed_backward(model: Any, x: Tensor) -> None:
    failing(model, x, "backward")


def failing(model: Any, x: Tensor, where: str) -> None:
    net = getattr(model, "module", model)  # Fabric's wrapper has it inside
    net.fails = where
    try:
        model(x).sum().backward()
    except ValueError:
        pass
    else:
        raise AssertionError(f"the {where} pass did not fail")
    finally:
        net.fails = ""


LEAVES = [nothing, extra_pass, evaluation, failed_forward, failed_backward]
Clip = Callable[[Any, list[nn.Parameter]], "Tensor | None"]
MAX = 0.5


def bare(settings: dict[str, Any]) -> tuple[Any, Clip]:
    return mics_shard(Net(), MiCSConfig(**settings)), lambda model, params: clip_grad_norm_(model, MAX)


def accelerate(settings: dict[str, Any]) -> tuple[Any, Clip]:
    accelerator = make_accelerator(settings=settings)
    return accelerator.prepare(Net()), lambda model, params: accelerator.clip_grad_norm_(params, MAX)


def accelerate_by_value(settings: dict[str, Any]) -> tuple[Any, Clip]:
    accelerator = make_accelerator(settings=settings)
    return accelerator.prepare(Net()), lambda model, params: accelerator.clip_grad_value_(params, MAX)


def fabric(settings: dict[str, Any], **limit: float) -> tuple[Any, Clip]:
    strategy = MiCSStrategy(**settings)
    fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy, plugins=[PoolEnvironment()])
    fabric.launch()
    model = fabric.setup_module(Net())
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    return model, lambda model, params: fabric.clip_gradients(model, optimizer, **(limit or {"max_norm": MAX}))


def fabric_by_value(settings: dict[str, Any]) -> tuple[Any, Clip]:
    return fabric(settings, clip_val=MAX)


def torchs(settings: dict[str, Any]) -> tuple[Any, Clip]:
    return bare(settings)[0], lambda model, params: nn.utils.clip_grad_norm_(params, MAX)


WAYS = [bare, accelerate, accelerate_by_value, fabric, fabric_by_value, torchs]


def clip(way: Callable[..., tuple[Any, Clip]], leave: Callable[..., None], settings: dict[str, Any]) -> str:
    """Returns what is wrong with gradients that were clipped after something that leaves parameters gathered."""
    torch.manual_seed(0)
    model, clipped = way(settings)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    shards = dict(model.named_parameters())
    with defer_replication_sync(model):
        model(x).pow(2).sum().backward()
    sync_gradients(model)
    leave(model, x)
    if leave is failed_backward:  # what it came to is in the gradients, as in one process
        sync_gradients(model)
    before = {name: shard.grad.full_tensor().clone() for name, shard in shards.items()}
    norm = clipped(model, list(model.parameters()))
    total = torch.cat([grad.flatten() for grad in before.values()]).norm()
    wrong = [] if norm is None or abs(float(norm) / total - 1) < 1e-5 else [f"norm {float(norm)}, not {total}"]
    for name, grad in before.items():
        expected = grad.clamp(-MAX, MAX) if "value" in way.__name__ else grad * MAX / (total + 1e-6)
        if not torch.allclose(shards[name].grad.full_tensor(), expected, rtol=1e-5, atol=1e-7):
            wrong.append(name)
    return ", ".join(wrong)


def clip_everywhere() -> dict[str, str]:
    found = {}
    for way in WAYS:
        for leave in LEAVES:
            for stay in (False, True) if leave in (extra_pass, evaluation) else (False,):
                settings = {**SETTINGS, "reshard_after_forward": not stay, "wrap": ["Sequential"]}
                found[f"{way.__name__} after {leave.__name__}, stay={stay}"] = clip(way, leave, settings)
    return {name: wrong for name, wrong in found.items() if wrong}


@works("Training loops", "Clipping after an extra forward pass, an evaluation, or a pass that failed")
def test_shards_are_clipped_whatever_is_gathered(pool: WorkerPool) -> None:
    assert pool.run(clip_everywhere, world_size=4, timeout=120) == [{}] * 4
