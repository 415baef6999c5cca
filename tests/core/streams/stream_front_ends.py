"""Training by Lightning's Trainer, by Fabric and by Accelerate, on the stand-in device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment
from stream_checker import StreamChecker
from stream_clocks import Settings
from stream_windows import Net
from stream_world import pretended_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mics import clip_grad_norm_
from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin
from lightning_mics.fabric import MiCSStrategy as MiCSFabricStrategy
from lightning_mics.lightning.trainer import MiCSStrategy

_WORLD, _RANK, _STEPS, _MICROSTEPS = 4, 1, 3, 2
_SETTINGS: dict[str, Any] = {"shard_size": 2, "node_size": 2, "wrap": ["Block"], "verify": False}


@dataclass(frozen=True)
class Training:
    """How a front-end trains.

    Attributes:
        fit: Trains.
        precision: The front-end's own name of it.
        clips: Whether gradients are clipped.
        settings: More settings of MiCS.
        options: More arguments of the front-end.
        has_gloo: Whether groups have a way for host memory, too, and not NCCL alone.
    """

    fit: Callable[[Training, StreamChecker], object]
    precision: str = "32-true"
    clips: bool = True
    settings: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    has_gloo: bool = True

    def run(self, settings: Settings | None = None) -> StreamChecker:
        """Takes some steps; returns the checker with what it found."""
        torch.manual_seed(0)
        with pretended_device(_WORLD, _RANK, settings, has_gloo=self.has_gloo) as checker:
            self.fit(self, checker)
            return checker

    @property
    def mics(self) -> dict[str, Any]:
        """The settings of MiCS."""
        return {**_SETTINGS, **dict(self.settings)}


class _Environment(ClusterEnvironment):
    """Four nodes with one device each, of which this process has the second."""

    creates_processes_externally = True
    main_address, main_port = "localhost", 1

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return _WORLD

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return _RANK

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return _RANK


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Returns the loss of a batch of inputs."""
    return model(rows).float().square().mean()


def _rows() -> DataLoader[Any]:
    """Returns batches in pinned memory, as ``pin_memory=True`` would make them where there is a card."""
    rows = torch.randn(4 * _WORLD * _STEPS * _MICROSTEPS, 16)
    return DataLoader(TensorDataset(rows), batch_size=4, collate_fn=_pinned)


def _pinned(rows: list[tuple[Tensor]]) -> list[Tensor]:
    return [torch.stack([row for (row,) in rows]).pin_memory()]


class Module(pl.LightningModule):
    """A module that logs its loss, and the norm of its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = loss_of(self.net, batch[0])
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("norm", clip_grad_norm_(self, 1.0))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class _Watch(pl.Callback):
    """Watches the loop, and not what comes before and after it."""

    def __init__(self, checker: StreamChecker) -> None:
        self._checker = checker

    def on_train_batch_start(self, *args: Any) -> None:
        self._checker.__enter__()

    def on_train_epoch_end(self, *args: Any) -> None:
        self._checker.__exit__()


def fit_by_trainer(training: Training, checker: StreamChecker) -> None:
    """Trains by the Trainer."""
    options: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        **dict(training.options),
    }
    callbacks = [_Watch(checker), *options.pop("callbacks", [])]
    trainer = pl.Trainer(
        accelerator="cuda",
        devices=1,
        num_nodes=_WORLD,
        strategy=MiCSStrategy(**training.mics),
        plugins=[_Environment()],
        precision=training.precision,
        max_steps=_STEPS,
        accumulate_grad_batches=_MICROSTEPS,
        gradient_clip_val=0.01 if training.clips else None,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(Module(), _rows())


def fit_by_fabric(training: Training, checker: StreamChecker) -> None:
    """Trains by Fabric."""
    fabric = Fabric(
        accelerator="cuda",
        devices=1,
        num_nodes=_WORLD,
        strategy=MiCSFabricStrategy(**training.mics),
        plugins=[_Environment()],
        precision=training.precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters()))
    for index, (rows,) in enumerate(fabric.setup_dataloaders(_rows())):
        with checker:
            is_last = index % _MICROSTEPS == _MICROSTEPS - 1
            with fabric.no_backward_sync(model, enabled=not is_last):
                fabric.backward(loss_of(model, rows))
            if not is_last:
                continue
            if training.clips:
                fabric.clip_gradients(model, optimizer, max_norm=0.01, **dict(training.options))
            optimizer.step()
            optimizer.zero_grad()


def fit_by_accelerate(training: Training, checker: StreamChecker) -> None:
    """Trains by Accelerate."""
    variables = {"RANK": str(_RANK), "WORLD_SIZE": str(_WORLD), "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    with mock.patch.dict(os.environ, variables):
        try:
            accelerator = MiCSAccelerator(
                mics_plugin=MiCSPlugin(**training.mics),
                mixed_precision=training.precision,
                gradient_accumulation_steps=_MICROSTEPS,
            )
            net = Net()
            prepared = accelerator.prepare(net, torch.optim.AdamW(net.parameters()), _rows())
            _loop_of_accelerate(training, checker, accelerator, *prepared)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()
            GradientState._reset_state()


def _loop_of_accelerate(
    training: Training, checker: StreamChecker, accelerator: MiCSAccelerator, model: Any, optimizer: Any, loader: Any
) -> None:
    for (rows,) in loader:
        with checker, accelerator.accumulate(model):
            accelerator.backward(loss_of(model, rows))
            if accelerator.sync_gradients and training.clips:
                accelerator.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
