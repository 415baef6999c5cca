"""Parameters that stay whole on every rank: scalars, those without elements, complex ones, and those of ``ignore=``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from way_tools import ROWS, WAYS, WIDTH, Rows, adamw, differences, sgd
from works import works

from lightning_mics import (
    Hop,
    MiCSConfig,
    communication_ledger,
    defer_replication_sync,
    mics_shard,
    sync_gradients,
)
from lightning_mics.checkpoint import load_checkpoint, save_checkpoint
from lightning_mics.core.whole import whole_parameters
from lightning_mics.errors import MiCSConfigError
from lightning_mics.testing import WorkerPool, full_state_dict, weight_differences

BOUND = 1e-5


class Mixed(nn.Module):
    """Parameters of every kind that stays whole, and channels-last weights, which do not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.phases = nn.Parameter(torch.randn(5, dtype=torch.cfloat))
        self.kept, self.unused = nn.Parameter(torch.randn(5)), nn.Parameter(torch.ones(3))
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        hidden = self.down(torch.tanh(self.up(rows))) * self.scale.exp() * self.phases.abs() + self.kept
        image = self.conv(rows[:, :3, None, None].expand(-1, 3, 4, 4))
        return {"loss": (hidden + image.mean((1, 2, 3))[:, None]).square().mean()}


def make_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19}
    vision = {**sizes, "image_size": 2, "patch_size": 1}
    settings = {"text_config": text, "vision_config": vision, "projection_dim": 4}

    class Clip(CLIPModel):
        def forward(self, rows: Tensor) -> dict[str, Tensor]:
            tokens = (rows[:, :4].abs() * 10).long() % 20
            pixels = torch.cat([rows, rows.flip(1)], 1).view(-1, 3, 2, 2)
            found = super().forward(input_ids=tokens, pixel_values=pixels)
            return {"loss": (found.logits_per_image.diagonal() - 3).square().mean() / 100}

    return Clip(CLIPConfig(**settings))


def clip_like(ways: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for way in ways:
        for shard_size, accumulate, optimize in ((1, 1, sgd), (2, 3, adamw), (4, 3, sgd))[way != "bare" :]:
            settings = {"shard_size": shard_size, "node_size": 2}
            value = differences(make_clip, way, settings, optimize=optimize, accumulate=accumulate)
            found[f"{way}, p={shard_size}, {accumulate} microsteps"] = value
    return found


def check(results: list[dict[str, float]]) -> None:
    for found in results:
        assert found and {name: value for name, value in found.items() if not value <= BOUND} == {}


@works("Model kinds", "CLIP and others with scalar parameters")
@pytest.mark.parametrize("way", list(WAYS))
def test_models_like_clip_train_in_every_way(pool: WorkerPool, way: str) -> None:
    check(pool.run(clip_like, (way,), world_size=4, timeout=120))


def every_kind() -> dict[str, float]:
    found = {}
    for shard_size in (1, 2, 4):
        for accumulate, optimize in ((1, adamw), (3, sgd)):
            settings = {"shard_size": shard_size, "node_size": 2, "wrap": nn.Linear, "ignore": ["kept", "unused"]}
            value = differences(Mixed, "bare", settings, optimize=optimize, accumulate=accumulate)
            found[f"p={shard_size}, {accumulate} microsteps"] = value
    return found


@works("Model kinds", "parameters without elements")
@works("Model kinds", "complex parameters")
@works("Model kinds", "parameters that a user wants whole (`ignore=`)")
@works("Model kinds", "channels-last weights")
def test_every_kind_of_whole_parameter_trains(pool: WorkerPool) -> None:
    check(pool.run(every_kind, world_size=4))


class Scaled(nn.Module):
    """A block and a layer that is told by its class, a scalar, and a layer that the last row alone uses."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.head = nn.Linear(WIDTH, 4)
        self.routed = nn.Linear(WIDTH, 4)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.to(dtype)

    def forward(self, rows: Tensor, routed: bool = False) -> Tensor:
        hidden = self.body(rows.to(self.scale.dtype))
        return (self.routed(hidden) if routed else self.head(hidden)) * self.scale


def config(shard_size: int = 2, **settings: Any) -> MiCSConfig:
    defaults: dict[str, Any] = {"wrap": "Sequential", "ignore": ["head", "routed"]}
    return MiCSConfig(shard_size=shard_size, node_size=2, **{**defaults, **settings})


def sharded(shard_size: int = 2, **settings: Any) -> nn.Module:
    torch.manual_seed(dist.get_rank())
    return mics_shard(Scaled(), config(shard_size, **settings))


def is_alike(tensor: Tensor) -> bool:
    rank_0s = tensor.detach().clone()
    dist.broadcast(rank_0s, 0)
    return torch.equal(rank_0s, tensor)


def windows() -> dict[str, bool]:
    """What a window does beside adding up: one rank's use, deferral, a second pass, unused and frozen parameters."""
    found = {}
    for shard_size in (1, 2, 4):
        model, rank = sharded(shard_size), dist.get_rank()
        rows = Rows(1).of_rank(0, rank)
        routed = rank // shard_size == 0  # a unit's peers take one path
        model(rows, routed=routed).square().mean().backward()
        found[f"p={shard_size}: used by some"] = all(is_alike(p.grad) for p in model.routed.parameters())
        once = model.scale.grad.clone()
        model(rows, routed=routed).square().mean().backward()
        found[f"p={shard_size}: twice"] = torch.allclose(model.scale.grad, 2 * once) and is_alike(model.scale.grad)
        model.zero_grad()
        model.head.requires_grad_(False)
        with defer_replication_sync(model):
            model(rows).square().mean().backward()
        found[f"p={shard_size}: deferred"] = not is_alike(model.scale.grad) or rank == 0
        sync_gradients(model)
        found[f"p={shard_size}: synchronised"] = is_alike(model.scale.grad)
        found[f"p={shard_size}: unused"] = model.routed.weight.grad is None and model.head.weight.grad is None
        ledger = communication_ledger(model)
        calls = (
            ledger.total(Hop.PARTITION_REDUCE, "(whole)").calls,
            ledger.total(Hop.REPLICATION_REDUCE, "(whole)").calls,
        )
        found[f"p={shard_size}: ledger {calls}"] = calls == (3 * (shard_size > 1), 3 * (shard_size < 4))
    return found


def test_windows_of_whole_parameters(pool: WorkerPool) -> None:
    for found in pool.run(windows, world_size=4):
        assert [name for name, right in found.items() if not right] == []


def step_in_a_window() -> None:
    model = sharded(4)  # one replica: shards alone would need no second hop
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with defer_replication_sync(model):
        model(Rows(1).of_rank(0, dist.get_rank())).mean().backward()
    optimizer.step()


def test_no_step_on_whole_gradients_of_one_rank(pool: WorkerPool) -> None:
    for failure in pool.attempt(step_in_a_window, world_size=4):
        assert failure.kind == "UnsyncedGradientsError" and "sync_gradients(model)" in failure.message


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, clip: Callable[..., Any]) -> list[float]:
    rank = dist.get_rank() if any(isinstance(param, DTensor) for param in model.parameters()) else None
    norms = []
    for step in steps:
        model(Rows(9).of_rank(step, rank)).square().mean().backward()
        norms.append(float(clip(model.parameters(), 0.05)))
        nn.utils.clip_grad_value_(model.parameters(), 0.02)
        optimizer.step()
        optimizer.zero_grad()
    return norms


