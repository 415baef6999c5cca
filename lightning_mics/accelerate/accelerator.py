"""An ``Accelerator`` that shards models with MiCS."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, DistributedType, DynamoBackend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_mics import checkpoint as checkpoints
from lightning_mics.accelerate.averaging import check_no_shards, refuse_local_sgd
from lightning_mics.accelerate.backends import ask_for_backends
from lightning_mics.accelerate.joined import JoinedShard
from lightning_mics.accelerate.plugin import MiCSPlugin, launched_world_size, take_over_launch
from lightning_mics.accelerate.saving import load_state, save_state, write_weights
from lightning_mics.checkpoint.savers import WholeWeights
from lightning_mics.core._torch import tree_map_only
from lightning_mics.core.accumulation import defer_replication_sync
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.checks import check_layout
from lightning_mics.core.clipping import clip_parameters_, clip_parameters_by_value_
from lightning_mics.core.failures import explaining
from lightning_mics.core.groups import end_well
from lightning_mics.core.joined import JoinedLoader
from lightning_mics.core.loss_scaling import use_sharded_scaler
from lightning_mics.core.mesh import detect_topology
from lightning_mics.core.optimizers import ShardedParams, check_unused
from lightning_mics.core.plain import adopt
from lightning_mics.core.runtime import attach, compile_units, is_sharded, own_runtime, runtime_of
from lightning_mics.core.unequal import unequal_passes
from lightning_mics.errors import MiCSConfigError, MiCSError
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

    joins_loaders = True  # not for a script that fetches batches further ahead than one microstep

    def __init__(self, *args: Any, mics_plugin: MiCSPlugin | None = None, **kwargs: Any) -> None:
        options = inspect.signature(Accelerator.__init__).bind(self, *args, **kwargs).arguments
        _refuse_other_engines(options)
        self.mics_plugin = mics_plugin or MiCSPlugin()
        _check_parallelism(options.get("parallelism_config"), _check_world(self.mics_plugin))
        take_over_launch()
        _forget_lonely_state()
        ask_for_backends(options, self.mics_plugin)
        options["parallelism_config"] = None
        self._topology: ClusterTopology | None = None
        self._layout: GroupLayout | None = None
        self._sharded = ShardedParams()
        del options["self"]
        super().__init__(**options)
        _check_mixed_precision(self)
        use_sharded_scaler(self, self.device)
        if dist.is_initialized():
            end_well()
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

        A :class:`~lightning_mics.JoinedLoader` reads this rank's own data, and is not divided among ranks.

        Raises:
            MiCSConfigError: On every rank, if a model cannot be sharded or an optimizer has taken steps already.
        """
        for model in (arg for arg in args if isinstance(arg, nn.Module)):
            self._shard(
                model,
                [arg for arg in args if isinstance(arg, Optimizer)],
                [arg for arg in args if isinstance(arg, DataLoader)],
            )
        own = [self._prepare_own(arg) if isinstance(arg, JoinedLoader) else arg for arg in args]
        return super().prepare(*own, device_placement=device_placement)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Shards a model in place, for training or for evaluation."""
        self._shard(model)
        if not is_sharded(model):
            return super().prepare_model(model, device_placement, evaluation_mode)
        with self._units_compiled(model):
            # In evaluation mode Accelerate adds autocast, but no wrapper for data parallelism.
            return super().prepare_model(model, device_placement=False, evaluation_mode=True)

    @contextmanager
    def _units_compiled(self, model: nn.Module) -> Iterator[None]:
        """Compiles units in place, where Accelerate would make another model whose root is not the sharded one.

        A graph of more than a unit cannot be: between units parameters are gathered.
        """
        plugin = self.state.dynamo_plugin
        options, backend = plugin.to_kwargs(), plugin.backend
        if backend != DynamoBackend.NO:
            compile_units(model, **options)
        plugin.backend = DynamoBackend.NO
        try:
            yield
        finally:
            plugin.backend = backend

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepares a loader; ``uneven_inputs`` acts on it while models are in training mode."""
        if isinstance(data_loader, JoinedShard):
            self._dataloaders += [] if data_loader in self._dataloaders else [data_loader]
            return data_loader
        prepared = super().prepare_data_loader(data_loader, *args, **kwargs)
        joined = self._joined(prepared)
        self._dataloaders[:] = [joined if loader is prepared else loader for loader in self._dataloaders]
        return joined

    def _prepare_own(self, joined: JoinedLoader) -> JoinedShard:
        """Prepares a loader of this rank's own data."""
        loader: Any = joined.loader
        shard = prepare_data_loader(
            loader,
            self.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.device_placement,
            dispatch_batches=False,
            use_stateful_dataloader=self.use_stateful_dataloader or hasattr(loader, "state_dict"),
        )
        return JoinedShard.over(shard, self._trained)

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """Returns a loader that begins behind some batches."""
        skipped = super().skip_first_batches(dataloader, num_batches)
        return self._joined(skipped) if isinstance(dataloader, JoinedShard) else skipped

    def _joined(self, loader: Any) -> Any:
        joins = self.joins_loaders and self.use_distributed and self.mics_plugin.config.uneven_inputs != "error"
        return JoinedShard.over(loader, self._trained) if joins and type(loader) is DataLoaderShard else loader

    def _trained(self) -> nn.Module | None:
        """Returns the models that are trained now, if any is."""
        models = [model for model in self._models if is_sharded(model)]
        if not any(model.training for model in models):
            return None
        return models[0] if len(models) == 1 else nn.ModuleList(models)

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """Prepares an optimizer, which may have been built before its model was sharded."""
        if not isinstance(optimizer, AcceleratedOptimizer):
            self._sharded.rebind(optimizer)
        return super().prepare_optimizer(optimizer, device_placement)

    def _shard(
        self, model: nn.Module, optimizers: Sequence[Optimizer] = (), loaders: Sequence[DataLoader[Any]] = ()
    ) -> None:
        if self._topology is None or next(model.parameters(), None) is None:
            return
        if is_sharded(model):
            if own_runtime(model) is None:  # a part of it is, by the user
                adopt(model, move=True)
                self._layout = runtime_of(model).mesh.layout
            return
        for optimizer in optimizers:
            check_unused(optimizer, model)
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
        original = vars(model).get("_orig_mod")  # of what compile_regions made; unwrap_model may return it
        if original is not None:
            attach(original, runtime_of(model))
        for part in (model, original):
            if part is not None:
                WholeWeights(part, self.is_main_process)
            if part is not None and not hasattr(part, "no_sync"):
                part.no_sync = functools.partial(defer_replication_sync, model)  # as DDP's, for loops that call it

    def _find_sample(self, loaders: Sequence[Any]) -> Sample | None:
        """Takes a sample of the DataLoader that is prepared together with the model, or was before it."""
        from lightning_mics.auto import sample_of

        sample = sample_of(next(iter([*loaders, *self._dataloaders]), None))
        if sample is not None and self.split_batches:
            return replace(sample, micro_batch=max(1, sample.micro_batch // self.num_processes))
        return sample

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

    def clip_grad_value_(self, parameters: Iterable[nn.Parameter], clip_value: float) -> None:
        """Clips each value of the gradients."""
        self.unscale_gradients()
        clip_parameters_by_value_([parameters] if isinstance(parameters, Tensor) else list(parameters), clip_value)  # type: ignore[list-item]

    def wait_for_everyone(self) -> None:
        """Waits for all ranks; ends with an error where they can never come."""
        with explaining():
            super().wait_for_everyone()

    def end_training(self) -> None:
        """Ends the run, when the checkpoint that is being written is whole."""
        checkpoints.wait_for_checkpoints()
        super().end_training()

    @contextmanager
    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> Iterator[None]:
        """Lets ranks have different numbers of batches: in training they end as ``uneven_inputs`` says.

        Args:
            joinables: The models, in training or in ``eval()`` mode.
            even_batches: Overrides that of the prepared loaders inside this context.

        Raises:
            MiCSError: Where there are other processes, and models are trained with ``uneven_inputs="error"``.
        """
        models = [model for model in joinables if isinstance(model, nn.Module) and is_sharded(model)]
        trains = not models or any(model.training for model in models)
        if self.use_distributed and trains and self.mics_plugin.config.uneven_inputs == "error":
            raise MiCSError(
                "join_uneven_inputs lets ranks stop early, but the ranks of a partition gather parameters together. "
                "Let all of them end together, MiCSPlugin(uneven_inputs='longest') or 'shortest', or train with the "
                "same number of batches on every rank: DataLoaderConfiguration(even_batches=True), the default. To "
                "evaluate, call model.eval() before it."
            )
        with ExitStack() as stack:
            samplers: list[Any] = [getattr(loader, "batch_sampler", None) for loader in self._dataloaders]
            for sampler in samplers if even_batches is not None else []:
                if hasattr(sampler, "even_batches"):
                    stack.callback(setattr, sampler, "even_batches", sampler.even_batches)
                    sampler.even_batches = even_batches
            if models and not trains:
                stack.enter_context(unequal_passes(nn.ModuleList(models)))
            yield

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduces tensors over all ranks.

        Raises:
            MiCSError: If one of them is a shard.
        """
        check_no_shards("accelerator.reduce", tensor)
        return super().reduce(tensor, *args, **kwargs)

    # Saving.

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """Returns the whole weights in host memory, on rank 0; the others get none. Collective over the world."""
        model = self.unwrap_model(model) if unwrap else model
        if not is_sharded(model):
            return super().get_state_dict(model, unwrap)
        with checkpoints.arrival("accelerator.get_state_dict", model.parameters()):
            return checkpoints.model_state(model, full=True)

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        """Saves an object on the main process; shards in it are gathered, for which every rank must call it."""
        whole: dict[int, Tensor] = {}  # of tied weights there is one

        def gather(shard: DTensor) -> Tensor:
            if id(shard) not in whole:
                whole[id(shard)] = checkpoints.whole(shard, "accelerator.save")
            return whole[id(shard)]

        super().save(tree_map_only(DTensor, gather, obj), f, safe_serialization=safe_serialization)

    @on_all_ranks("accelerator.save_model")
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
        folder = checkpoints.local_place(save_directory, "accelerator.save_model")
        weights = self.get_state_dict(model)  # a model inside of a compiled one does not know that it is sharded
        if self.is_main_process:
            model = self.unwrap_model(model, keep_torch_compile=False)
            write_weights(model, weights, folder, max_shard_size, safe_serialization)
        self.wait_for_everyone()

    @on_all_ranks("accelerator.save_state")
    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        storage_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """Saves models, optimizers, schedulers, samplers, random states and registered objects.

        The folder appears under its name when it is whole. It can be loaded at another shard size and world size, by
        Lightning and by bare loops. The file system of a URL gets ``storage_options``. Collective over the world.

        Returns:
            The folder.

        Raises:
            CheckpointError: On every rank, if writing failed on any; an earlier checkpoint of the name is untouched.
        """
        return str(save_state(self, output_dir, safe_serialization, storage_options))

    @on_all_ranks("accelerator.load_state")
    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        """Loads what :meth:`save_state` saved, at any shard size and world size. Collective over the world.

        Of a checkpoint that Lightning or a bare loop wrote, it loads the weights and the optimizer.
        ``load_kwargs={"weights_only": False}`` trusts the files, which may then hold any object. With ``strict=False``
        it goes on where names of parameters or the kind of an optimizer differ, and says so.

        Raises:
            CheckpointError: On every rank, if the checkpoint is missing, damaged or does not fit.
        """
        strict = load_model_func_kwargs.get("strict", True)
        load_state(self, input_dir, load_kwargs, strict=strict, options=storage_options)


refuse_local_sgd(MiCSAccelerator)


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


def _check_world(plugin: MiCSPlugin) -> GroupLayout | None:
    """Checks the sizes against the launcher's variables, so that a mistake is found before anything connects."""
    world = launched_world_size()
    topology = ClusterTopology.from_env(world)
    if plugin.config.node_size is not None or topology is None:
        topology = ClusterTopology(world_size=world, node_size=plugin.config.node_size or world)
    return check_layout(plugin.config, topology)


def _check_parallelism(parallelism: Any, layout: GroupLayout | None) -> None:
    """Checks that a ``ParallelismConfig`` says what the plugin says."""
    if parallelism is None:
        return
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallelism, name, 1) != 1:
            raise MiCSConfigError(
                f"ParallelismConfig({name}={getattr(parallelism, name)}) does not go with MiCS. Set {name}=1."
            )
    sizes = (parallelism.dp_shard_size, parallelism.dp_replicate_size)
    if layout is None or sizes != (layout.shard_size, layout.num_replicas):
        ours = (
            "shard_size='auto'" if layout is None else f"shard_size={layout.shard_size}, {layout.num_replicas} replicas"
        )
        raise MiCSConfigError(
            f"ParallelismConfig(dp_shard_size={sizes[0]}, dp_replicate_size={sizes[1]}) contradicts the MiCS plugin "
            f"({ours}). Leave it out, or give it the same sizes."
        )


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
