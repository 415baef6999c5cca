"""A world of pretended ranks on a pretended device, for FSDP2 and for lightning_mics.

The one place that knows how the two choose between CPUs and accelerators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from stream_checker import StreamChecker
from stream_clocks import Settings
from stream_collectives import Collectives, Peers, own_objects, same_objects
from stream_device import StandInDevice
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mics.core import collectives as core_collectives
from lightning_mics.core._torch import forget_dtensor_meshes

_STREAMS = {
    "all_gather_copy_in_stream": "copy-in",
    "all_gather_stream": "gather",
    "reduce_scatter_stream": "reduce",
    "all_reduce_stream": "all-reduce",
}


@contextmanager
def pretended_device(
    world_size: int = 4,
    rank: int = 1,
    settings: Settings | None = None,
    peers: Peers | None = None,
    has_gloo: bool = False,
) -> Iterator[StreamChecker]:
    """Makes CPU tensors stand for those of an accelerator; models and groups are made inside.

    Only what runs inside ``with checker:`` is watched. Tensors are the device's where ``device="cuda"`` was asked for.

    Args:
        world_size: Ranks that the fake process group pretends to have.
        rank: The one that runs.
        settings: What is left out, and how the device behaves.
        peers: What other ranks add to messages of which the maximum is taken.
        has_gloo: Whether groups have a way for host memory, too, and not NCCL alone.

    Yields:
        The checker.
    """
    with _pretended(settings, peers, is_real=False, has_gloo=has_gloo) as checker:
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            yield checker
        finally:
            dist.destroy_process_group()
            forget_dtensor_meshes()


@contextmanager
def pretended_device_of_many(settings: Settings | None = None) -> Iterator[StreamChecker]:
    """Like :func:`pretended_device`, in a real process group: each of its ranks has a device, and values are right."""
    with _pretended(settings, None, is_real=True, has_gloo=False) as checker:
        yield checker


@contextmanager
def _pretended(
    settings: Settings | None, peers: Peers | None, *, is_real: bool, has_gloo: bool
) -> Iterator[StreamChecker]:
    checker = StreamChecker(settings, has_gloo=has_gloo)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # the tensors are small
        _replace_device(stack, checker)
        _replace_collectives(stack, Collectives(checker, peers, is_real=is_real), has_gloo=has_gloo)
        if not is_real:
            _patch(stack, dist, "all_gather_object", same_objects(dist.all_gather_object))
            _patch(stack, dist, "broadcast_object_list", own_objects(dist.broadcast_object_list))
        _replace_what_is_not_dispatched(stack, checker)
        checker.placement.pretend(stack)
        stack.enter_context(checker.mode)
        yield checker


def _patch(stack: ExitStack, owner: Any, name: str, value: object) -> None:
    stack.enter_context(mock.patch.object(owner, name, value))


def _replace_device(stack: ExitStack, checker: StreamChecker) -> None:
    device = StandInDevice(checker.timeline)
    for name in dir(StandInDevice):
        if not name.startswith("__"):
            _patch(stack, torch.cuda, name, getattr(device, name))
    for name in ("current_stream", "synchronize", "is_available"):
        _patch(stack, torch.accelerator, name, getattr(device, name))
    _patch(stack, torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    lazy_init = _fsdp_param_group.FSDPCommContext.lazy_init

    def named_streams(context: Any, device: torch.device) -> None:
        lazy_init(context, device)
        for attribute, name in _STREAMS.items():
            getattr(context, attribute).name = name

    _patch(stack, _fsdp_param_group.FSDPCommContext, "lazy_init", named_streams)


def _replace_collectives(stack: ExitStack, collectives: Collectives, *, has_gloo: bool) -> None:
    for name, method in collectives.methods().items():
        _patch(stack, dist.ProcessGroup, name, method)
    if not has_gloo:
        _patch(stack, dist.ProcessGroup, "_device_types", property(lambda group: [torch.device("cuda")]))
    _patch(
        stack, core_collectives, "batched", lambda group, device: dist._coalescing_manager(group=group, device=device)
    )


def _replace_what_is_not_dispatched(stack: ExitStack, checker: StreamChecker) -> None:
    resize, tolist = torch.UntypedStorage.resize_, torch.Tensor.tolist

    def watched_resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if size == 0 and checker.timeline.is_watched:
            checker.memory.resize(storage, 0)
        resize(storage, size)
        if size and checker.timeline.is_watched:
            checker.memory.resize(storage, size)
        return storage

    def watched_tolist(tensor: Tensor) -> Any:
        checker.read_by_host(tensor)
        return tolist(tensor)

    _patch(stack, torch.UntypedStorage, "resize_", watched_resize)
    _patch(stack, Tensor, "tolist", watched_tolist)
    _patch(stack, Tensor, "record_stream", lambda tensor, stream: checker.memory.record(tensor, stream))
