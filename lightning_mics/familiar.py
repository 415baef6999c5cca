"""Arguments by their names in others' FSDP and in DeepSpeed's strategy: what they are here, or what to use instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp.wrap import CustomPolicy, size_based_auto_wrap_policy

from lightning_mics.config import check_switch
from lightning_mics.core.log import inform
from lightning_mics.errors import MiCSConfigError

_Init = TypeVar("_Init", bound=Callable[..., None])
_STRATEGIES: dict[str, dict[str, Any]] = {
    "FULL_SHARD": {"shard_size": "world"},
    "SHARD_GRAD_OP": {"shard_size": "world", "reshard_after_forward": False},
    "NO_SHARD": {"shard_size": 1},
    "HYBRID_SHARD": {"shard_size": "node"},
    "HYBRID_SHARD_ZERO2": {"shard_size": "node", "reshard_after_forward": False},
}
# Of DeepSpeed.
_STAGES: dict[int, dict[str, Any]] = {
    0: {"shard_size": 1},
    1: {"shard_size": 1, "optimizer_shard_size": "world"},
    2: {"shard_size": "world", "reshard_after_forward": False},
    3: {"shard_size": "world"},
}
# Which values say what is sharded, and leave over how many ranks to a setting beside them.
_LEAVE_SIZE_OPEN: dict[str, Callable[[Any], bool]] = {
    "sharding_strategy": lambda value: _word(value).startswith("HYBRID"),
    "stage": lambda value: value in (2, 3),
}
# Values that ask for what MiCS does anyway, and what to do about others.
_ANYWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "fsdp_version": ((2,), "MiCS is built on FSDP2"),
    "tensor_parallel_size": ((1,), "MiCS has no tensor parallelism. Use tensor_parallel_size=1"),
    "use_orig_params": ((True,), "parameters keep their own names and shapes. Leave it out"),
    "sync_module_states": ((True,), "MiCS always takes rank 0's values where ranks differ. Leave it out"),
    "limit_all_gathers": ((True,), "FSDP2 holds no more than two units gathered ahead. Leave it out"),
    "forward_prefetch": ((False,), "FSDP2 gathers the next unit ahead by itself. Leave it out"),
    "backward_prefetch": (("BACKWARD_PRE",), "FSDP2 gathers ahead in the backward pass by itself. Leave it out"),
    "min_num_params": ((0,), "units are chosen by class or by function. Use wrap="),
    "cpu_ram_efficient_loading": ((True, False), "each rank reads its own rows of pretrained weights. Leave it out"),
    "zero_optimization": ((True,), "one copy on each rank is shard_size=1. Use that, or Lightning's 'ddp'"),
    "offload_optimizer_device": (("CPU",), "nothing goes to disks. Use cpu_offload=True"),
    "offload_params_device": (("CPU",), "nothing goes to disks. Use cpu_offload=True"),
    "pin_memory": ((False,), "memory of the host is pinned where that helps. Leave it out"),
    "overlap_comm": ((True,), "communication always overlaps computation. Leave it out"),
    "contiguous_gradients": ((True,), "gradients of a unit are contiguous. Leave it out"),
    "allgather_partitions": ((True,), "parameters are always all-gathered. Leave it out"),
    "reduce_scatter": ((True,), "gradients are always reduce-scattered. Leave it out"),
    "zero_allow_untested_optimizer": ((True,), "optimizers that cannot work are refused. Leave it out"),
    "logging_batch_size_per_gpu": (("AUTO",), "batch sizes are the data loader's. Leave it out"),
    "load_full_weights": ((False, True), "ckpt_path takes folders of shards and whole files. Leave it out"),
    "exclude_frozen_parameters": ((False,), "checkpoints hold all parameters. Leave it out"),
    "partition_activations": ((False,), "MiCS has no tensor parallelism. Use activation_checkpointing=True"),
    "cpu_checkpointing": ((False,), "Use activation_checkpointing=True with activation_checkpointing_offload=True"),
    "contiguous_memory_optimization": ((False,), "Use activation_checkpointing=True"),
    "synchronize_checkpoint_boundary": ((False,), "Use activation_checkpointing=True"),
}
_ELSEWHERE = {
    "accelerator": "Give it to the Trainer or to Fabric, as accelerator='cuda'",
    "parallel_devices": "Give devices= to the Trainer or to Fabric",
    "device_id": "Give devices= to the Trainer or to Fabric",
    "cluster_environment": "Give it to the Trainer or to Fabric, as plugins=[...]",
    "precision_plugin": "Give precision='bf16-mixed' to the Trainer",
    "precision": "Give precision='bf16-mixed' to the Trainer or to Fabric",
    "checkpoint_io": "MiCS writes checkpoints itself; save_distributed_checkpoint= chooses folders or single files",
    "process_group": "MiCS makes its own groups from shard_size= and node_size=",
    "dp_mesh_dims": "MiCS makes its own mesh from shard_size= and node_size=",
    "parallelize_fn": "MiCS shards the module itself; wrap= chooses the units",
    "process_group_backend": "Give MiCSAccelerator kwargs_handlers=[InitProcessGroupKwargs(backend=...)]",
    "timeout": "Give MiCSAccelerator kwargs_handlers=[InitProcessGroupKwargs(timeout=...)]",
    "param_init_fn": "Modules on the meta device are filled by their reset_parameters()",
    "state_dict_config": "Whole weights always come on the CPU of rank 0. Leave it out",
    "optim_state_dict_config": "Optimizer states are saved with the model. Leave it out",
    "shard_placement_fn": "Parameters are sharded over their first dimension",
    "module": "Give the module to mics_shard, the Trainer, Fabric or prepare",
    "remote_device": "Build the model on the meta device, or in configure_model",
    "logging_level": "Use logging.getLogger('lightning_mics').setLevel(...)",
    **dict.fromkeys(
        (
            *("nvme_path", "params_buffer_count", "params_buffer_size", "max_in_cpu", "optimizer_buffer_count"),
            *("block_size", "queue_depth", "single_submit", "overlap_events", "thread_count"),
        ),
        "nothing goes to disks. Use cpu_offload=True, or a larger shard_size=",
    ),
    **dict.fromkeys(
        ("allgather_bucket_size", "reduce_bucket_size", "sub_group_size"),
        "units decide what travels together. Choose them by wrap=",
    ),
    **dict.fromkeys(
        ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"),
        "Give precision='16-mixed' to the Trainer, which brings PyTorch's gradient scaler",
    ),
}


def takes_familiar_names(init: _Init) -> _Init:
    """Makes a constructor take arguments by their names in Lightning's and Accelerate's FSDP, and in DeepSpeed.

    What means the same is passed on under our name, with a line that says what it became.

    Raises:
        MiCSConfigError: By the constructor, if such an argument means nothing here, or contradicts another.
    """
    known = frozenset(inspect.signature(init).parameters)

    @functools.wraps(init)
    def translating(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **_translate(kwargs, known))

    return translating  # type: ignore[return-value]


def _translate(arguments: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    ours = {name: value for name, value in arguments.items() if name in known and not _is_foreign(name, value)}
    # These leave open over how many ranks, so that they come last.
    foreign = sorted((name for name in arguments if name not in ours), key=_LEAVE_SIZE_OPEN.__contains__)
    for name in foreign:
        value = arguments[name]
        became = None if value is None else _meaning(name, value, known, ours)
        if became is None:
            ours.update({} if value is None and _is_familiar(name) else {name: value})
            continue
        for setting, meant in became.items():
            if setting in ours and ours[setting] != meant:
                raise MiCSConfigError(
                    f"{name}={_shown(value)} means {setting}={meant!r}, but {setting}={ours[setting]!r} is given too. "
                    f"Keep {setting}= only.",
                    setting=setting,
                )
        ours.update(became)
        meaning = ", ".join(f"{setting}={_shown(meant)}" for setting, meant in became.items())
        inform(f"{name}={_shown(value)} " + (f"became {meaning}." if became else "is what MiCS does anyway."))
    return ours


def _is_familiar(name: str) -> bool:
    return name in _ANYWAY or name in _ELSEWHERE or name in _MEANINGS


def _is_foreign(name: str, value: object) -> bool:
    """Returns whether an argument has a name of ours, and a value of another library's."""
    if name == "cpu_offload":
        return isinstance(value, CPUOffload | OffloadPolicy)
    return name == "reshard_after_forward" and _word(value) in _STRATEGIES


