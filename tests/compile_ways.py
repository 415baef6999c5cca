"""Ways to compile a model that MiCS shards, and what a rank sees of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from accelerate.utils import TorchDynamoPlugin, compile_regions
from accelerate_tools import forget_accelerate
from lightning.fabric import Fabric
from lightning_tools import LanguageModel, PoolEnvironment, loader, make_trainer
from models import build, microbatch, regression_loss
from test_transformers import make_trainer as make_huggingface_trainer
from torch import Tensor, nn

from lightning_mics import Hop, MiCSConfig, Traffic, communication_ledger, defer_replication_sync, mics_shard
from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin
from lightning_mics.checkpoint import load_checkpoint, save_checkpoint
from lightning_mics.core._torch import plain_name
from lightning_mics.fabric import MiCSStrategy as FabricStrategy
from lightning_mics.lightning.trainer import MiCSStrategy
from lightning_mics.testing import full_state_dict, weight_differences
from lightning_mics.transformers import MiCSTrainer

STEPS, ACCUMULATE, ROWS = 4, 2, 2
SETTINGS = {"shard_size": 2, "node_size": 2}
CONFIG = MiCSConfig(**SETTINGS)


@dataclass
class Seen:
    """What a rank saw of a training.

    Attributes:
        losses: By microstep.
        frames: What Dynamo had compiled after each step, or tried to.
    """

    losses: list[float] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    traffic: list[tuple[str, Hop, Traffic]] = field(default_factory=list)

    def end_step(self) -> None:
        self.frames.append(torch._dynamo.utils.counters["frames"]["total"])

    def end(self, model: nn.Module) -> Seen:
        counters = torch._dynamo.utils.counters
        self.graphs, self.breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        self.weights = {plain_name(name): value for name, value in full_state_dict(model).items()}
        self.traffic = sorted(communication_ledger(model), key=str)
        return self


# From a plain model and a backend to a sharded model.


def eager(model: Any, backend: str) -> nn.Module:
    return mics_shard(model, CONFIG)


def blocks_then_shard(model: Any, backend: str) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=backend)
    return mics_shard(model, CONFIG)


def shard_then_blocks(model: Any, backend: str) -> nn.Module:
    mics_shard(model, CONFIG)
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def wrap_then_shard(model: Any, backend: str) -> nn.Module:
    model.blocks = nn.ModuleList(torch.compile(block, backend=backend, fullgraph=True) for block in model.blocks)
    return mics_shard(model, CONFIG.replace(wrap="Block"))


def shard_then_wrap(model: Any, backend: str) -> nn.Module:
    mics_shard(model, CONFIG)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend=backend)
    return model


def regions_then_shard(model: Any, backend: str) -> nn.Module:
    return mics_shard(compile_regions(model, backend=backend), CONFIG)


def shard_then_regions(model: Any, backend: str) -> nn.Module:
    return compile_regions(mics_shard(model, CONFIG), backend=backend)


def whole_then_shard(model: Any, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return mics_shard(model, CONFIG)


def wrap_whole_then_shard(model: Any, backend: str) -> nn.Module:
    return mics_shard(torch.compile(model, backend=backend), CONFIG)


def shard_then_wrap_whole(model: Any, backend: str) -> nn.Module:
    return torch.compile(mics_shard(model, CONFIG), backend=backend)


def in_a_loop(prepare: Callable[[Any, str], nn.Module], backend: str, folder: Path) -> Seen:
    model = prepare(build("uneven"), backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return train(model, optimizer, lambda last: defer_replication_sync(model, enabled=not last), Tensor.backward)


def train(
    model: nn.Module,
    optimizer: Any,
    window: Callable[[bool], AbstractContextManager[Any]],
    backward: Callable[[Tensor], Any],
) -> Seen:
    seen = Seen()
    for step in range(STEPS):
        for index in range(ACCUMULATE):
            rows = microbatch("uneven", step * ACCUMULATE + index, ROWS * dist.get_world_size())
            with window(index + 1 == ACCUMULATE):
                loss = regression_loss(model, rows.chunk(dist.get_world_size())[dist.get_rank()])
                backward(loss / ACCUMULATE)
            seen.losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        seen.end_step()
    return seen.end(model)


# The front-ends.


def by_accelerate(backend: str, *, regional: bool) -> Seen:
    forget_accelerate()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    compiler = TorchDynamoPlugin(backend=backend, use_regional_compilation=regional)
    accelerator = MiCSAccelerator(mics_plugin=MiCSPlugin(**SETTINGS), dynamo_plugin=compiler)
    model = build("uneven")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    assert accelerator.unwrap_model(model) is model

    @contextmanager
    def window(last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with accelerator.no_sync(model):
                yield

    return train(model, optimizer, window, accelerator.backward)


def by_fabric(backend: str) -> Seen:
    strategy = FabricStrategy(**SETTINGS)
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, plugins=[PoolEnvironment()])
    fabric.launch()
    model = torch.compile(build("uneven"), backend=backend)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    return train(wrapped, optimizer, lambda last: fabric.no_backward_sync(wrapped, enabled=not last), fabric.backward)


class Compiled(LanguageModel):
    """Compiles its blocks in ``configure_model``, or nothing."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend, self.seen = backend, Seen()

    def configure_model(self) -> None:
        for block in self.net.blocks if self.backend else ():
            block.compile(backend=self.backend)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if (batch_idx + 1) % ACCUMULATE == 0:
            self.seen.end_step()


