"""The dispatch mode that notes what each operator reads and writes, and on which stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from stream_clocks import Clock, HostWait, Place, Settings, Stream, Timeline, merge
from stream_memory import Memory, Race
from stream_placement import CPU, DEVICE, Kind, Placement, is_device, is_real
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
# Where values of the device decide on the host, and where host memory may go along with the device's.
_WAITS_ON_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_COPIES = frozenset(["_to_copy", "copy_", "_foreach_copy_"])


class StreamChecker:
    """Runs CPU operators as launches on the streams of a stand-in device.

    What runs inside ``with checker:`` is watched.

    Args:
        settings: What the run leaves out, and how the device behaves.
        has_gloo: Whether groups have a way for host memory, too, and not NCCL alone.
    """

    def __init__(self, settings: Settings | None = None, *, has_gloo: bool = False) -> None:
        self.has_gloo = has_gloo
        self.timeline = Timeline(settings or Settings())
        self.placement = Placement()
        self.memory = Memory(self.timeline, self.placement)
        self.mode = _Mode(self)
        self.num_operators = 0
        self._group_streams: dict[tuple[str, str], Stream] = {}
        self._functional: dict[int, Clock] = {}

    def __enter__(self) -> StreamChecker:
        self.timeline.is_watched = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.timeline.is_watched = False

    @property
    def races(self) -> list[Race]:
        """What was found so far."""
        return self.memory.races

    @property
    def host_waits(self) -> list[HostWait]:
        """The host's waits for the device so far."""
        return self.timeline.host_waits

    def group_stream(self, group_name: str, backend: str = "nccl") -> Stream:
        """Returns the stream, or gloo's thread, on which a process group runs its asynchronous collectives."""
        key = group_name, backend
        if key not in self._group_streams:
            description = dist.distributed_c10d._resolve_process_group(group_name).group_desc
            self._group_streams[key] = Stream(self.timeline, f"{backend} {description}")
        return self._group_streams[key]

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operator where its tensors are."""
        self.num_operators += self.timeline.is_watched
        launch = _Launch(self.placement, func, args, kwargs)
        result = launch.run(args, kwargs)
        if not self.timeline.is_watched:
            return result
        stream = self.timeline.current if launch.is_on_device else self.timeline.host_stream
        if not launch.looks_at_shapes:
            self._note(launch, stream)
        for tensor in launch.fresh:
            if tensor.untyped_storage().nbytes():
                owner = stream if self.placement.of(tensor) is Kind.DEVICE else self.timeline.host_stream
                self.memory.allocate(tensor.untyped_storage(), owner, launch.name, launch.place)
                if owner is not stream:  # a copy that comes from the device writes it
                    self.memory.write(tensor, stream, launch.name, launch.place)
        if launch.waits is not None:
            self.timeline.wait_on_host(launch.waits)
        return result

    def _note(self, launch: _Launch, stream: Stream) -> None:
        for tensor in launch.reads:
            on_host = launch.is_on_device and not launch.is_copy and self.placement.of(tensor) is not Kind.DEVICE
            reader = self.timeline.host_stream if on_host else stream  # a number that is sent along
            self.memory.read(tensor, reader, launch.name, launch.place)
        for tensor in launch.writes:
            self.memory.write(tensor, stream, launch.name, launch.place)

    def functional_collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """DTensor's own collectives, which clipping uses: asynchronous, waited for by ``wait_tensor``."""
        name, place, current = func._schema.name.split("::")[1], Place.here(), self.timeline.current
        if name == "wait_tensor":
            merge(current.clock, self._functional.pop(args[0].untyped_storage()._cdata, {}))
            return func(*args, **kwargs)
        group = next((argument for argument in reversed(args) if isinstance(argument, str)), None)
        result = func(*args, **kwargs)
        if group is None:  # only wraps
            return result
        for output in _tensors(result):
            self.placement.put(output, Kind.DEVICE)
        if not self.timeline.is_watched:
            return result
        stream = self.group_stream(group)
        for tensor in _tensors(args):
            self.memory.read(tensor, current, name, place)
        for output in _tensors(result):
            self.memory.allocate(output.untyped_storage(), current, name, place)
            merge(stream.clock, current.clock)
            self.memory.write(output, stream, name, place)
            self._functional[output.untyped_storage()._cdata] = dict(stream.clock)
        return result

    def is_of_host(self, tensors: list[Tensor]) -> bool:
        """Returns whether a collective's tensors are in host memory.

        Raises:
            RuntimeError: If NCCL is alone, which has no way for them.
        """
        on_host = {self.placement.of(tensor) is not Kind.DEVICE for tensor in tensors}
        if on_host == {True} and self.has_gloo:
            return True
        if on_host != {False}:
            raise RuntimeError("No backend type associated with device type cpu")
        return False

    def collective(
        self,
        group: dist.ProcessGroup,
        name: str,
        reads: list[Tensor],
        writes: list[Tensor],
        run: Callable[[], object],
        *,
        is_async: bool,
        is_of_host: bool,
    ) -> Stream | None:
        """Runs a collective; returns the group's stream if it runs there.

        Asynchronous ones do, and it waits for the current stream first; those of host memory come after what the host
        did.
        """
        place, current = Place.here(), self.timeline.host_stream if is_of_host else self.timeline.current
        on_group = is_async or not (is_of_host or self.timeline.settings.sync_on_current)
        stream = self.group_stream(group.group_name, "gloo" if is_of_host else "nccl") if on_group else current
        if on_group:
            current.follow_host()
            merge(stream.clock, current.clock)
        with unwatched():
            run()
        if not self.timeline.is_watched:
            return stream if on_group else None
        time = stream.tick()
        for tensor in reads:
            self.memory.read(tensor, stream, name, place, time)
        for tensor in writes:
            self.memory.write(tensor, stream, name, place, time)
        return stream if on_group else None

    def read_by_host(self, tensor: Tensor) -> None:
        """Notes that the host reads a tensor's values, and waits for them if they are the device's."""
        if not self.timeline.is_watched:
            return
        is_on_device = self.placement.of(tensor) is Kind.DEVICE
        stream = self.timeline.current if is_on_device else self.timeline.host_stream
        self.memory.read(tensor, stream, "tolist", Place.here())
        if is_on_device:
            self.timeline.wait_on_host("tolist")


