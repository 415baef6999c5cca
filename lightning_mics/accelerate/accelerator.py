"""An ``Accelerator`` that shards models with MiCS."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.checkpointing import (
    load_accelerator_state,
    load_custom_state,
    save_accelerator_state,
    save_custom_state,
)
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_mics import checkpoint as checkpoints
from lightning_mics.accelerate.plugin import MiCSPlugin, launched_world_size, take_over_launch
from lightning_mics.core.accumulation import defer_replication_sync
from lightning_mics.core.checks import check_layout
from lightning_mics.core.clipping import clip_parameters_
from lightning_mics.core.loss_scaling import use_sharded_scaler
from lightning_mics.core.mesh import detect_topology
from lightning_mics.core.optimizers import ShardedParams, check_unused
from lightning_mics.core.runtime import is_sharded, register_forward_method, runtime_of
from lightning_mics.errors import CheckpointError, MiCSConfigError, MiCSError
from lightning_mics.metrics import CommLedger
from lightning_mics.precision import ACCELERATE_PRECISIONS
from lightning_mics.sharding import mics_shard
from lightning_mics.topology import ClusterTopology, GroupLayout

if TYPE_CHECKING:
    from lightning_mics.auto import Sample

_OTHER_ENGINES = ("fsdp_plugin", "deepspeed_plugin", "deepspeed_plugins", "megatron_lm_plugin", "torch_tp_plugin")


class MiCSAccelerator(Accelerator):
    """Accelerate's ``Accelerator``, with models sharded by MiCS.

    Use it wherever an ``Accelerator`` is expected. ``prepare`` shards models in place over their partition groups;
    ``accumulate`` and ``no_sync`` leave the all-reduce between replicas to the last microstep of a window, while the
    reduce-scatter inside a partition runs in each. Optimizers built before ``prepare`` keep working. Without other
    processes it is a plain ``Accelerator``.

    Args:
        *args: Those of ``Accelerator``.
        mics_plugin: The settings; by default those of the launch file and the environment.
        **kwargs: Those of ``Accelerator``. A ``parallelism_config`` may repeat the partition and replication sizes.

    Raises:
        MiCSConfigError: On every rank, before any of them communicates, if a setting does not fit the cluster, or asks
            for another sharding engine.

    Example::

        accelerator = MiCSAccelerator(mics_plugin=MiCSPlugin(shard_size=8), gradient_accumulation_steps=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    """

    def __init__(self, *args: Any, mics_plugin: MiCSPlugin | None = None, **kwargs: Any) -> None:
        options = inspect.signature(Accelerator.__init__).bind(self, *args, **kwargs).arguments
        _refuse_other_engines(options)
        self.mics_plugin = mics_plugin or MiCSPlugin()
        _check_parallelism(options.get("parallelism_config"), self.mics_plugin)
        _check_world(self.mics_plugin)
        take_over_launch()
        _forget_lonely_state()
        options["parallelism_config"] = None
        self._topology: ClusterTopology | None = None
        self._layout: GroupLayout | None = None
        self._sharded = ShardedParams()
        del options["self"]
        super().__init__(**options)
        _check_mixed_precision(self)
        use_sharded_scaler(self, self.device)
        if dist.is_initialized():
            assert self.mics_plugin.config is not None
            config = self.mics_plugin.config
            self._topology = detect_topology(config.node_size)
            self._layout = check_layout(config, self._topology)

    @property
    def topology(self) -> ClusterTopology | None:
        """The cluster; ``None`` without other processes."""
        return self._topology

    @property
    def layout(self) -> GroupLayout | None:
        """Which rank holds which shard of which replica.

        ``None`` without other processes, and until ``prepare`` has decided what ``shard_size="auto"`` leaves open.
        """
        return self._layout

    def ledger(self, model: nn.Module) -> CommLedger:
        """Returns the counts of a prepared model's collectives.

        Raises:
            MiCSError: If the model is not sharded.
        """
        return runtime_of(model).ledger

    # Preparing.

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Shards the models among ``args``, points optimizers to the shards, and prepares the rest as Accelerate does.

        Raises:
            MiCSConfigError: On every rank, if a model cannot be sharded or an optimizer has taken steps already.
        """
        for model in (arg for arg in args if isinstance(arg, nn.Module)):
            self._shard(
                model,
                [arg for arg in args if isinstance(arg, Optimizer)],
                [arg for arg in args if isinstance(arg, DataLoader)],
            )
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Shards a model in place, for training or for evaluation."""
        self._shard(model)
        if not is_sharded(model):
            return super().prepare_model(model, device_placement, evaluation_mode)
        # In evaluation mode Accelerate adds autocast and compilation, but no wrapper for data parallelism.
        return super().prepare_model(model, device_placement=False, evaluation_mode=True)

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """Prepares an optimizer, which may have been built before its model was sharded."""
        if not isinstance(optimizer, AcceleratedOptimizer):
            self._sharded.rebind(optimizer)
        return super().prepare_optimizer(optimizer, device_placement)

    def _shard(
        self, model: nn.Module, optimizers: Sequence[Optimizer] = (), loaders: Sequence[DataLoader[Any]] = ()
    ) -> None:
        if self._topology is None or is_sharded(model) or next(model.parameters(), None) is None:
            return
        for optimizer in optimizers:
            check_unused(optimizer, model)
        assert self.mics_plugin.config is not None
        config = self.mics_plugin.config.with_precision(ACCELERATE_PRECISIONS[self.mixed_precision].name)
        params = set(model.parameters())
        own = [entry for entry in optimizers if params.issuperset(p for g in entry.param_groups for p in g["params"])]
        with self._sharded.remember(model):
            mics_shard(
                model,
                config,
                topology=self._topology,
                device_type=self.device.type,
                optimizer=own if config.shard_size == "auto" else None,
                sample=self._find_sample(loaders) if config.shard_size == "auto" else None,
            )
        self._layout = runtime_of(model).mesh.layout
        _prepare_generation(model)
        if hasattr(model, "save_pretrained"):
            self._gather_before_saving(model)

    def _find_sample(self, loaders: Sequence[Any]) -> Sample | None:
        """Takes a sample of the DataLoader that is prepared together with the model, or was before it."""
        from lightning_mics.auto import sample_of

        sample = sample_of(next(iter([*loaders, *self._dataloaders]), None))
        if sample is not None and self.split_batches:
            return replace(sample, micro_batch=max(1, sample.micro_batch // self.num_processes))
        return sample

    def _gather_before_saving(self, model: Any) -> None:
        """Lets ``model.save_pretrained(folder)``, called on every rank, write whole weights once."""
        save_pretrained = model.save_pretrained
        signature = inspect.signature(save_pretrained)

        @functools.wraps(save_pretrained)
        def gather_and_save(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs)
            if arguments.arguments.get("state_dict") is None and "state_dict" not in kwargs:
                kwargs = {**kwargs, "state_dict": self.get_state_dict(model)}
            return save_pretrained(*args, **kwargs) if self.is_main_process else None

        model.save_pretrained = gather_and_save

    # Training.

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Leaves out the all-reduce between replicas; the reduce-scatter inside the partition group stays."""
        if is_sharded(model):
            with defer_replication_sync(model):
                yield
        else:
            with super().no_sync(model):
                yield

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips by the norm of the whole gradient; returns it, a plain scalar tensor, equal on all ranks."""
        self.unscale_gradients()
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        return clip_parameters_(params, float(max_norm), float(norm_type))  # type: ignore[arg-type]

    @contextmanager
    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> Iterator[None]:
        """Not supported: ranks of a partition run every collective together.

        Raises:
            MiCSError: Where there are other processes.
        """
        if self.use_distributed:
            raise MiCSError(
                "join_uneven_inputs lets ranks stop early, but the ranks of a partition gather parameters together. "
                "Give every rank the same number of batches: DataLoaderConfiguration(even_batches=True), the default."
            )
        yield

    # Saving.

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Returns the whole weights in host memory, on rank 0; the others get none. Collective over the world."""
        model = self.unwrap_model(model) if unwrap else model
        if not is_sharded(model):
            return super().get_state_dict(model, unwrap)
        return checkpoints.model_state(model, full=True)

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Saves an object on the main process.

        Raises:
            MiCSError: If it holds shards, which are not the whole weights.
        """
        if any(isinstance(leaf, DTensor) for leaf in tree_leaves(obj)):
            raise MiCSError(
                f"accelerator.save({f!s}) was given shards, as model.state_dict() returns them. Save the whole "
                "weights, accelerator.get_state_dict(model), which every rank must call, or use "
                "accelerator.save_model or accelerator.save_state."
            )
        super().save(obj, f, safe_serialization=safe_serialization)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Writes the whole weights, and a Hugging Face model's configuration, for ``from_pretrained``.

        Collective over the world: call it on every rank.
        """
        model = self.unwrap_model(model, keep_torch_compile=False)
        weights = self.get_state_dict(model)
        if self.is_main_process:
            _write_weights(model, weights, Path(save_directory), max_shard_size, safe_serialization)
        self.wait_for_everyone()

    def save_state(
        self, output_dir: str | os.PathLike[str] | None = None, safe_serialization: bool = True, **kwargs: Any
    ) -> str:
        """Saves models, optimizers, schedulers, samplers, random states and registered objects.

        The folder appears under its name when it is whole. It can be loaded at another shard size and world size, by
        Lightning and by bare loops. Collective over the world.

        Returns:
            The folder.

        Raises:
            CheckpointError: On every rank, if writing failed on any; an earlier checkpoint of the name is untouched.
        """
        folder = self._next_folder() if output_dir is None or self._names_checkpoints else Path(output_dir).expanduser()
        whole = checkpoints.model_state(self._models[0], full=True) if self._writes_whole_weights else None
        weights = [checkpoints.model_state(model) for model in self._models]
        state: dict[str, Any] = {}

        def add_files(temporary: Path) -> None:
            for hook in self._save_model_state_pre_hook.values():
                hook(self._models, weights, str(temporary))
            state.update({_key("state_dict", index): entry for index, entry in enumerate(weights)})
            self._write_rest(temporary, safe_serialization)
            if whole:
                _write_weights(self._models[0], whole, temporary, "10GB", safe_serialization)

        for index, optimizer in enumerate(self._optimizers):
            inner = _inner(optimizer)
            state[f"optimizer_{index}"] = checkpoints.optimizer_state(self._owner(inner), inner)
        meta = {
            "mics": checkpoints.huggingface_metadata(self._models[0]) if self._models else {},
            "accelerate": {"step": self.step},
        }
        checkpoints.save_sharded(folder, state, meta, add_files)
        self.project_configuration.iteration += 1
        self._delete_oldest(folder.parent)
        return str(folder)

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        """Loads what :meth:`save_state` saved, at any shard size and world size. Collective over the world.

        Of a checkpoint that Lightning or a bare loop wrote, it loads the weights and the optimizer.

        Raises:
            CheckpointError: On every rank, if the checkpoint is missing, damaged or does not fit.
        """
        folder = Path(input_dir).expanduser() if input_dir is not None else self._newest_folder()
        models = list(self._models)
        for hook in self._load_model_state_pre_hook.values():
            hook(models, str(folder))
        meta: dict[str, Any] = {}
        for index, model in enumerate(self._models):
            optimizers = {
                f"optimizer_{place}": _inner(optimizer)
                for place, optimizer in enumerate(self._optimizers)
                if self._owner(_inner(optimizer)) is model
            }
            # A hook that has loaded a model takes it off the list; its optimizer is still ours to load.
            key = _key("state_dict", index) if model in models else None
            meta = checkpoints.load_into(folder, model, optimizers, model_key=key, weights_only=False)
        if "accelerate" in meta:
            self._read_rest(folder, load_kwargs)
            self.step = meta["accelerate"]["step"]  # of all ranks, also of those that the saving world did not have

    def _owner(self, optimizer: Optimizer) -> nn.Module:
        params = {param for group in optimizer.param_groups for param in group["params"]}
        for model in self._models:
            if params.issubset(model.parameters()):
                return model
        raise CheckpointError(
            f"{type(optimizer).__name__} trains parameters of several models, or of one that was not prepared. Pass "
            "its model to prepare, and give each model an optimizer of its own."
        )

    @property
    def _names_checkpoints(self) -> bool:
        return bool(self.project_configuration.automatic_checkpoint_naming)

    @property
    def _writes_whole_weights(self) -> bool:
        return bool(self.mics_plugin.full_checkpoint and self._models)

    def _next_folder(self) -> Path:
        if not self._names_checkpoints:
            raise CheckpointError(
                "save_state needs a folder: save_state('checkpoints/step_100'), or "
                "ProjectConfiguration(automatic_checkpoint_naming=True, project_dir=...)."
            )
        folder = Path(self.project_dir) / "checkpoints" / f"checkpoint_{self.save_iteration}"
        if folder.exists():
            raise CheckpointError(
                f"{folder} exists already. Set accelerator.project_configuration.iteration to the number to go on with."
            )
        return folder

    def _named_folders(self, parent: Path) -> list[Path]:
        found = [folder for folder in parent.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+", folder.name)]
        return sorted(found, key=lambda folder: int(folder.name.rpartition("_")[2]))

    def _newest_folder(self) -> Path:
        folders = self._named_folders(Path(self.project_dir) / "checkpoints") if self._names_checkpoints else []
        if not folders:
            raise CheckpointError("load_state needs a folder: there are no automatically named checkpoints.")
        return folders[-1]

    def _delete_oldest(self, parent: Path) -> None:
        """Keeps to ``total_limit``; only now that the new checkpoint is whole."""
        limit = self.project_configuration.total_limit
        if self._names_checkpoints and limit is not None and self.is_main_process:
            for folder in self._named_folders(parent)[: -max(limit, 1)]:
                checkpoints.remove(folder)
        self.wait_for_everyone()

    def _write_rest(self, folder: Path, safe_serialization: bool) -> None:
        save_accelerator_state(
            str(folder),
            [],
            [],
            self._schedulers,
            self._dataloaders,
            self.process_index,
            self.step,
            self.scaler,
            safe_serialization=safe_serialization,
        )
        for index, obj in enumerate(self._custom_objects):
            save_custom_state(obj, str(folder), index)

    def _read_rest(self, folder: Path, load_kwargs: dict[str, Any] | None) -> None:
        load_accelerator_state(
            str(folder),
            [],
            [],
            self._schedulers,
            self._dataloaders,
            self.process_index,
            self.scaler,
            "cpu",
            load_kwargs,
        )
        saved = len(list(folder.glob("custom_checkpoint_*.pkl")))
        if saved != len(self._custom_objects):
            raise CheckpointError(
                f"{folder} holds {saved} registered object(s), and {len(self._custom_objects)} are registered. Call "
                "register_for_checkpointing with the same objects as when it was saved."
            )
        for index, obj in enumerate(self._custom_objects):
            load_custom_state(obj, str(folder), index)


def _prepare_generation(model: nn.Module) -> None:
    """Lets the models of transformers generate: gathered all the while, and on every rank until the last is done."""
    for module in model.modules():
        if hasattr(module, "generate"):
            module._is_fsdp_managed_module = True  # type: ignore[assignment]  # transformers asks for this name
    if hasattr(model, "generate"):
        register_forward_method(model, "generate")


def _key(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _inner(optimizer: Any) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _write_weights(
    model: Any, weights: dict[str, Any], folder: Path, max_shard_size: int | str, safe_serialization: bool
) -> None:
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        weights, folder, max_shard_size=max_shard_size, safe_serialization=safe_serialization, metadata={"format": "pt"}
    )
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        model.config.save_pretrained(folder)


def _refuse_other_engines(options: dict[str, Any]) -> None:
    for name in _OTHER_ENGINES:
        if options.get(name) is not None:
            raise MiCSConfigError(
                f"{name} asks for another sharding engine beside MiCS. Leave it out, or use accelerate.Accelerator."
            )
    for handler in options.get("kwargs_handlers") or ():
        if not isinstance(handler, DistributedDataParallelKwargs):
            continue
        hook = DDPCommunicationHookType(handler.comm_hook)
        if hook != DDPCommunicationHookType.NO:
            raise MiCSConfigError(
                f"DistributedDataParallelKwargs(comm_hook={hook.value!r}) compresses the all-reduce of DDP, which MiCS "
                "does not use. Leave it out; reduce_dtype='bfloat16' halves the bytes of gradients."
            )


def _check_parallelism(parallelism: Any, plugin: MiCSPlugin) -> None:
    """Checks that a ``ParallelismConfig`` says what the plugin says."""
    if parallelism is None:
        return
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallelism, name, 1) != 1:
            raise MiCSConfigError(
                f"ParallelismConfig({name}={getattr(parallelism, name)}) does not go with MiCS. Set {name}=1."
            )
    shard, replicate = parallelism.dp_shard_size, parallelism.dp_replicate_size
    if shard != plugin.shard_size:
        raise MiCSConfigError(
            f"ParallelismConfig(dp_shard_size={shard}, dp_replicate_size={replicate}) contradicts "
            f"shard_size={plugin.shard_size!r} of the MiCS plugin. Give one of them only, or the same number to both."
        )
    world = launched_world_size()
    if shard * replicate != world:
        raise MiCSConfigError(
            f"ParallelismConfig(dp_shard_size={shard}, dp_replicate_size={replicate}) is for {shard * replicate} "
            f"processes, but {world} are running. Use dp_replicate_size={max(1, world // shard)}, or leave it out."
        )


def _check_world(plugin: MiCSPlugin) -> None:
    """Checks the shard size against the launcher's variables, so that a mistake is found before anything connects."""
    assert plugin.config is not None
    world = launched_world_size()
    topology = ClusterTopology.from_env(world)
    if plugin.config.node_size is not None or topology is None:
        topology = ClusterTopology(world_size=world, node_size=plugin.config.node_size or world)
    check_layout(plugin.config, topology)


def _forget_lonely_state() -> None:
    """Drops Accelerate's state where something made it believe that this rank is alone (see ``take_over_launch``)."""
    is_alone = PartialState._shared_state != {} and PartialState().distributed_type == DistributedType.NO
    if is_alone and launched_world_size() > 1:
        AcceleratorState._reset_state(reset_partial_state=True)


def _check_mixed_precision(accelerator: Accelerator) -> None:
    precision = accelerator.mixed_precision
    if precision not in ACCELERATE_PRECISIONS:
        raise MiCSConfigError(
            f"mixed_precision={precision!r} is not supported by MiCS. Values that work: "
            f"{', '.join(ACCELERATE_PRECISIONS)}."
        )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise MiCSConfigError("mixed_precision='fp16' needs a GPU. On CPUs, use 'bf16' or 'no'.")