def saved_and_loaded(folder: Path) -> dict[str, float]:
    """PyTorch's own clipping; a save in the middle; and going on at another shard size, from shards and from a file."""
    torch.manual_seed(0)
    alone = Scaled()
    norms = train(alone, adamw(alone.parameters()), range(4), nn.utils.clip_grad_norm_)
    found = {}
    for is_sharded in (True, False):
        model = sharded(2)
        optimizer = adamw(model.parameters())
        mine = train(model, optimizer, range(2), nn.utils.clip_grad_norm_)
        save_checkpoint(folder / str(is_sharded), model, optimizer, sharded=is_sharded)
        model = sharded(4)
        optimizer = adamw(model.parameters())
        load_checkpoint(folder / str(is_sharded), model, optimizer)
        mine += train(model, optimizer, range(2, 4), nn.utils.clip_grad_norm_)
        found[f"norms, {is_sharded}"] = max(abs(a - b) / b for a, b in zip(mine, norms, strict=True))
        found[f"weights, {is_sharded}"] = max(weight_differences(full_state_dict(model), alone.state_dict()).values())
    return found


@works("Savers", "checkpoints of models with whole parameters")
def test_whole_parameters_clip_save_and_load(pool: WorkerPool, tmp_path: Path) -> None:
    check(pool.run(saved_and_loaded, tmp_path, world_size=4))


def in_low_precision() -> dict[str, bool]:
    model = sharded(2, param_dtype="bfloat16", output_dtype="float32")
    seen: dict[str, torch.dtype] = {}
    model.head.register_forward_hook(lambda module, args, output: seen.update(out=output.dtype))
    model(Rows(1).of_rank(0, dist.get_rank())).mean().backward()
    found = {
        "computes in bfloat16": seen == {"out": torch.bfloat16},
        "keeps its dtype": model.head.weight.dtype == model.head.weight.grad.dtype == torch.float32,
        "is a parameter": isinstance(model.head.weight, nn.Parameter) and model.head.weight.is_leaf,
        "is averaged": is_alike(model.head.weight.grad),
    }
    # Sums of bfloat16 gradients are kept in float32 over a window, as those of shards are.
    model = mics_shard(Scaled(torch.bfloat16), config())
    exact = torch.zeros(4)
    for index in range(8):
        with defer_replication_sync(model, enabled=index < 7):
            rows = Rows(8).of_rank(index, dist.get_rank())
            model(rows).sum().mul(1 + index / 7).backward()
        exact += ROWS * model.scale.detach().float() * torch.tensor(1 + index / 7).bfloat16().float()
    found["adds up in float32"] = torch.equal(model.head.bias.grad, exact.bfloat16())
    return found