def _meaning(name: str, value: Any, known: frozenset[str], given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what an argument means in our settings; ``None`` for a name that is not familiar."""
    if name in _ANYWAY:
        works, advice = _ANYWAY[name]
        if value in works or _word(value) in works:
            return {}
        raise _refusal(name, value, advice)
    if name in _ELSEWHERE:
        raise _refusal(name, value, _ELSEWHERE[name])
    if name not in _MEANINGS:
        return None
    meaning = _MEANINGS[name](name, value)
    if "shard_size" in given and name in _LEAVE_SIZE_OPEN and _LEAVE_SIZE_OPEN[name](value):
        meaning.pop("shard_size", None)
    # The strategies of Lightning and the plugin of Accelerate name this switch differently.
    if "full_checkpoint" in meaning and "full_checkpoint" not in known:
        meaning["save_distributed_checkpoint"] = not meaning.pop("full_checkpoint")
    return meaning


def _word(value: Any) -> str:
    """Returns the word that an enumeration's member, or a string, stands for."""
    return str(getattr(value, "name", value)).upper().removeprefix("_")


def _wrap(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.lower() == "transformer_based_wrap":
        return {}
    by_size = getattr(value, "func", value) is size_based_auto_wrap_policy
    if isinstance(value, str | CustomPolicy) or by_size:
        raise _refusal(name, value, "Use wrap= with classes, names, or a function that takes a module")
    if not callable(value):
        return _classes(name, value)

    def selects(module: nn.Module) -> bool:
        return bool(value(module=module, recurse=False, nonwrapped_numel=sum(p.numel() for p in module.parameters())))

    return {"wrap": selects}


def _classes(name: str, value: Any) -> dict[str, Any]:
    return {"wrap": frozenset(_several(name, value))}


def _several(name: str, value: Any) -> Iterable[Any]:
    if not isinstance(value, Iterable):
        raise _refusal(name, value, "it is no collection")
    return value


def _strategy(name: str, value: Any) -> dict[str, Any]:
    numbered = dict(enumerate(_STRATEGIES, start=1))  # as Accelerate's files number them
    word = numbered.get(value, _word(value)) if isinstance(value, int) else _word(value)
    if word not in _STRATEGIES:
        raise _refusal(name, value, f"Known are {', '.join(_STRATEGIES)}; or use shard_size=")
    return dict(_STRATEGIES[word])


def _stage(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, bool) or value not in _STAGES:
        raise _refusal(name, value, "Known are 0 to 3; or use shard_size=")
    return dict(_STAGES[value])


def _mics_size(name: str, value: Any) -> dict[str, Any]:
    return {"shard_size": "world"} if value == -1 else _size(name, value)


def _in_two_stages(name: str, value: Any) -> dict[str, Any]:
    check_switch(name, value)
    return {"hierarchical": "auto" if value else False}


def _offload_states(name: str, value: Any) -> dict[str, Any]:
    check_switch(name, value)
    return {"cpu_offload": True} if value else {}


def _reshard(name: str, value: Any) -> dict[str, Any]:
    return {"reshard_after_forward": _strategy(name, value).get("reshard_after_forward", True)}


def _state_dict_type(name: str, value: Any) -> dict[str, Any]:
    words = {"FULL": True, "SHARDED": False}
    word = _word(value).removesuffix("_STATE_DICT")
    if word not in words:
        raise _refusal(name, value, "Use 'full' or 'sharded'")
    return {"full_checkpoint": words[word]}


def _size(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refusal(name, value, "Use shard_size=, the ranks that hold one copy of the model, such as shard_size=8")
    return {"shard_size": value}


def _mesh(name: str, value: Any) -> dict[str, Any]:
    sizes = tuple(value.shape) if isinstance(value, DeviceMesh) else value
    if not (isinstance(sizes, tuple | list) and len(sizes) in (1, 2) and all(isinstance(size, int) for size in sizes)):
        raise _refusal(name, value, "Use shard_size=, the ranks that hold one copy of the model, such as shard_size=8")
    return {"shard_size": sizes[-1]}


def _offload(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, CPUOffload | OffloadPolicy):
        raise _refusal(name, value, "Use cpu_offload=True or False")
    return {"cpu_offload": isinstance(value, CPUOffloadPolicy) or bool(getattr(value, "offload_params", False))}


def _recompute(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        raise _refusal(name, value, "Use activation_checkpointing= with classes, names, or a function of a module")
    return {"activation_checkpointing": _wrap(name, value)["wrap"]}


def _dtypes(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, MixedPrecision):
        if value.buffer_dtype is not None or value.keep_low_precision_grads:
            raise _refusal(name, value, "Buffers and gradients keep their own dtype here. Use param_dtype=")
        found = {"param_dtype": value.param_dtype, "reduce_dtype": value.reduce_dtype or value.param_dtype}
        root, units = value.cast_root_forward_inputs, value.cast_forward_inputs
        inputs = root if root or not units else "units"
        return {**{setting: dtype for setting, dtype in found.items() if dtype}, "cast_forward_inputs": inputs}
    if isinstance(value, MixedPrecisionPolicy):
        names = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")
        return {setting: getattr(value, setting) for setting in names if getattr(value, setting) is not None}
    raise _refusal(name, value, "Use param_dtype= and reduce_dtype=")


def _ignore(name: str, value: Any) -> dict[str, Any]:
    return {"ignore": value if isinstance(value, str) else tuple(_several(name, value))}


def _distributed(name: str, value: Any) -> dict[str, Any]:
    check_switch(name, value)
    return {"full_checkpoint": not value}


_MEANINGS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "auto_wrap_policy": _wrap,
    "transformer_cls_names_to_wrap": _classes,
    "sharding_strategy": _strategy,
    "reshard_after_forward": _reshard,
    "state_dict_type": _state_dict_type,
    "save_distributed_checkpoint": _distributed,
    "data_parallel_size": _size,
    "stage": _stage,
    "mics_shard_size": _mics_size,
    "mics_hierarchical_params_gather": _in_two_stages,
    "offload_optimizer": _offload_states,
    "offload_parameters": _offload_states,
    "device_mesh": _mesh,
    "mesh": _mesh,
    "cpu_offload": _offload,
    "offload_policy": _offload,
    "activation_checkpointing_policy": _recompute,
    "mixed_precision": _dtypes,
    "mixed_precision_policy": _dtypes,
    "mp_policy": _dtypes,
    "ignored_modules": _ignore,
    "ignored_states": _ignore,
    "ignored_params": _ignore,
}


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list | set | frozenset):
        return f"[{', '.join(sorted(map(_shown, value)))}]"
    if isinstance(value, type) or callable(value):
        return str(getattr(value, "__name__", type(value).__name__))
    return _word(value) if hasattr(value, "name") and hasattr(value, "value") else repr(value)


def _refusal(name: str, value: Any, advice: str) -> MiCSConfigError:
    return MiCSConfigError(f"{name}={_shown(value)} means nothing to MiCS: {advice}.", setting=name)
