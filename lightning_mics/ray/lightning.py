"""What Ray Train needs of Lightning: a strategy whose cluster is Ray's, and a callback that reports checkpoints."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import get_device

from lightning_mics.core.mesh import detect_topology
from lightning_mics.errors import MiCSConfigError
from lightning_mics.lightning import common
from lightning_mics.lightning.trainer import MiCSStrategy
from lightning_mics.ray.storage import report
from lightning_mics.topology import ClusterTopology

__all__ = ["RayMiCSStrategy", "RayTrainReportCallback", "prepare_trainer"]


class RayMiCSStrategy(MiCSStrategy):
    """:class:`~lightning_mics.lightning.trainer.MiCSStrategy` in the workers of Ray's ``TorchTrainer``.

    Nodes, devices and the process group are Ray's: ``devices``, ``num_nodes`` and ``plugins`` of the Trainer need not
    be given, and do not count; backend and timeout are those of Ray's ``TorchConfig``. Every worker builds the Trainer.

    Args:
        *args: Those of ``MiCSStrategy``.
        **kwargs: Those of ``MiCSStrategy``.

    Raises:
        MiCSConfigError: On every rank, if Ray placed different numbers of workers on the nodes.
    """

    strategy_name = "ray_mics"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._ray_topology: ClusterTopology | None = None
        self._environment: RayLightningEnvironment | None = None
        super().__init__(*args, **kwargs)

    # The Trainer sets what it was told, or thinks, of these.

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        """Ray's, from when the Trainer has one."""
        return self._environment

    @cluster_environment.setter
    def cluster_environment(self, environment: ClusterEnvironment | None) -> None:
        self._environment = None if environment is None else RayLightningEnvironment()

    @property
    def num_nodes(self) -> int:
        """Nodes on which Ray has placed workers."""
        return 1 if self._ray_topology is None else self._ray_topology.num_nodes

    @num_nodes.setter
    def num_nodes(self, number: int) -> None: ...

    @property
    def num_processes(self) -> int:
        """Workers on each node."""
        return 0 if self._ray_topology is None else self._ray_topology.node_size

    @property
    def root_device(self) -> torch.device:
        """The device that Ray gave to this worker."""
        return get_device()

    def set_world_ranks(self) -> None:
        """Takes over the ranks of Ray's workers. Collective over the world at the first time."""
        if self._ray_topology is None:
            self._ray_topology = detect_topology(self.config.node_size)
        common.plan_layout(self.config, self.num_nodes, self.num_processes)
        assert self._environment is not None
        common.set_ranks(self._environment, self.num_nodes, self.num_processes)

    def setup(self, trainer: pl.Trainer) -> None:
        """Shards the module and creates its optimizers."""
        # Lightning itself says so for strategies that do not count as DDP's.
        if self.lightning_module is not None and self.lightning_module._compiler_ctx is not None:
            raise MiCSConfigError(
                "torch.compile(module) makes one graph of the whole LightningModule, and MiCS gathers parameters unit "
                "by unit. Call module.compile() in its place, before fit."
            )
        super().setup(trainer)


# Ray's prepare_trainer takes its own three strategies, and what counts as one of them.
RayDDPStrategy.register(RayMiCSStrategy)


class RayTrainReportCallback(pl.Callback):
    """Reports metrics and a checkpoint to Ray, at the end of each training epoch or every so many steps.

    Takes the place of Ray's own one, which saves to the machine's folder for temporary files and copies from there:
    this one has all ranks save to Ray's storage. The checkpoint is a folder for ``fit(ckpt_path=...)``; see
    :func:`lightning_mics.ray.last_checkpoint`.

    Args:
        every_n_train_steps: Optimizer steps between two reports; ``None`` for the ends of epochs.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        super().__init__()
        self.every_n_train_steps = every_n_train_steps
        self._reported = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Reports, if it is time."""
        every, step = self.every_n_train_steps, trainer.global_step
        if every is not None and step % every == 0 and step != self._reported:
            self._reported = step
            _report(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports, unless that is to happen every so many steps."""
        if self.every_n_train_steps is None:
            _report(trainer)


def _report(trainer: pl.Trainer) -> None:
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    report({**metrics, "epoch": trainer.current_epoch, "step": trainer.global_step}, trainer.save_checkpoint)
