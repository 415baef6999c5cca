"""A unit's parameters as modules hold them: shards, or what a pass gathered; and what is done to either."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from lightning_mics.core._needs import gone, require
from lightning_mics.core._torch.aliases import DataAliases
from lightning_mics.core._torch.dtensors import follow_data
from lightning_mics.core._torch.units import UnitParamGroup
from lightning_mics.errors import MiCSError

try:
    from torch.autograd import _unsafe_preserve_version_counter
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
    from torch.distributed.tensor import DTensor
except ImportError as error:
    raise gone(error) from error

require(_fsdp_param_group.FSDPParamGroup, "unshard", "_to_sharded", "_to_unsharded", "is_unsharded", "is_sharded")
require(
    _fsdp_param.FSDPParam,
    *("_setattr_on_modules", "reset_sharded_param", "fsdp_placement", "all_gather_outputs", "_sharded_param_data"),
)

# What runs for every gather of every unit has no loop of Python in it.
_shard_wants = operator.attrgetter("sharded_param.requires_grad")

_gathered_wants = operator.attrgetter("_unsharded_param.requires_grad")

_gathered_version = operator.attrgetter("_unsharded_param._version")

_shard_versions = operator.attrgetter("sharded_param._version", "sharded_param._local_tensor._version")

_local = operator.attrgetter("sharded_param._local_tensor")

_sharded = operator.attrgetter("sharded_param")

_gathered = operator.attrgetter("_unsharded_param")

_output = operator.attrgetter("all_gather_outputs")

_first = operator.itemgetter(0)

_address = operator.methodcaller("data_ptr")


class GatheredParams:
    """What a unit gathered, kept in step with its shards.

    FSDP2 registers gathered parameters on modules from a gather until they are freed, and copies neither what is
    written to them nor what is set on them back to the shards. Here:

    - Between passes the shards are registered, also while FSDP2 keeps the gathered parameters.
    - ``requires_grad`` set on either is set on both.
    - What is written to a gathered parameter, also by way of ``.data``, is written to the shard before anybody can see
      that one.
    - A gather that brings other values than the one before counts as a change of the gathered parameter, so that
      autograd refuses to use what an older graph has saved of it, as on one process.

    Args:
        unit: The unit.
        begin_use: Called when the unit's parameters are about to be used.
        on_write: Told the gathered parameters that were written, by index in the unit.
        skips: Indices of parameters whose writes are somebody else's to keep.
    """

    def __init__(
        self,
        unit: UnitParamGroup,
        begin_use: Callable[[], None],
        on_write: Callable[[GatheredParams, list[int]], None],
        skips: frozenset[int] = frozenset(),
    ) -> None:
        self.unit = unit
        self._group: Any = unit._group
        self._params: list[Any] = self._group.fsdp_params
        self._begin_use, self._on_write, self._skips = begin_use, on_write, skips
        self._shows_shards = False
        self._values: tuple[Any, ...] | None = None  # of the shards, when they were gathered last
        self._versions: tuple[int, ...] | None = None
        self._wanted = unit.wanted()
        self._tracks_memory = False
        self._aliases = DataAliases()
        places = [(param, *place) for param in self._params for place in _places(param)]
        self._registries, self._place_names = [held for _, held, _ in places], [name for *_, name in places]
        self._owners = [param for param, *_ in places]
        for param in self._params:
            follow_data(param.sharded_param, functools.partial(_take_data, weakref.ref(param)))
        group = self._group
        self._unshard, self._free, self._gathered = group.unshard, group._to_sharded, group._to_unsharded
        group.unshard, group._to_sharded, group._to_unsharded = self._on_gather, self._on_free, self._on_gathered

    @property
    def is_gathered(self) -> bool:
        """Whether FSDP2 holds gathered parameters, registered on modules or not."""
        return bool(self._group.is_unsharded)

    @property
    def gathered(self) -> list[nn.Parameter]:
        """The gathered parameters, which are the same objects in every pass; none before the first."""
        return [] if self._versions is None else list(map(_gathered, self._params))

    def name(self, index: int) -> str:
        """Returns a parameter's name in the root module."""
        return self.unit.params[index].name

    # Between passes.

    def show_shards(self) -> None:
        """Registers the shards on the modules, and keeps what is gathered."""
        if self._shows_shards or not self._group.is_unsharded:
            return
        self._settle()
        for param in self._params:
            param._setattr_on_modules(param.sharded_param)
        self._shows_shards = True

    def show_gathered(self) -> None:
        """Registers what is gathered again, or frees it if shards were written meanwhile."""
        if self._versions is None and not self._group.is_unsharded:
            self._check_places()  # FSDP2 looks at them when the first pass begins
        if not self._shows_shards:
            return
        self._check_places()
        if self._values != self._shard_values():
            self._group._to_sharded()
            return
        self._settle()
        self._shows_shards = False
        for param in self._params:
            param._setattr_on_modules(param._unsharded_param)

    # Inside of passes.

    def _on_gather(self, async_op: bool = False) -> None:
        self._begin_use()
        group = self._group
        if group.is_unsharded:
            self._share_requires_grad()
        elif group._all_gather_result is None:
            self._note_values()
        self._unshard(async_op)

    def _on_gathered(self) -> None:
        if self._group.is_unsharded:
            return
        self._check_places()
        is_first = self._versions is None
        if not is_first:
            self._share_requires_grad()
        self._gathered()
        if is_first:
            self._versions, self._wanted = self._gathered_versions(), self.unit.wanted()
            self._tracks_memory = not self._moved()  # extensions of FSDP2 make tensors of their own
            self._aliases.watch(self.gathered)

    def _on_free(self) -> None:
        if self._group.is_unsharded:
            self._settle()
            self._shows_shards = False
        try:
            self._free()
        except RuntimeError as error:
            if "not resizable" not in str(error):
                raise
            raise MiCSError(
                f"A parameter among {self.name(0)!r} to {self.name(-1)!r} was given to NumPy inside a forward pass, "
                "and its memory cannot be freed any more. Copy it first: param.detach().clone().numpy()."
            ) from error

    def _settle(self) -> None:
        """Brings what was done to gathered parameters to the shards."""
        self._share_requires_grad()
        versions, through_data = self._gathered_versions(), self._aliases.written()
        if through_data or versions != self._versions or (self._tracks_memory and self._moved()):
            self._take_writes(versions, through_data)

    def _gathered_versions(self) -> tuple[int, ...]:
        return tuple(map(_gathered_version, self._params))

    def _shard_values(self) -> tuple[Any, ...]:
        """Returns what changes when anybody writes a shard: its place and versions."""
        params = self._params
        return (*map(_shard_versions, params), *map(_address, map(_local, params)))

    def _note_values(self) -> None:
        """Notes what is about to be gathered; what differs from the last time changes the gathered parameters."""
        values, before = self._shard_values(), self._values
        if values == before:
            return
        self._values = values
        if before is None or self._versions is None:
            return
        increment_version([self._params[index]._unsharded_param for index in self._changed(values, before)])
        self._versions = self._gathered_versions()

    def _changed(self, values: tuple[Any, ...], before: tuple[Any, ...] | None) -> list[int]:
        """Returns the indices of shards that were written between two moments."""
        count = len(self._params)
        if before is None:
            return []
        return [
            index
            for index in range(count)
            if values[index] != before[index] or values[count + index] != before[count + index]
        ]

    # Requires_grad.

    def share_requires_grad(self) -> None:
        """Makes shards and gathered parameters require gradients alike, by what was set last."""
        if self._versions is not None:
            self._share_requires_grad()

    def _share_requires_grad(self) -> None:
        params = self._params
        shards, gathered = tuple(map(_shard_wants, params)), tuple(map(_gathered_wants, params))
        if shards != gathered:
            for param, was, shard, whole in zip(params, self._wanted, shards, gathered, strict=True):
                if shard != whole:
                    wants = whole if shard == was else shard
                    param.sharded_param.requires_grad_(wants)
                    param._unsharded_param.requires_grad_(wants)
            shards = tuple(map(_shard_wants, params))
        self._wanted = shards

    # Writes.

    def _moved(self) -> bool:
        """Whether a gathered parameter was given other memory (``p.data = ...``)."""
        params = self._params
        outputs = map(_first, map(_output, params))
        return any(map(operator.ne, map(_address, map(_gathered, params)), map(_address, outputs)))

    def _take_writes(self, versions: tuple[int, ...], through_data: set[int]) -> None:
        before, self._versions = self._versions, versions
        assert before is not None
        written = [
            index
            for index, param in enumerate(self._params)
            if index not in self._skips
            and (
                index in through_data or versions[index] != before[index] or (self._tracks_memory and _has_moved(param))
            )
        ]
        if not written:
            return
        changed = self._changed(self._shard_values(), self._values)
        for index in written:
            self._refuse_lost_write(index, also_sharded=index in changed)
        with torch.no_grad():
            for index in written:
                _write_back(self._params[index])
        self._gathers_wait()
        self._values, self._versions = self._shard_values(), self._gathered_versions()
        self._on_write(self, written)

    def _refuse_lost_write(self, index: int, *, also_sharded: bool) -> None:
        param = self._params[index]
        shard, whole = param.sharded_param.dtype, param._unsharded_param.dtype
        if also_sharded:
            raise MiCSError(
                f"Both the gathered parameter {self.name(index)!r} and its shard were written in one forward pass. "
                "Write to model.parameters() outside of forward passes only, or inside of them only."
            )
        if shard != whole:
            raise MiCSError(
                f"The parameter {self.name(index)!r} was written inside a forward pass, where it is gathered in "
                f"{_short(whole)}, and its shard keeps {_short(shard)}. Write to model.parameters() after the forward "
                f"pass, or gather in {_short(shard)} (param_dtype=None)."
            )

    def _gathers_wait(self) -> None:
        """Makes the streams of gathers wait for what was written to shards on the current one."""
        event = self._group.device_handle.Event()
        event.record()
        self._group._wait_all_gather_streams_on_event(event)

    def _check_places(self) -> None:
        """Checks that modules hold the shards, and nothing that a gather would put out of sight."""
        held = map(dict.get, self._registries, self._place_names)
        if all(map(operator.is_, held, map(_sharded, self._owners))):
            return
        for param, registry, name in zip(self._owners, self._registries, self._place_names, strict=True):
            held_now = registry.get(name)
            if self._versions is None and isinstance(held_now, DTensor):
                continue  # FSDP2 takes it over
            if held_now is not param.sharded_param:
                full_name = param._param_fqn or name
                raise MiCSError(
                    f"The module that had the parameter {full_name!r} when it was sharded has "
                    f"{'another one' if name in registry else 'none'} of that name now. Replace parameters, and apply "
                    "parametrizations such as weight_norm, before mics_shard; to change values, copy them into it: "
                    "parameter.copy_(values) under torch.no_grad(). torch.func.functional_call replaces parameters, "
                    "and works with models that are not sharded."
                )


