"""The training loop of each contender, as its users write it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_mics.bench.measure import StepClock, gradient_bytes, state_bytes
from lightning_mics.bench.ranks import device_of, place_of
from lightning_mics.bench.records import Case, Contender
from lightning_mics.bench.workload import ModelSpec, blocks_of, build_model, emulate_compute, microbatch
from lightning_mics.core.runtime import communication_ledger
from lightning_mics.lightning.trainer import MiCSStrategy

_LEARNING_RATE = 1e-3


class _Microbatches(IterableDataset[Tensor]):
    """This rank's microbatches, in order."""

    def __init__(self, case: Case, count: int) -> None:
        self._case, self._count = case, count

    def __iter__(self) -> Iterator[Tensor]:
        spec = model_spec(self._case)
        for number in range(self._count):
            yield microbatch(spec, self._case.microbatch_size, number, dist.get_rank(), dist.get_world_size())

    def __len__(self) -> int:
        return self._count


def model_spec(case: Case) -> ModelSpec:
    """Returns the model of a case."""
    return ModelSpec(layers=case.model["num_layers"], width=case.model["width"], sequence=case.model["sequence_length"])


def _prepare(case: Case, clock: StepClock) -> nn.Module:
    device = device_of(case)
    model = build_model(model_spec(case), device=device if device.type != "cpu" else None)

    def note(seconds: float) -> None:
        clock.note("compute", seconds)
        if not clock.is_measuring:  # looking for gradients costs time
            clock.gradient_bytes = max(clock.gradient_bytes, gradient_bytes(model))

    # What is not measured need not take its time.
    emulate_compute(model, lambda: case.compute if clock.is_measuring else (0.0, 0.0), note)
    return model


class _Module(pl.LightningModule):
    """What every contender under the Trainer trains."""

    def __init__(
        self,
        case: Case,
        clock: StepClock,
        shard: Callable[[nn.Module], None] | None,
        make_optimizer: Callable[..., torch.optim.Optimizer],
    ) -> None:
        super().__init__()
        self._clock, self._shard, self._make_optimizer = clock, shard, make_optimizer
        self.model = _prepare(case, clock)

    def configure_model(self) -> None:
        if self._shard is not None:
            self._shard(self.model)
            self._shard = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self._clock.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._make_optimizer(self.parameters(), lr=_LEARNING_RATE)


class _PlainModule(_Module):
    """Without ``configure_model``, as DDP and MiCS take it."""

    configure_model = pl.LightningModule.configure_model


class _Timing(pl.Callback):
    def __init__(self, case: Case, clock: StepClock) -> None:
        self._case, self._clock = case, clock

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, MiCSStrategy):
            self._clock.ledger = communication_ledger(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self._case.accumulation == 0:
            self._clock.window_begins()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self._clock.num_windows * self._case.accumulation:
            self._clock.ends()
            self._clock.state_bytes = state_bytes(pl_module, trainer.optimizers)


def train(case: Case, contender: Contender, clock: StepClock) -> None:
    """Trains a fresh model for as many windows as the clock wants. Every rank calls it."""
    loops: dict[str, Callable[[Case, Contender, StepClock], None]] = {
        "mesh-2d-no-sync": _train_with_fabric,
        "deepspeed-zero3": _train_with_deepspeed,
    }
    loops.get(contender.name, _train_with_trainer)(case, contender, clock)


def _train_with_trainer(case: Case, contender: Contender, clock: StepClock) -> None:
    world_size = dist.get_world_size()
    strategy: Any
    shard: Callable[[nn.Module], None] | None = None
    if contender.name == "mics":
        strategy = MiCSStrategy(
            shard_size=contender.shard_size,
            hierarchical=contender.hierarchical,
            optimizer_shard_size=contender.optimizer_shard_size or "partition",
            **contender.settings,
            wrap=["GPT2Block"],
            node_size=case.node_size,
        )
    elif contender.shard_size == 1:
        strategy = DDPStrategy(process_group_backend=dist.get_backend())
    else:
        strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
        shard = functools.partial(
            _shard_with_fsdp2,
            mesh=_mesh(contender.shard_size, device_of(case).type),
            reshard_after_forward=case.node_size if contender.name == "full-sharding-node" else True,
        )
    make_optimizer = _divided_adamw if contender.name == "ddp-zero1" else torch.optim.AdamW
    module = (_Module if shard is not None else _PlainModule)(case, clock, shard, make_optimizer)
    trainer = pl.Trainer(
        **place_of(case),
        strategy=strategy,
        accumulate_grad_batches=case.accumulation,
        max_steps=clock.num_windows,
        callbacks=[_Timing(case, clock)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = _Microbatches(case, clock.num_windows * case.accumulation)
    trainer.fit(module, DataLoader(data, batch_size=None))


def _divided_adamw(params: Any, lr: float) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=lr)


@functools.cache
def _mesh(shard_size: int, device: str) -> DeviceMesh:
    """Returns one mesh for all rounds: groups are scarce."""
    world_size = dist.get_world_size()
    if shard_size == world_size:
        return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def _shard_with_fsdp2(model: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool | int = True) -> None:
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)


def _windows(case: Case, clock: StepClock) -> Iterator[tuple[Tensor, bool]]:
    """Yields microbatches, each with whether it is the last of its window, and tells the clock."""
    for number, batch in enumerate(_Microbatches(case, clock.num_windows * case.accumulation), start=1):
        batch = batch.to(device_of(case))
        if number % case.accumulation == 1 % case.accumulation:
            clock.window_begins()
        yield batch, number % case.accumulation == 0
    clock.ends()


def _train_with_fabric(case: Case, contender: Contender, clock: StepClock) -> None:
    """A loop that defers all gradient synchronisation with ``no_backward_sync``, as Accelerate's ``no_sync`` does."""

    def parallelize(model: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _shard_with_fsdp2(model, _mesh(contender.shard_size, device_of(case).type))
        return model

    strategy = FabricModelParallelStrategy(
        parallelize_fn=parallelize, data_parallel_size=dist.get_world_size(), tensor_parallel_size=1
    )
    fabric = Fabric(**place_of(case), strategy=strategy)
    fabric.launch()
    model = fabric.setup(_prepare(case, clock))
    optimizer: Any = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE))
    for batch, is_last in _windows(case, clock):
        with fabric.no_backward_sync(model, enabled=not is_last):
            loss = model(input_ids=batch, labels=batch).loss
            clock.losses.append(loss.detach())
            fabric.backward(loss / case.accumulation)
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    clock.state_bytes = state_bytes(model, [optimizer.optimizer])


def _train_with_deepspeed(case: Case, contender: Contender, clock: StepClock) -> None:
    import deepspeed

    model = _prepare(case, clock)
    settings = {
        "train_micro_batch_size_per_gpu": case.microbatch_size,
        "gradient_accumulation_steps": case.accumulation,
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for batch, _ in _windows(case, clock):
        loss = engine(input_ids=batch, labels=batch).loss
        clock.losses.append(loss.detach())
        engine.backward(loss)
        engine.step()
    engine.destroy()
