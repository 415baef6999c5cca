"""The dispatch mode that notes what each operator reads and writes, and on which stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from stream_clocks import Clock, Place, Settings, Stream, Timeline, merge
from stream_memory import Memory, Race
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Operators that look only at shapes.
# fmt: off
_READ_NOTHING = frozenset([
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros_like", "ones_like",
    "full_like", "new_zeros", "new_ones", "new_full", "zeros", "ones", "full", "is_same_size", "rand_like",
    "randn_like", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "size", "stride", "detach", "alias",
    "lift_fresh", "set_", "_unsafe_view", "_reshape_alias", "record_stream",
])
# fmt: on
# Operators that write an argument which their schema does not say they do.
_HIDDEN_WRITES = {"all_gather_copy_in": "all_gather_output"}
_WAITS_ON_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class StreamChecker(TorchDispatchMode):
    """Runs CPU operators as launches on the streams of a stand-in device.

    Args:
        settings: What the run leaves out, and how the device behaves.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.timeline = Timeline(settings or Settings())
        self.memory = Memory(self.timeline)
        self.num_operators = 0
        self._group_streams: dict[str, Stream] = {}
        self._functional: dict[int, Clock] = {}

    @property
    def races(self) -> list[Race]:
        """What was found so far."""
        return self.memory.races

    def group_stream(self, group_name: str) -> Stream:
        """Returns the stream on which a process group runs its asynchronous collectives."""
        if group_name not in self._group_streams:
            description = dist.distributed_c10d._resolve_process_group(group_name).group_desc
            self._group_streams[group_name] = Stream(self.timeline, f"nccl {description}")
        return self._group_streams[group_name]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, FakeTensor) for kind in types):  # a DTensor that asks for shapes
            return func(*args, **kwargs)
        if any(kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for kind in types):
            return NotImplemented  # a DTensor, which calls with its local tensors
        if func.namespace in ("profiler", "prim"):
            return func(*args, **kwargs)
        if func.namespace == "_c10d_functional":
            return self._functional_collective(func, args, kwargs)
        return self._operator(func, args, kwargs)

    def _operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.num_operators += 1
        name, place = func._schema.name.split("::")[1], Place.here()
        reads, writes = _arguments(func, name, args, kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in reads + writes}
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        fresh = [tensor for tensor in outputs if _is_plain(tensor) and tensor.untyped_storage()._cdata not in known]
        is_view = bool(outputs) and not writes and not fresh
        if name not in _READ_NOTHING and not is_view:
            for tensor in reads:
                self.memory.read(tensor, self.timeline.current, name, place)
            for tensor in writes:
                self.memory.write(tensor, self.timeline.current, name, place)
        for tensor in fresh:
            if tensor.untyped_storage().nbytes():
                self.memory.allocate(tensor.untyped_storage(), name, place)
        if name == "_local_scalar_dense" or any(tag in func.tags for tag in _WAITS_ON_HOST):
            self.timeline.wait_on_host()
        return result

    def _functional_collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """DTensor's own collectives, which clipping uses: asynchronous, waited for by ``wait_tensor``."""
        name, place, current = func._schema.name.split("::")[1], Place.here(), self.timeline.current
        if name == "wait_tensor":
            merge(current.clock, self._functional.pop(args[0].untyped_storage()._cdata, {}))
            return func(*args, **kwargs)
        group = next((argument for argument in reversed(args) if isinstance(argument, str)), None)
        result = func(*args, **kwargs)
        if group is None:  # only wraps
            return result
        stream = self.group_stream(group)
        for tensor in _tensors(args):
            self.memory.read(tensor, current, name, place)
        for output in _tensors(result):
            self.memory.allocate(output.untyped_storage(), name, place)
            merge(stream.clock, current.clock)
            self.memory.write(output, stream, name, place)
            self._functional[output.untyped_storage()._cdata] = dict(stream.clock)
        return result

    def collective(
        self,
        group: dist.ProcessGroup,
        name: str,
        reads: list[Tensor],
        writes: list[Tensor],
        run: Callable[[], object],
        *,
        is_async: bool,
    ) -> Stream | None:
        """Runs a collective; returns the group's stream if it runs there.

        Asynchronous ones do, and it waits for the current stream first.
        """
        place, current = Place.here(), self.timeline.current
        on_group = is_async or not self.timeline.settings.sync_on_current
        stream = self.group_stream(group.group_name) if on_group else current
        if on_group:
            current.follow_host()
            merge(stream.clock, current.clock)
        with unwatched():
            run()
        time = stream.tick()
        for tensor in reads:
            self.memory.read(tensor, stream, name, place, time)
        for tensor in writes:
            self.memory.write(tensor, stream, name, place, time)
        return stream if on_group else None

    def read_by_host(self, tensor: Tensor) -> None:
        """Notes that the host reads a tensor's values, and waits for them."""
        self.memory.read(tensor, self.timeline.current, "tolist", Place.here())
        self.timeline.wait_on_host()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Runs operators that the device would not launch."""
    with torch.no_grad(), _disable_current_modes():
        yield


def _tensors(values: Any) -> list[Tensor]:
    values = values if isinstance(values, list | tuple) else [values]
    return [value for value in values if isinstance(value, Tensor)]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def _arguments(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the tensors that an operator reads, and those that it writes."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        tensors = _tensors(args[index] if index < len(args) else kwargs.get(argument.name))
        alias = argument.alias_info
        is_written = (alias is not None and alias.is_write) or _HIDDEN_WRITES.get(name) == argument.name
        (writes if is_written else reads).extend(tensors)
    return reads, writes
