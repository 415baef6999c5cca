"""MiCS as a strategy of Lightning Fabric."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, Precision
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.launchers import _SubprocessScriptLauncher
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.seed import reset_seed
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import Unpack

from lightning_mics import checkpoint as checkpoints
from lightning_mics.config import MiCSConfig, Settings, build_config, takes_settings
from lightning_mics.core.accumulation import defer_replication_sync
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.buffers import broadcast_buffers
from lightning_mics.core.clipping import clip_parameters_
from lightning_mics.core.joined import JoinedLoader
from lightning_mics.core.plain import adopt
from lightning_mics.core.runtime import is_sharded, own_runtime, register_forward_method, runtime_of
from lightning_mics.errors import CheckpointError, MiCSConfigError
from lightning_mics.familiar import takes_familiar_names
from lightning_mics.lightning import common
from lightning_mics.lightning.launched import check_launch
from lightning_mics.lightning.launcher import EndsWithRanks
from lightning_mics.metrics import CommLedger
from lightning_mics.pretrained.huggingface import reading_on_demand
from lightning_mics.topology import GroupLayout


class MiCSStrategy(ParallelStrategy):
    """Shards the model within partition groups and replicates it across them, for Fabric.

    ``fabric.setup(model, optimizer)`` shards in place; the optimizer may have been created before. In accumulation
    loops ``fabric.no_backward_sync(model, enabled=...)`` defers the all-reduce between replicas.

    Every setting of :class:`~lightning_mics.MiCSConfig` is an argument, such as ``shard_size``; what is left out or
    ``None`` is as ``config`` says. ``node_size`` is Fabric's number of devices where nobody gives it, and
    ``param_dtype`` follows Fabric's ``precision``.

    Args:
        config: A whole :class:`~lightning_mics.MiCSConfig`; settings that are given override it.
        save_distributed_checkpoint: ``True`` saves a folder of shards, ``False`` one full file.
        process_group_backend: ``"nccl"``, ``"gloo"`` or ``None`` for the device's default, and with ``cpu_offload``
            ``"cpu:gloo,cuda:nccl"``.
        timeout: How long a collective may wait, in any group.
        storage_options: What the file system of a checkpoint's URL takes, such as credentials or an endpoint.

    Raises:
        MiCSConfigError: If a setting is wrong; as early as it can be known, before processes are started.
    """

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
        self._num_nodes = 1
        self._save_distributed_checkpoint = save_distributed_checkpoint
        self._storage_options = storage_options
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._decided: GroupLayout | None = None
        self._loader: Any = None
        self._backward_sync_control = _DeferReplicationSync()

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """MiCS writes checkpoints itself."""
        raise NotImplementedError("MiCSStrategy writes checkpoints itself and has no CheckpointIO.")

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        raise NotImplementedError("MiCSStrategy writes checkpoints itself and takes no CheckpointIO.")

    @property
    def root_device(self) -> torch.device:
        """This process's device."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Number of nodes, as Fabric was told."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Processes on each node, as Fabric was told."""
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
        return common.require_layout(planned or self._decided)

    @property
    def precision(self) -> Precision:
        """Fabric's precision plugin."""
        return super().precision

    @precision.setter
    def precision(self, plugin: Precision | None) -> None:
        if plugin is not None:
            common.take_precision(plugin)
        self._precision = plugin

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        check_launch(self.cluster_environment, self.num_nodes, self.num_processes, self.config.node_size)
        common.plan_layout(self.config, self.num_nodes, self.num_processes)
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Starts the process group."""
        super().setup_environment()
        reset_seed()
        assert self.cluster_environment is not None
        common.set_ranks(self.cluster_environment, self.num_nodes, self.num_processes)
        self._process_group_backend = common.init_process_group(
            self.cluster_environment, self.root_device, self._process_group_backend, self._timeout, self.config
        )

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shards a module in place."""
        return self.setup_module_and_optimizers(module, [])[0]

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Shards a module in place and points its optimizers, created before, to the shards."""
        if is_sharded(module) and own_runtime(module) is None:  # a part of it, by the user
            adopt(module, move=True)
            self._decided = runtime_of(module).mesh.layout
            return module, optimizers, scheduler
        common.shard(
            module,
            self.config,
            common.plan_topology(self.config, self.num_nodes, self.num_processes),
            self.root_device,
            self.precision,
            loader=self._loader,
            optimizer=optimizers,
        )
        self._decided, self._loader = runtime_of(module).mesh.layout, None
        return module, optimizers, scheduler

    def process_dataloader(self, dataloader: Any) -> Any:
        """Remembers the first DataLoader that is set up: ``shard_size="auto"`` may need a sample of it."""
        if self.config.shard_size == "auto" and self._loader is None:
            self._loader = dataloader
        return super().process_dataloader(dataloader)

    def module_to_device(self, module: nn.Module) -> None:
        """Does nothing: sharding places the parameters."""

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Returns the context of ``fabric.init_module()``."""
        stack = ExitStack()
        if empty_init:
            stack.enter_context(torch.device("meta"))
        stack.enter_context(self.precision.module_init_context())
        stack.enter_context(reading_on_demand())
        return stack

    def ledger(self, module: nn.Module) -> CommLedger:
        """Returns the counts of a module's collectives."""
        return runtime_of(module).ledger

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over all ranks."""
        return common.all_reduce(tensor, group, reduce_op)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for all ranks."""
        common.barrier(self.root_device)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns rank ``src``'s object on every rank."""
        return common.broadcast(obj, src)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clips by the global norm; returns it as a plain tensor, equal on all ranks."""
        self.precision.unscale_gradients(optimizer)
        params = list(self.precision.main_params(optimizer))
        return clip_parameters_(params, max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)

    @on_all_ranks("fabric.save")
    def save_checkpoint(
        self,
        path: str | Path,
        state: dict[str, Any],
        storage_options: Any = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Writes a checkpoint; it appears under its name only when it is whole. Collective over the world.

        Args:
            path: A local path or a URL.
            state: The model, its optimizers and the rest.
            storage_options: What the URL's file system takes, in the place of what the strategy was given.
            filter: Not supported.
        """
        if filter is not None:
            raise MiCSConfigError("filter= is not supported by MiCSStrategy. Leave it out.")
        key, module, optimizers = _split_state(state)
        full = module is None or not self._save_distributed_checkpoint
        tensors: dict[str, Any] = {}
        if key is not None and module is not None:
            broadcast_buffers(module)
            tensors[key] = checkpoints.model_state(module, full=full)
            for name, optimizer in optimizers.items():
                tensors[name] = checkpoints.optimizer_state(module, optimizer, full=full)
        meta = {
            name: value.state_dict() if hasattr(value, "state_dict") else value
            for name, value in state.items()
            if name not in tensors
        }
        loaders = checkpoints.states_of_ranks(_loaders(state))
        if module is not None:
            meta["mics"] = {**checkpoints.huggingface_metadata(module), "model_key": key, **loaders}
        elif loaders:
            meta["mics"] = loaders
        target = self._place(path, storage_options)
        if module is None and not loaders:
            meta, _ = checkpoints.made_whole(meta)  # with no model to load it into, nothing becomes a shard again
        if full:
            checkpoints.save_full(target, {**tensors, **meta}, background=self.config.async_checkpoint)
        else:
            checkpoints.save_sharded(target, tensors, meta, background=self.config.async_checkpoint)

    @on_all_ranks("fabric.load")
    def load_checkpoint(
        self,
        path: str | Path,
        state: nn.Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint of any shard size, sharded or full, into the given model, optimizers and objects.

        A model or an optimizer alone is filled from a file with its ``state_dict``, as ``fabric.load_raw`` asks for.
        """
        source = self._place(path)
        if isinstance(state, nn.Module | Optimizer):
            checkpoints.load_raw(source, state, strict=strict, weights_only=weights_only)
            return {}
        if not state and source.is_dir():
            raise CheckpointError(f"{path} is a folder of shards. Pass state={{'model': model, ...}} to load it.")
        state = {} if state is None else state
        key, module, optimizers = _split_state(state)
        if module is None:
            meta = checkpoints.load_rest(source, weights_only=weights_only)
        else:
            meta = checkpoints.load_into(
                source, module, optimizers, model_key=key, strict=strict, weights_only=weights_only
            )
        if _loaders(state):
            meta |= checkpoints.own_states(meta) or {}  # of which rank 0's are beside
        meta.pop("mics", None)
        for name in [name for name in state if name != key and name not in optimizers]:
            if name not in meta:
                if strict:
                    raise CheckpointError(f"The checkpoint {path} has no entry {name!r}. Pass strict=False to go on.")
                continue
            if hasattr(state[name], "load_state_dict"):
                state[name].load_state_dict(meta.pop(name))
            else:
                state[name] = meta.pop(name)
        return meta

    def _place(self, path: str | Path, storage_options: Any = None) -> checkpoints.Place:
        """Returns where rank 0 wants a checkpoint. Collective over the world."""
        return checkpoints.place(self.broadcast(path), storage_options or self._storage_options)


class _Launcher(EndsWithRanks, _SubprocessScriptLauncher):
    pass


class _DeferReplicationSync(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return defer_replication_sync(module, enabled)


def _split_state(state: dict[str, Any]) -> tuple[str | None, nn.Module | None, dict[str, Optimizer]]:
    """Finds the sharded model, if there is one, and its optimizers in what the user wants saved or loaded."""
    models = [name for name, value in state.items() if isinstance(value, nn.Module) and is_sharded(value)]
    optimizers = {name: value for name, value in state.items() if isinstance(value, Optimizer)}
    if len(models) > 1:
        raise CheckpointError(
            f"A checkpoint holds one model set up by Fabric at most; the state has {len(models)}. Pass "
            "{'model': model, ...}, and save several models under several paths."
        )
    if models:
        return models[0], state[models[0]], optimizers
    for name, optimizer in optimizers.items():
        if any(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"]):
            raise CheckpointError(
                f"The optimizer {name!r} holds shards of a model that the state lacks. Pass its model as well: "
                f"{{'model': model, {name!r}: {name}}}."
            )
    return None, None, {}


def _loaders(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data loaders that keep their place, which each rank has of its own."""
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, DataLoader | JoinedLoader) and hasattr(value, "state_dict")
    }


def _mark_forward_methods() -> None:
    """Makes ``model.mark_forward_method("encode")`` count for sharded models; Fabric asks no strategy."""
    original = _FabricModule.mark_forward_method

    @functools.wraps(original)
    def mark_forward_method(self: _FabricModule, method: MethodType | str) -> None:
        original(self, method)
        inner = self.module
        if isinstance(inner, nn.Module) and is_sharded(inner):
            register_forward_method(inner, method if isinstance(method, str) else method.__name__)

    _FabricModule.mark_forward_method = mark_forward_method  # type: ignore[method-assign]


_mark_forward_methods()
common.register(STRATEGY_REGISTRY, MiCSStrategy)