class _Mode(TorchDispatchMode):
    """Shows operators to a checker."""

    def __init__(self, checker: StreamChecker) -> None:
        super().__init__()
        self._checker = checker

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
            return self._checker.functional_collective(func, args, kwargs)
        return self._checker.operator(func, args, kwargs)


class _Launch:
    """One call of an operator: what it reads and writes, and where it runs.

    Attributes:
        name: The operator's.
        place: Who called it.
        reads: Tensors that it reads.
        writes: Tensors that it writes.
        fresh: Tensors with new memory that it returns, once it ran.
        is_on_device: Whether it is launched on the device, or the host's own.
        looks_at_shapes: Whether it looks at no values.
        waits: Why the host waits for it, if it does.
    """

    def __init__(self, placement: Placement, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name, self.place = func._schema.name.split("::")[1], Place.here()
        self.reads, self.writes = _arguments(func, self.name, args, kwargs)
        self.fresh: list[Tensor] = []
        self.waits: str | None = None
        self.looks_at_shapes = self.name in _READ_NOTHING
        self._func, self._placement = func, placement
        self._kinds = {placement.of(tensor) for tensor in (*self.reads, *self.writes) if is_real(tensor)}
        is_cast = self.name == "_to_copy" and not placement.is_moving
        self._asked = None if is_cast and not is_device(kwargs.get("device")) else kwargs.get("device")
        self.is_on_device = Kind.DEVICE in self._kinds or is_device(self._asked)

    @property
    def is_copy(self) -> bool:
        """Whether it may move between host and device."""
        return self.name in _COPIES

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs it; returns its result."""
        self._refuse_mixing()
        known = {tensor.untyped_storage()._cdata for tensor in self.reads + self.writes}
        result = self._call(args, kwargs)
        outputs = _tensors(result)
        self.fresh = [
            tensor for tensor in outputs if _is_plain(tensor) and tensor.untyped_storage()._cdata not in known
        ]
        kind = self._kind_of_outputs(kwargs)
        for tensor in self.fresh:
            self._placement.put(tensor, kind)
        is_view = bool(outputs) and not self.writes and not self.fresh
        self.looks_at_shapes = self.looks_at_shapes or is_view
        self.waits = self._reason_to_wait(kind, args, kwargs)
        return result

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.name == "_pin_memory":
            return args[0].clone()
        changed = {}
        if is_device(self._asked):
            changed["device"] = CPU
        if kwargs.get("pin_memory"):
            changed["pin_memory"] = False
        return self._func(*args, **{**kwargs, **changed})

    def _kind_of_outputs(self, kwargs: dict[str, Any]) -> Kind:
        if self.name == "_pin_memory" or kwargs.get("pin_memory"):
            return Kind.PINNED
        if self._asked is None:
            return Kind.DEVICE if self.is_on_device else Kind.HOST
        if is_device(self._asked):
            return Kind.DEVICE
        return Kind.PINNED if self.is_on_device and kwargs.get("non_blocking") else Kind.HOST

    def _reason_to_wait(self, output: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if not self.is_on_device:
            return None
        if self.name == "_local_scalar_dense":
            return "item"
        if any(tag in self._func.tags for tag in _WAITS_ON_HOST):
            return self.name
        if not self.is_copy:
            return None
        kinds = self._kinds | ({output} if self.fresh else set())
        if kinds == {Kind.DEVICE}:
            return None
        if Kind.HOST in kinds:
            return "copy of pageable memory"
        return None if kwargs.get("non_blocking") or args[2:] == (True,) else "blocking copy"

    def _refuse_mixing(self) -> None:
        """Refuses what devices refuse: operators on tensors of both, but for numbers and indices."""
        if not self.is_on_device or self.is_copy or self.name.startswith("index") or self._asked is not None:
            return
        for tensor in (*self.reads, *self.writes):
            if is_real(tensor) and tensor.dim() and self._placement.of(tensor) is not Kind.DEVICE:
                raise RuntimeError(
                    f"{self.name}: expected all tensors to be on the same device, but found {DEVICE}, cpu"
                )


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Runs operators that the device would not launch."""
    with torch.no_grad(), _disable_current_modes():
        yield


def _tensors(values: Any) -> list[Tensor]:
    values = values if isinstance(values, list | tuple) else [values]
    return [value for value in values if isinstance(value, Tensor)]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and is_real(tensor)


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