def by_trainer(backend: str | None, *, in_place: bool) -> Seen:
    torch.manual_seed(0)
    module = Compiled(None if in_place else backend)
    if in_place:
        module.compile(backend=backend)
    trainer = make_trainer(strategy=MiCSStrategy(**SETTINGS), accumulate_grad_batches=ACCUMULATE)
    trainer.fit(module, loader(STEPS * ACCUMULATE, dist.get_world_size()))
    module.seen.losses = module.losses
    return module.seen.end(module)


def by_huggingface(backend: str | None, folder: Path) -> Seen:
    forget_accelerate()
    compiler = {} if backend is None else {"torch_compile": True, "torch_compile_backend": backend}
    trainer = make_huggingface_trainer(
        MiCSTrainer, str(folder), build("gpt2"), ROWS, plugin=MiCSPlugin(**SETTINGS), max_steps=STEPS, **compiler
    )
    seen = Seen()
    trainer.callback_handler.callbacks[-1].on_step_end = lambda *args, **kwargs: seen.end_step()
    try:
        trainer.train()
    finally:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO")]:
            del os.environ[name]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen.losses = [float(loss) for loss in losses]
    return seen.end(trainer.model)


# By name: how, and the eager training that must come out.
LOOPS = {
    function.__name__: function
    for function in (
        eager,
        blocks_then_shard,
        shard_then_blocks,
        wrap_then_shard,
        shard_then_wrap,
        regions_then_shard,
        shard_then_regions,
        whole_then_shard,
        wrap_whole_then_shard,
        shard_then_wrap_whole,
    )
}
WAYS: dict[str, Callable[..., Seen]] = {
    **{name: partial(in_a_loop, function) for name, function in LOOPS.items() if function is not eager},
    "accelerate_regional": lambda backend, folder: by_accelerate(backend, regional=True),
    "accelerate_whole": lambda backend, folder: by_accelerate(backend, regional=False),
    "fabric": lambda backend, folder: by_fabric(backend),
    "trainer_blocks": lambda backend, folder: by_trainer(backend, in_place=False),
    "trainer_in_place": lambda backend, folder: by_trainer(backend, in_place=True),
    "huggingface": by_huggingface,
}
REFERENCES: dict[str, Callable[[Path], Seen]] = {
    "trainer": lambda folder: by_trainer(None, in_place=False),
    "huggingface": lambda folder: by_huggingface(None, folder),
    "": lambda folder: in_a_loop(eager, "", folder),
}


def reference_of(way: str) -> str:
    return next(name for name in REFERENCES if way.startswith(name))


def seen_of(way: str | None, reference: str, backend: str, folder: Path) -> Seen:
    """Trains on this rank, compiled in a way or not at all."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes of its own, which would outlive the test
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.parent / "inductor")  # one for all tests of a session
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    folder = folder / str(dist.get_rank())
    return REFERENCES[reference](folder) if way is None else WAYS[way](backend, folder)


def through_a_checkpoint(compiles: str, loads: str, folder: Path) -> dict[str, float]:
    """Returns how far weights differ that one way's model saved and another way's model of other values loaded."""
    saved = LOOPS[compiles](build("uneven"), "eager")
    loaded = LOOPS[loads](build("uneven", seed=1), "eager")
    save_checkpoint(folder, saved)
    load_checkpoint(folder, loaded)
    return weight_differences(*({plain_name(n): v for n, v in full_state_dict(m).items()} for m in (loaded, saved)))