def test_dtypes_of_whole_parameters(pool: WorkerPool) -> None:
    for found in pool.run(in_low_precision, world_size=2):
        assert [name for name, right in found.items() if not right] == [], found


def from_meta() -> dict[str, bool]:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(WIDTH, 4), nn.Parameter(torch.tensor(2.0))

        def reset_parameters(self) -> None:
            nn.init.constant_(self.scale, 2.0)

        def forward(self, rows: Tensor) -> Tensor:
            return self.inner(rows) * self.scale

    with torch.device("meta"):
        model = Own()
    mics_shard(model, MiCSConfig(shard_size=2, node_size=2))
    model(Rows(1).of_rank(0, dist.get_rank())).mean().backward()
    return {"value": model.scale.item() == 2.0, "gradient": is_alike(model.scale.grad)}


def test_whole_parameters_from_the_meta_device(pool: WorkerPool) -> None:
    for found in pool.run(from_meta, world_size=2):
        assert all(found.values()), found


def drift() -> None:
    model = sharded(2)
    with torch.no_grad():
        model.scale += dist.get_rank()
    model(Rows(1).of_rank(0, dist.get_rank())).mean().backward()


def test_the_self_check_sees_whole_parameters_that_differ(pool: WorkerPool) -> None:
    for failure in pool.attempt(drift, world_size=4):
        assert failure.kind == "SelfCheckError" and "scale" in failure.message


HEAD = ["head.weight", "head.bias"]
SELECTIONS: list[tuple[Any, list[str]]] = [
    ((), []),
    ("head", HEAD),
    ("head.weight", HEAD[:1]),
    (["head.*"], HEAD),
    ({"head.bias", "routed.*"}, ["head.bias", "routed.weight", "routed.bias"]),
    (nn.Sequential, ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]),
    ("Sequential", ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]),
    (lambda module: getattr(module, "out_features", 0) == 8, ["body.0.weight", "body.0.bias"]),
    (lambda name, param: name.startswith("head") and param.dim() == 1, ["head.bias"]),
]


@pytest.mark.parametrize(("ignore", "names"), SELECTIONS)
def test_what_ignore_selects(ignore: Any, names: list[str]) -> None:
    assert sorted(whole_parameters(Scaled(), MiCSConfig(ignore=ignore))) == sorted([*names, "scale"])


def test_ignore_takes_parameters_and_modules_themselves() -> None:
    model = Scaled()
    for ignore in (set(model.head.parameters()), model.head, [model.head.weight, model.head.bias]):
        assert sorted(whole_parameters(model, MiCSConfig(ignore=ignore))) == ["head.bias", "head.weight", "scale"]


@pytest.mark.parametrize("ignore", ["haed", ["head", nn.Conv2d], nn.Parameter(torch.ones(1)), ["*.nothing"]])
def test_ignore_that_selects_nothing_is_an_error(ignore: Any) -> None:
    with pytest.raises(MiCSConfigError, match=r"ignore=.* selects no parameter of Scaled"):
        whole_parameters(Scaled(), MiCSConfig(ignore=ignore))


def test_ignore_is_checked() -> None:
    with pytest.raises(MiCSConfigError, match="ignore=3 is not usable"):
        MiCSConfig(ignore=3)  # type: ignore[arg-type]
    with pytest.raises(MiCSConfigError, match="leaves no parameter of Scaled to shard"):
        whole_parameters(Scaled(), MiCSConfig(ignore="*"))
    assert "ignore" in {field.name for field in dataclasses.fields(MiCSConfig)}


class OneMemory(nn.Module):
    """A matrix and its transpose are two parameters of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.down.weight = nn.Parameter(self.up.weight.detach().t())

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.down(torch.tanh(self.up(self.other(rows)))) - 1).square().mean()}


def one_memory(way: str) -> float:
    return differences(OneMemory, way, {"shard_size": 2, "wrap": nn.Linear}, accumulate=2)


@works("Model kinds", "Parameters that share memory (a matrix and its transpose)")
@pytest.mark.parametrize("way", list(WAYS))
def test_parameters_of_one_memory_stay_one(pool: WorkerPool, way: str) -> None:
    assert max(pool.run(one_memory, way, world_size=4, timeout=120)) <= BOUND
    whole = whole_parameters(OneMemory(), MiCSConfig())
    assert whole.keys() == {"up.weight", "down.weight"}
    parts = nn.ParameterList(nn.Parameter(part) for part in torch.ones(4, 3).split(2))  # not the same memory
    assert not whole_parameters(nn.Sequential(parts), MiCSConfig())
