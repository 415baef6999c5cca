"""MiCS as a strategy of Lightning's Trainer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer, _configure_optimizers
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from typing_extensions import Unpack

from lightning_mics import checkpoint as checkpoints
from lightning_mics.config import MiCSConfig, Settings, build_config, takes_settings
from lightning_mics.core._torch import MODULE_REGISTRIES
from lightning_mics.core.accumulation import defer_replication_sync
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.buffers import broadcast_buffers
from lightning_mics.core.plain import adopt
from lightning_mics.core.runtime import is_sharded, own_runtime, runtime_of
from lightning_mics.core.units import callable_parts
from lightning_mics.errors import MiCSConfigError
from lightning_mics.familiar import takes_familiar_names
from lightning_mics.lightning import common
from lightning_mics.lightning.joined import join_training, states_of_ranks, take_own_states
from lightning_mics.lightning.launched import check_launch
from lightning_mics.lightning.launcher import EndsWithRanks
from lightning_mics.lightning.links import expect_late_checkpoints, find_urls_of_last, looking_with
from lightning_mics.lightning.reading import read_folders
from lightning_mics.lightning.unequal import allow_unequal_batches
from lightning_mics.metrics import CommLedger
from lightning_mics.pretrained.huggingface import reading_on_demand
from lightning_mics.topology import GroupLayout


class MiCSStrategy(ParallelStrategy):
    """Shards the model within partition groups and replicates it across them.

    Plain LightningModules work as they are; modules that build their layers in ``configure_model`` may do so on the
    meta device. With ``accumulate_grad_batches`` replicas synchronise once per optimizer step.

    Every setting of :class:`~lightning_mics.MiCSConfig` is an argument, such as ``shard_size``; what is left out or
    ``None`` is as ``config`` says. ``node_size`` is Lightning's number of devices where nobody gives it, and
    ``param_dtype`` follows the Trainer's ``precision``.

    Args:
        config: A whole :class:`~lightning_mics.MiCSConfig`; settings that are given override it.
        save_distributed_checkpoint: ``True`` saves a folder of shards, ``False`` one full file.
        process_group_backend: ``"nccl"``, ``"gloo"`` or ``None`` for the device's default, and with ``cpu_offload``
            ``"cpu:gloo,cuda:nccl"``.
        timeout: How long a collective may wait, in any group.
        storage_options: What the file system of a checkpoint's URL takes, such as credentials or an endpoint.

    Raises:
        MiCSConfigError: If a setting is wrong; as early as it can be known, before processes are started.

    Example::

        Trainer(strategy=MiCSStrategy(shard_size=8), accumulate_grad_batches=4)
    """

    strategy_name = "mics"

    @takes_familiar_names
    @takes_settings
    def __init__(
        self,
        *positional: Any,
        config: MiCSConfig | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        storage_options: Mapping[str, Any] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        self.config = build_config(config, settings)
        common.check_arguments(save_distributed_checkpoint, storage_options, process_group_backend, timeout)
        super().__init__()
        self.num_nodes = 1
        self._save_distributed_checkpoint = save_distributed_checkpoint
        self.storage_options = storage_options
        self._process_group_backend = process_group_backend
        self._timeout = timeout

    # What Lightning asks of a strategy that runs several processes.

    @property
    def is_distributed(self) -> bool:
        """Always ``True``; tells the Trainer to use distributed samplers."""
        return True

    @property
    def root_device(self) -> torch.device:
        """This process's device."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on each node, as Lightning was told."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def process_group_backend(self) -> str | None:
        """The backend of the process group."""
        return self._process_group_backend

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank reads its own data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def layout(self) -> GroupLayout:
        """Which rank holds which shard of which replica; print it to see it.

        Raises:
            MiCSError: If ``shard_size="auto"`` has not been decided yet.
        """
        planned = common.plan_layout(self.config, self.num_nodes, self.num_processes)
        if planned is None and self.lightning_module is not None and is_sharded(self.lightning_module):
            return runtime_of(self.lightning_module).mesh.layout
        return common.require_layout(planned)

    @property
    def ledger(self) -> CommLedger:
        """The counts of the model's collectives, after set-up."""
        assert self.model is not None
        return runtime_of(self.model).ledger

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Checkpoints are read straight into the shards."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored together with the model."""
        return False

    @property
    def precision_plugin(self) -> Precision:
        """The Trainer's precision plugin."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None:
            common.take_precision(plugin)
        self._precision_plugin = plugin

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Unused: MiCS writes checkpoints itself."""
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        raise MiCSConfigError(
            f"{type(io).__name__} is a CheckpointIO, and MiCSStrategy writes checkpoints itself. Leave the plugin out."
        )

    def set_world_ranks(self) -> None:
        """Takes over the cluster environment's ranks; the first moment at which the whole cluster is known."""
        assert self.cluster_environment is not None
        check_launch(self.cluster_environment, self.num_nodes, self.num_processes, self.config.node_size)
        common.plan_layout(self.config, self.num_nodes, self.num_processes)
        common.set_ranks(self.cluster_environment, self.num_nodes, self.num_processes)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Starts the process group."""
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        self._process_group_backend = common.init_process_group(
            self.cluster_environment, self.root_device, self._process_group_backend, self._timeout, self.config
        )

    def setup(self, trainer: pl.Trainer) -> None:
        """Shards the module and creates its optimizers."""
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            join_training(trainer)
        self._shard(self.lightning_module, trainer)
        _average_shards(trainer, self.lightning_module, self.root_device)
        for callback in trainer.checkpoint_callbacks if self.config.async_checkpoint else ():
            expect_late_checkpoints(callback)
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _shard(self, module: pl.LightningModule, trainer: pl.Trainer) -> None:
        if own_runtime(module) is not None:
            self._check_same_layout(module)
            return
        if is_sharded(module):  # a part of it, by the user
            adopt(module, move=True)
            return
        self.precision_plugin.convert_module(module)
        if self._layer_sync is not None:
            common.check_sync_batchnorm(self.root_device)
            self._layer_sync.apply(module)
        plans_states = self.config.shard_size == "auto" and trainer.state.fn == TrainerFn.FITTING
        common.shard(
            module,
            self.config,
            common.plan_topology(self.config, self.num_nodes, self.num_processes),
            self.root_device,
            self.precision_plugin,
            loader=_train_loader(trainer),
            entries=[] if module.automatic_optimization else _manual_entries(module),
            optimizer=_future_optimizers(module) if plans_states else None,
            rebind=False,
        )
        module._device_mesh = runtime_of(module).mesh.device_mesh

    def _check_same_layout(self, module: pl.LightningModule) -> None:
        kept = {id(param) for param in runtime_of(module).window.whole.params.values()}
        plain = [
            name
            for name, param in module.named_parameters()
            if not isinstance(param, DTensor) and id(param) not in kept
        ]
        if plain:
            raise MiCSConfigError(
                f"{type(module).__name__}.configure_model built new layers ({plain[0]}, ...) over those that are "
                "trained and sharded already. Let it return at once if the layers exist: the Trainer calls it at the "
                "start of every fit, validate, test and predict."
            )
        sharded = runtime_of(module).mesh.layout
        if sharded != self.layout:
            raise MiCSConfigError(
                f"The module was sharded by an earlier Trainer with shard_size={sharded.shard_size}, and this one asks "
                f"for shard_size={self.layout.shard_size}. Create a new module and load the checkpoint into it with "
                "ckpt_path=."
            )

    def model_to_device(self) -> None:
        """Does nothing: sharding places the parameters."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Returns the context of ``configure_model`` and ``trainer.init_module()``."""
        device = torch.device("meta") if empty_init else torch.device("cpu")
        with device, self.precision_plugin.tensor_init_context(), reading_on_demand():
            yield

    # Training.

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Leaves the all-reduce between replicas to the last microstep of the window."""
        assert self.model is not None
        with defer_replication_sync(self.model):
            yield

    def barrier(self, name: str | None = None) -> None:
        """Waits for all ranks."""
        common.barrier(self.root_device)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns rank ``src``'s object on every rank."""
        return common.broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over all ranks."""
        return common.all_reduce(tensor, group, reduce_op)

    def post_dispatch(self, trainer: pl.Trainer) -> None:
        """Waits for the checkpoint that is being written."""
        checkpoints.wait_for_checkpoints()

    def teardown(self) -> None:
        """Ends the run, which may have failed; the sharded module stays where it is."""
        assert self.cluster_environment is not None and self.accelerator is not None
        try:
            checkpoints.wait_for_checkpoints()
        finally:
            self.cluster_environment.teardown()
            self.precision_plugin.teardown()
            self.accelerator.teardown()

    # Ranks evaluate the same model, also where batch norms saw other data; it is the one that is saved.

    def on_validation_start(self) -> None:
        """Makes buffers rank 0's on every rank, and lets ranks have different numbers of batches."""
        self._begin_evaluation()

    def on_test_start(self) -> None:
        """Makes buffers rank 0's on every rank, and lets ranks have different numbers of batches."""
        self._begin_evaluation()

    def on_predict_start(self) -> None:
        """Makes buffers rank 0's on every rank, and lets ranks have different numbers of batches."""
        self._begin_evaluation()

    def _begin_evaluation(self) -> None:
        if self.model is not None and is_sharded(self.model):
            broadcast_buffers(self.model)
            allow_unequal_batches(self.lightning_module.trainer._active_loop, self.model)  # type: ignore[union-attr]

    # Checkpoints.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the model's states: shards, or all of it on rank 0 for a full file."""
        assert self.model is not None
        if is_sharded(self.model):
            broadcast_buffers(self.model)
        return checkpoints.model_state(self.model, full=not self._save_distributed_checkpoint)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns an optimizer's states: shards, or all of them on rank 0 for a full file."""
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return checkpoints.optimizer_state(self.model, inner, full=not self._save_distributed_checkpoint)

    @on_all_ranks("trainer.save_checkpoint")
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint; it appears under its name only when it is whole. Collective over the world.

        Args:
            checkpoint: What the Trainer saves.
            filepath: A local path or a URL.
            storage_options: What the URL's file system takes, in the place of what the strategy was given.
        """
        assert self.model is not None
        path = self._place(filepath, storage_options)
        # After this one Lightning ends the job at once, to have it queued again.
        background = self.config.async_checkpoint and not path.name.startswith("hpc_ckpt")
        checkpoint["mics"] = {**checkpoints.huggingface_metadata(self.model), **states_of_ranks(checkpoint)}
        if not self._save_distributed_checkpoint:
            checkpoints.save_full(path, checkpoint, background=background)
            return
        state = {"state_dict": checkpoint.pop("state_dict")}
        for index, optimizer_state in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{index}"] = optimizer_state
        checkpoints.save_sharded(path, state, checkpoint, background=background)

    @on_all_ranks("trainer.load_checkpoint")
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of any shard size, sharded or full, into the model and its optimizers."""
        assert self.lightning_module is not None and self.model is not None
        if weights_only is None and isinstance(self.launcher, _Launcher):
            weights_only = self.launcher.weights_only
        checkpoint = checkpoints.load_into(
            self._place(checkpoint_path),
            self.model,
            {f"optimizer_{index}": optimizer for index, optimizer in enumerate(self.optimizers)},
            strict=self.lightning_module.strict_loading,
            weights_only=weights_only,
        )
        take_own_states(checkpoint)
        # What another loop than the Trainer's wrote lacks these, and the Trainer insists on them.
        known = {"pytorch-lightning_version": pl.__version__, "lr_schedulers": []}
        # Hooks may look at the weights, which are loaded already.
        return {**known, "state_dict": checkpoints.model_state(self.model), **checkpoint}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Does nothing: :meth:`load_checkpoint` filled the shards."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Does nothing: :meth:`load_checkpoint` filled the states."""

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Deletes a checkpoint, which loses its name first, once the one that is being written is whole."""
        if self.is_global_zero:
            checkpoints.remove(filepath, self.storage_options)

    def _place(self, path: str | Path, storage_options: Any = None) -> checkpoints.Place:
        """Returns where rank 0 wants a checkpoint. Collective over the world."""
        return checkpoints.place(self.broadcast(path), storage_options or self.storage_options)


class _Launcher(EndsWithRanks, _SubprocessScriptLauncher):
    """Starts the processes of a node where nobody else has, and remembers what the Trainer was asked for.

    Lightning 2.6 loses ``weights_only`` on the way to strategies that restore after set-up.
    """

    weights_only: bool | None = None

    @property
    def is_interactive_compatible(self) -> bool:
        return self.cluster_environment.creates_processes_externally

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        asked = inspect.signature(function).bind(*args, **kwargs).arguments
        self.weights_only = asked.get("weights_only")
        for callback in trainer.checkpoint_callbacks if trainer is not None else ():
            find_urls_of_last(callback)
        options = getattr(trainer.strategy, "storage_options", None) if trainer is not None else None
        try:
            with looking_with(options):
                if self.cluster_environment.creates_processes_externally:
                    return function(*args, **kwargs)
                return super().launch(function, *args, trainer=trainer, **kwargs)
        finally:
            self.weights_only = None  # nor may the next run load what only this one trusts


def _average_shards(trainer: pl.Trainer, module: pl.LightningModule, device: torch.device) -> None:
    """Has callbacks average the shards of a module, which they have copied before it was sharded."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            callback._average_model = AveragedModel(
                module, callback._device or device, use_buffers=callback._use_buffers, **callback._kwargs
            )
        elif isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            callback._average_model = copy.deepcopy(module)