def _places(param: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields where modules hold a parameter, tied ones too."""
    info = param._module_info
    modules, names = (info.module, *info.shared_modules), (info.param_name, *info.shared_param_names)
    for module, name in zip(modules, names, strict=True):
        yield module._parameters, name


def _take_data(reference: weakref.ref[Any]) -> None:
    """Makes FSDP2 gather from the memory that a shard was given."""
    param = reference()
    if param is None:
        return
    shown = next(registry.get(name) for registry, name in _places(param))
    param._setattr_on_modules(param.sharded_param)  # where FSDP2 looks for it
    try:
        with torch.no_grad():
            param.reset_sharded_param()
    finally:
        if shown is not None and shown is not param.sharded_param:
            param._setattr_on_modules(shown)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _has_moved(param: Any) -> bool:
    return bool(param._unsharded_param.data_ptr() != param.all_gather_outputs[0].data_ptr())


def _write_back(param: Any) -> None:
    """Writes this rank's part of a gathered parameter to the shard."""
    whole = param._unsharded_param
    if _has_moved(param):
        own = param.all_gather_outputs[0].as_strided(param._orig_size, param._contiguous_orig_stride)
        with _unsafe_preserve_version_counter(param.all_gather_outputs[0]):  # as on one process
            own.copy_(whole.detach())
        whole.data = own
    local, dim = param.sharded_param._local_tensor, param.fsdp_placement.dim
    if local.numel():
        start = param.padded_sharded_param_size[dim] * param.mesh_info.shard_mesh_rank
        local.copy_(whole.detach().narrow(dim, start, local.size(dim)))
