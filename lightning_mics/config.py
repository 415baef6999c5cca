"""The one place where settings are named, checked and given defaults."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeGuard, TypeVar, get_type_hints

import torch

from lightning_mics._moved import open_door
from lightning_mics.errors import MiCSConfigError
from lightning_mics.precision import DTYPE_NAMES, supported_precision
from lightning_mics.text import did_you_mean, nearest, parse_quantity
from lightning_mics.topology import OptimizerShardSize, Recomputation, ShardSize, check_positive_int
from lightning_mics.yaml_text import parse_yaml, read_yaml

Wrap = str | type[torch.nn.Module] | Collection[str | type[torch.nn.Module]] | Callable[[torch.nn.Module], bool]
ActivationCheckpointing = Recomputation | Wrap
_DTYPES: dict[str, torch.dtype] = {
    alias: getattr(torch, name) for name, aliases in DTYPE_NAMES.items() for alias in (name, *aliases)
}
Ignore = (
    str
    | type[torch.nn.Module]
    | torch.nn.Module
    | torch.nn.Parameter
    | Collection[str | type[torch.nn.Module] | torch.nn.Module | torch.nn.Parameter]
    | Callable[..., bool]
)
_ENV_PREFIX = "MICS_"
# Constructors that take settings have these behind their own arguments, so that older positions keep their meaning.
_LATER = (
    "memory_limit",
    "output_dtype",
    "cast_forward_inputs",
    "ignore",
    "verify_every",
    "on_mismatch",
    "async_checkpoint",
    "optimizer_shard_size",
    "replication_reduce_dtype",
    "replication_gather_dtype",
    "master_weights",
    "activation_checkpointing_offload",
    "uneven_inputs",
)
_LATER_ARGUMENTS = ("storage_options",)
_Init = TypeVar("_Init", bound=Callable[..., None])


@dataclass(frozen=True, kw_only=True)
class MiCSConfig:
    """How a model is sharded, gathered and synchronised.

    Attributes:
        shard_size: Ranks in a partition group: a number, ``"node"`` (all ranks of a node) or ``"world"`` (all ranks,
            which is plain full sharding). The smallest size whose shards fit into memory communicates least;
            ``"auto"`` takes that one, from a prediction at set-up.
        node_size: Ranks on a node. ``None`` asks the launcher's variables, then the host names.
        hierarchical: Whether collectives of a partition that spans nodes run in two stages, across nodes and inside
            them. ``"auto"`` measures at set-up which messages that makes faster on this cluster.
        wrap: What becomes an FSDP unit (parameters that are gathered together): ``"auto"``, one or several module
            classes or class names (any collection), or a function that takes a module and returns whether it is a unit.
        ignore: Parameters that stay whole on every rank, beside those that cannot be sharded (scalars): names, patterns
            such as ``"*.bias"``, names or classes of modules, parameters or modules themselves, one or a collection of
            these; or a function of a module, or of a parameter's name and the parameter.
        reshard_after_forward: Whether units are freed between forward and backward. The root, which is needed first
            in backward, never is.
        param_dtype: Dtype in which parameters are gathered and computed with; ``None`` keeps their own.
        reduce_dtype: Dtype of gradient reduction and of the accumulation over microsteps; ``None`` keeps the
            gradient's own. The default ``float32`` keeps long accumulation windows exact; where float64
            parameters are trained it is ``float64``.
        output_dtype: Dtype to which the root's floating-point outputs are cast; ``None`` leaves them.
        cast_forward_inputs: Whether floating-point inputs of units are cast to ``param_dtype``; ``"units"`` leaves out
            the root's inputs.
        activation_checkpointing: Which blocks recompute their activations in the backward pass: all (``True``), every
            so-many-th (a number, counted from the first), all but the results of matrix products and attention
            (``"selective"``), or those that classes, class names or a function choose, as for ``wrap``, whether they
            are units or not. Of those inside each other the outermost count.
        cpu_offload: Whether shards, their gradients and optimizer states live in host memory.
        verify: Whether the first accumulation window is checked (groups, counts, sharded gradients, equal replicas),
            and each one after a change of what wants gradients, of what an optimizer steps on, or of the model's mode.
            It costs a few passes over the local shard and a handful of small messages.
        verify_every: After how many optimizer steps fingerprints of the shards are compared between replicas, each
            time: 1 for every step, 100 for every hundredth; ``None`` or 0 for never. Without a wait: what differs
            is an error before the next step's gradients are averaged, with parameter, ranks and step.
        on_mismatch: What follows from a difference: ``"raise"``, or ``"repair"``, which copies shard and optimizer
            states from the majority (of three replicas or more) before the next forward pass.
        optimizer_shard_size: Ranks that divide the optimizer states of a replica, and the work of a step: a multiple of
            ``shard_size`` that divides the world, ``"partition"`` (those of the partition group, as in the paper) or
            ``"world"`` (all ranks: AdamW's states take 8/N bytes a float32 parameter instead of 8/p).
        replication_reduce_dtype: Dtype in which replicas exchange gradients at the end of a window, ``"bfloat16"`` or
            ``"float16"``: half the bytes for one rounding, as sums are made in float32 (or a wider ``reduce_dtype``),
            and travel in it. ``None`` exchanges them in ``reduce_dtype``.
        replication_gather_dtype: With ``optimizer_shard_size`` and a 16-bit ``param_dtype``, the same dtype here has
            ranks fetch what others have stepped on as forward passes would cast it. Who stepped keeps float32, and
            whoever reads parameters gets it: ranks fetch it then, together. ``None`` fetches it after each step.
        master_weights: Where float32 values of parameters are that are computed with in 16 bits (``param_dtype``):
            ``"partition"``, whose shards they are, or ``"owners"``, with ``optimizer_shard_size``: shards have 16 bits,
            and each rank keeps float32 of the slice that it steps on, beside the optimizer's states (2/p + 4/N bytes a
            parameter instead of 4/p). Losses are bitwise the same. What reads a sharded parameter sees 16 bits;
            ``state_dict()`` and checkpoints have float32.
        activation_checkpointing_offload: Whether what recomputed blocks keep, their inputs, waits for the backward pass
            in host memory. On CPUs it is there already.
        uneven_inputs: What happens where ranks have different numbers of training batches: ``"shortest"`` ends with the
            first that runs out, ``"longest"`` with the last, as the mean over the ranks that have data; all ranks end
            together. ``"error"``, an error when one waits for another that has ended, exchanges nothing.
        memory_limit: What ``shard_size="auto"`` may use on a rank: bytes, or text such as ``"36GiB"``. ``None`` takes
            the device's memory; on CPUs the rank's share of what is free on its machine.
        async_checkpoint: Whether checkpoints are written while training goes on. Saving then stops it only for a copy
            to host memory, which takes as much of it as a rank's shards.

    Raises:
        MiCSConfigError: If a value has the wrong type or range.
    """

    shard_size: ShardSize = "node"
    node_size: int | None = None
    hierarchical: bool | Literal["auto"] = "auto"
    wrap: Wrap = "auto"
    ignore: Ignore = ()
    reshard_after_forward: bool = True
    param_dtype: torch.dtype | str | None = None
    reduce_dtype: torch.dtype | str | None = torch.float32
    output_dtype: torch.dtype | str | None = None
    cast_forward_inputs: bool | Literal["units"] = True
    activation_checkpointing: ActivationCheckpointing = False
    cpu_offload: bool = False
    verify: bool = True
    memory_limit: int | str | None = None
    verify_every: int | None = None
    on_mismatch: Literal["raise", "repair"] = "raise"
    async_checkpoint: bool = False
    optimizer_shard_size: OptimizerShardSize = "partition"
    replication_reduce_dtype: torch.dtype | str | None = None
    replication_gather_dtype: torch.dtype | str | None = None
    master_weights: Literal["partition", "owners"] = "partition"
    activation_checkpointing_offload: bool = False
    uneven_inputs: Literal["error", "shortest", "longest"] = "error"

    def __post_init__(self) -> None:
        self._check_shard_size()
        self._check_optimizer_shard_size()
        if self.node_size is not None:
            check_positive_int("node_size", self.node_size, 1)
        if not isinstance(self.hierarchical, bool) and self.hierarchical != "auto":
            raise MiCSConfigError(
                f"hierarchical={self.hierarchical!r} is not one of 'auto', True, False.", setting="hierarchical"
            )
        if self.cast_forward_inputs != "units":
            check_switch("cast_forward_inputs", self.cast_forward_inputs, "True, False or 'units'")
        for name in (
            "reshard_after_forward",
            "cpu_offload",
            "verify",
            "async_checkpoint",
            "activation_checkpointing_offload",
        ):
            check_switch(name, getattr(self, name))
        self._check_recomputation()
        wires = ("replication_reduce_dtype", "replication_gather_dtype")
        for name in ("param_dtype", "reduce_dtype", "output_dtype", *wires):
            object.__setattr__(self, name, as_dtype(getattr(self, name), name))
        for name in wires:
            if getattr(self, name) not in (None, torch.bfloat16, torch.float16):
                raise MiCSConfigError(
                    f"{name}={getattr(self, name)} has more than 16 bits. Values that work: 'bfloat16', 'float16', or "
                    "None, which keeps what is exact.",
                    setting=name,
                )
        if self.memory_limit is not None:
            object.__setattr__(self, "memory_limit", as_bytes(self.memory_limit, "memory_limit"))
        self._check_modules("wrap", "'auto'")
        self._check_ignore()
        if self.verify_every is not None and self.verify_every != 0:
            check_positive_int("verify_every", self.verify_every, 100)
        if self.on_mismatch not in ("raise", "repair"):
            raise MiCSConfigError(
                f"on_mismatch={self.on_mismatch!r} is not one of 'raise', 'repair'.", setting="on_mismatch"
            )
        if self.master_weights not in ("partition", "owners"):
            raise MiCSConfigError(
                f"master_weights={self.master_weights!r} is not one of 'partition', 'owners'.", setting="master_weights"
            )
        if self.uneven_inputs not in ("error", "shortest", "longest"):
            raise MiCSConfigError(
                f"uneven_inputs={self.uneven_inputs!r} is not one of 'error', 'shortest', 'longest'.",
                setting="uneven_inputs",
            )
        if self.shard_size == "auto" and self.cpu_offload:
            raise MiCSConfigError(
                "shard_size='auto' plans the memory of devices, but cpu_offload=True keeps states in that of hosts. "
                "Give a number or 'node' as shard_size, or use cpu_offload=False.",
                setting="cpu_offload",
            )

    def _check_shard_size(self) -> None:
        if isinstance(self.shard_size, str):
            if self.shard_size not in ("node", "world", "auto"):
                raise MiCSConfigError(
                    f"shard_size={self.shard_size!r} is not a known word. Values that work: a whole number such as 8, "
                    "'node', 'world' or 'auto'.",
                    setting="shard_size",
                )
            return
        check_positive_int("shard_size", self.shard_size, "node")

    def _check_optimizer_shard_size(self) -> None:
        if isinstance(self.optimizer_shard_size, str):
            if self.optimizer_shard_size not in ("partition", "world"):
                raise MiCSConfigError(
                    f"optimizer_shard_size={self.optimizer_shard_size!r} is not a known word. Values that work: "
                    "'partition', 'world', or a multiple of shard_size that divides the world.",
                    setting="optimizer_shard_size",
                )
            return
        check_positive_int("optimizer_shard_size", self.optimizer_shard_size, "world")

    def _check_recomputation(self) -> None:
        how = self.activation_checkpointing
        others = "True, False, 'selective', a number such as 2 for every second block"
        if isinstance(how, int) or (isinstance(how, str) and how.islower()):  # a class of such a name fits into a list
            if how != "selective" and not (isinstance(how, int) and (how > 0 or how is False)):
                raise MiCSConfigError(
                    f"activation_checkpointing={how!r} says of no block whether it is recomputed. Values that work: "
                    f"{others}, or module classes and names of classes, such as ['Block'].",
                    setting="activation_checkpointing",
                )
        else:
            self._check_modules("activation_checkpointing", others)

    def _check_modules(self, setting: str, others: str) -> None:
        value = getattr(self, setting)
        entries = [value] if isinstance(value, str | type) or callable(value) else value
        if isinstance(entries, Collection) and not isinstance(entries, Mapping) and entries:
            for entry in entries:
                is_class = isinstance(entry, type) and issubclass(entry, torch.nn.Module)
                if not (isinstance(entry, str) or is_class or (callable(entry) and not isinstance(entry, type))):
                    break
            else:
                if not isinstance(entries, Sequence):  # ranks must go through it in the same order
                    by_name = sorted(entries, key=lambda entry: getattr(entry, "__qualname__", str(entry)))
                    object.__setattr__(self, setting, tuple(by_name))
                return
        raise MiCSConfigError(
            f"{setting}={value!r} is not usable. Values that work: {others}, a module class, a class name, a list or "
            "set of those, or a function that takes a module and returns True for those that it chooses.",
            setting=setting,
        )

    def _check_ignore(self) -> None:
        kinds = str | type | torch.nn.Module | torch.nn.Parameter
        is_one = isinstance(self.ignore, kinds) or callable(self.ignore)
        entries = [self.ignore] if is_one or not isinstance(self.ignore, Collection) else self.ignore
        if not all((isinstance(entry, kinds) or callable(entry)) and entry != "" for entry in entries):
            raise MiCSConfigError(
                f"ignore={self.ignore!r} is not usable. Values that work: the name of a parameter, a pattern such as "
                "'*.bias', a module class or its name, a list or set of those, or a function that takes a module (or a "
                "parameter's name and the parameter) and returns True for what stays whole.",
                setting="ignore",
            )

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """Returns the names of all settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MiCSConfig:
        """Builds a config from a mapping of setting names to values.

        Raises:
            MiCSConfigError: If a name is unknown (the nearest known one is suggested) or a value is wrong.
        """
        known = cls.setting_names()
        for name in values:
            if name not in known:
                hint = did_you_mean(str(name), known, f"Known settings: {', '.join(known)}.")
                raise MiCSConfigError(f"Unknown MiCS setting {name!r}. {hint}", setting=str(name))
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> MiCSConfig:
        """Reads a config from a YAML file of ``setting: value`` lines.

        Raises:
            MiCSConfigError: If the file cannot be read, is not a mapping, or a setting in it is wrong.
        """
        values = read_yaml(path, "'shard_size: 8'")
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise MiCSConfigError(f"{path} must hold lines like 'shard_size: 8', not a {type(values).__name__}.")
        return cls.from_dict(values)

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
        **explicit: Any,
    ) -> MiCSConfig:
        """Reads ``MICS_SHARD_SIZE``, ``MICS_HIERARCHICAL`` and so on; explicit arguments always win.

        Args:
            environ: The variables to read; ``os.environ`` by default.
            defaults: Settings that hold where neither a variable nor an argument says otherwise.
            **explicit: Settings that override the variables.

        Raises:
            MiCSConfigError: If a value is wrong, or a variable looks like one of these and is none.
        """
        environ = os.environ if environ is None else environ
        variables = {_ENV_PREFIX + name.upper(): name for name in cls.setting_names()}
        _check_variables(environ, variables)
        found = {
            name: parse_yaml(environ[key], f"{key}={environ[key]!r}", "'8', 'true' or '[Block, Linear]'")
            for key, name in variables.items()
            if key in environ
        }
        return cls.from_dict({**(defaults or {}), **found, **explicit})

    @classmethod
    def from_deepspeed(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> MiCSConfig:
        """Reads the settings from a DeepSpeed configuration.

        Settings that live in the training script here (batch sizes, precision, optimizer and so on) are left out;
        :func:`lightning_mics.deepspeed.convert_deepspeed` has them all, with a report on every field.

        Args:
            source: Path of the JSON file, or its content as a mapping.

        Raises:
            MiCSConfigError: If the file cannot be read, or a value in it is wrong.
        """
        config: MiCSConfig = open_door("MiCSConfig.from_deepspeed")(source).config
        return config

    def replace(self, **changes: Any) -> MiCSConfig:
        """Returns a copy with some settings changed, checked anew."""
        return dataclasses.replace(self, **changes)

    def with_trained(self, dtypes: Iterable[torch.dtype]) -> MiCSConfig:
        """Returns a copy that reduces gradients in float64, in the place of the default, if parameters are float64.

        Args:
            dtypes: Dtypes of the parameters that are trained.
        """
        computed = {as_dtype(self.param_dtype)} if self.param_dtype is not None else set(dtypes)
        is_rounded = torch.float64 in computed and self.reduce_dtype == torch.float32
        return self.replace(reduce_dtype=torch.float64) if is_rounded else self

    def with_precision(self, precision: str) -> MiCSConfig:
        """Returns a copy with the gather dtype that a precision asks for; an explicit ``param_dtype`` wins.

        With a mixed precision, parameters stay float32 in their shards and are gathered in 16 bits, half the bytes. The
        ``"-true"`` precisions change the module itself. Gradients are reduced in ``reduce_dtype`` either way, and with
        ``"64-true"`` in float64 in the place of the default.

        Args:
            precision: Lightning's name, for example ``"bf16-mixed"``.

        Raises:
            MiCSConfigError: If the precision is not supported.
        """
        found = supported_precision(precision)
        if as_dtype(found.reduce_dtype) == torch.float64:
            return self.with_trained([torch.float64])
        if not found.is_mixed or self.param_dtype is not None:
            return self
        # Autocast looks after inputs of the root; casting a whole batch would round its targets, too.
        inputs: Literal["units"] | bool = "units" if self.cast_forward_inputs else False
        return self.replace(param_dtype=found.param_dtype, cast_forward_inputs=inputs)


class Settings(TypedDict, total=False):
    """Fields of :class:`MiCSConfig` as arguments, for type checkers and editors; ``None`` stands for "not given"."""

    shard_size: ShardSize | None
    node_size: int | None
    hierarchical: bool | Literal["auto"] | None
    wrap: Wrap | None
    ignore: Ignore | None
    reshard_after_forward: bool | None
    param_dtype: torch.dtype | str | None
    reduce_dtype: torch.dtype | str | None
    output_dtype: torch.dtype | str | None
    cast_forward_inputs: bool | Literal["units"] | None
    activation_checkpointing: ActivationCheckpointing | None
    cpu_offload: bool | None
    verify: bool | None
    memory_limit: int | str | None
    verify_every: int | None
    on_mismatch: Literal["raise", "repair"] | None
    async_checkpoint: bool | None
    optimizer_shard_size: OptimizerShardSize | None
    replication_reduce_dtype: torch.dtype | str | None
    replication_gather_dtype: torch.dtype | str | None
    master_weights: Literal["partition", "owners"] | None
    activation_checkpointing_offload: bool | None
    uneven_inputs: Literal["error", "shortest", "longest"] | None


def takes_settings(init: _Init) -> _Init:
    """Makes every field of :class:`MiCSConfig` an argument of a constructor, by position or name.

    The constructor takes its own arguments by name, and the settings that are given as ``**settings``. Whoever looks at
    its signature at run time sees them all, with types and descriptions.

    Raises:
        TypeError: By the constructor, if an argument is unknown; suggests the nearest known one.
    """
    this, *own = inspect.signature(init, eval_str=True).parameters.values()
    own = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    types: dict[str, Any] = get_type_hints(MiCSConfig)
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    settings = {
        name: inspect.Parameter(name, by_position, default=None, annotation=types[name] | None)
        for name in MiCSConfig.setting_names()
    }
    later = [settings.pop(name) for name in _LATER]
    own = sorted(
        (parameter.replace(kind=by_position) for parameter in own), key=lambda own: own.name in _LATER_ARGUMENTS
    )
    num_early = sum(parameter.name not in _LATER_ARGUMENTS for parameter in own)
    arguments = [*settings.values(), *own[:num_early], *later, *own[num_early:]]
    signature = inspect.Signature([this, *arguments])

    @functools.wraps(init)
    def spelled_out(*args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in signature.parameters:
                hint = did_you_mean(name, signature.parameters)
                raise TypeError(f"{init.__qualname__}() got an unexpected keyword argument {name!r}. {hint}".rstrip())
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{init.__qualname__}(): {error}") from None
        init(**bound.arguments)

    spelled_out.__signature__ = signature  # type: ignore[attr-defined]
    spelled_out.__annotations__ = {parameter.name: parameter.annotation for parameter in arguments}
    spelled_out.__doc__ = MiCSConfig.__doc__
    return spelled_out  # type: ignore[return-value]


def _check_variables(environ: Mapping[str, str], known: Collection[str]) -> None:
    for name in environ:
        if name.upper().startswith(_ENV_PREFIX) and name not in known:
            near = nearest(name.upper(), known, 0.75)
            if near is not None:
                raise MiCSConfigError(f"The environment has {name}, which is no setting of MiCS. Did you mean {near}?")
            warnings.warn(f"{name} is no setting of MiCS. Known: {', '.join(known)}.", stacklevel=4)


def build_config(config: MiCSConfig | None, settings: Mapping[str, Any]) -> MiCSConfig:
    """Returns ``config`` with the settings that were given explicitly; settings left at ``None`` keep its values."""
    if config is not None and not isinstance(config, MiCSConfig):
        raise MiCSConfigError(
            f"config={config!r} is not a MiCSConfig. Try config=MiCSConfig(shard_size='node'), or "
            "config=MiCSConfig.from_deepspeed('ds_config.json') for a file of DeepSpeed.",
            setting="config",
        )
    given = {name: value for name, value in settings.items() if value is not None}
    return (config or MiCSConfig()).replace(**given)


def chooses_modules(how: ActivationCheckpointing) -> TypeGuard[Wrap]:
    """Returns whether ``activation_checkpointing`` names modules, rather than saying how many blocks recompute what."""
    return not isinstance(how, int) and how != "selective"


def check_switch(name: str, value: object, works: str = "True or False") -> None:
    """Checks that a setting is ``True`` or ``False``.

    Raises:
        MiCSConfigError: If it is neither; words such as ``"no"`` would count as true.
    """
    if not isinstance(value, bool):
        raise MiCSConfigError(f"{name}={value!r} is not a switch. Values that work: {works}.", setting=name)


def as_dtype(value: torch.dtype | str | int | None, name: str = "dtype") -> torch.dtype | None:
    """Returns the dtype that a setting means.

    Raises:
        MiCSConfigError: If it is none, or one that gradients cannot be gathered and summed in.
    """
    if value is None:
        return None
    dtype = value if isinstance(value, torch.dtype) else _DTYPES.get(str(value).removeprefix("torch."))
    if dtype not in _DTYPES.values():
        raise MiCSConfigError(
            f"{name}={value!r} is not a floating-point dtype that can be summed. Values that work: None, "
            f"{', '.join(map(repr, DTYPE_NAMES))}.",
            setting=name,
        )
    return dtype


def as_bytes(value: int | str, name: str = "memory_limit") -> int:
    """Returns the bytes that a setting means: a number, or text such as ``"36GiB"``, ``"1.5 GB"`` or ``"800MiB"``.

    Raises:
        MiCSConfigError: If it is neither, or nothing.
    """
    count: float | None = None
    if isinstance(value, str):
        count = parse_quantity(value, "B")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        count = value
    if count is None or not 1 <= count < 2**63:
        raise MiCSConfigError(
            f"{name}={value!r} is not an amount of memory. Values that work: a number of bytes, or text such as "
            "'36GiB'.",
            setting=name,
        )
    return int(count)