def _future_optimizers(module: pl.LightningModule) -> list[Optimizer] | None:
    """Asks a module for optimizers over its whole parameters, to learn their classes and settings.

    A shallow copy is asked, so that what its ``configure_optimizers`` assigns does not reach the module.
    """
    from lightning_mics.auto import random_states_kept

    asked = object.__new__(type(module))
    for name, value in vars(module).items():
        vars(asked)[name] = copy.copy(value) if name in MODULE_REGISTRIES else value
    try:
        with random_states_kept():
            return _configure_optimizers(asked.configure_optimizers())[0]  # type: ignore[arg-type]
    except Exception:
        return None


def _train_loader(trainer: pl.Trainer) -> Any:
    """Returns what was passed to ``fit``; what hooks would return is not asked for a second time."""
    return getattr(getattr(trainer.fit_loop, "_data_source", None), "instance", None)


def _manual_entries(module: pl.LightningModule) -> list[nn.Module]:
    """With manual optimisation, backward runs inside ``training_step``, before the root's forward pass has ended.

    FSDP2 then reduces the gradients of inner units only, so the root must not hold parameters itself.
    """
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise MiCSConfigError(
            f"{type(module).__name__} uses manual optimisation and owns the parameter {own[0]!r} itself. Move it into "
            "a submodule that is called in training_step."
        )
    return callable_parts(module)


common.register(StrategyRegistry, MiCSStrategy)
read_folders()
