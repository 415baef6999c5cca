"""Loops without backward passes whose ranks run different numbers of forward passes.

Before each gather of such a loop the ranks of a partition tell each other, in one number, which unit it is of. A rank
whose loop has ended hears of it and joins the gather, without a pass of its own: no code of the user's runs, and
nothing is counted twice. The others never wait for an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.core._torch import carries_cpu_tensors, current_backward_id
from lightning_mics.core.joined import agreed_lengths
from lightning_mics.core.mesh import communication_device
from lightning_mics.core.runtime import runtimes_in
from lightning_mics.errors import MiCSError

# What a rank says; the greatest counts. Greater ones are units.
_LOOP_ENDED, _PART_ENDED, _SEQUENCES_ENDED, _SEQUENCES_GO_ON, _UNITS = range(5)


@contextmanager
def unequal_passes(model: nn.Module) -> Iterator[None]:
    """Lets ranks run different numbers of forward passes inside this context, also none; without backward passes.

    A rank that leaves it goes on gathering with the others of its partition, until the last one leaves. Lightning's
    Trainer does this by itself where loaders have different lengths. Collective over the world.

    Args:
        model: A model sharded by :func:`~lightning_mics.mics_shard`, or a module that contains some: of several models
            an ``nn.ModuleList``.

    Raises:
        MiCSError: If the model is not sharded by MiCS, or a backward pass begins inside the context.

    Example::

        with torch.no_grad(), unequal_passes(model):
            outputs = [model(batch) for batch in batches_of_this_rank]
    """
    passes = UnequalPasses(model)
    try:
        yield
        passes.end_loop()
    finally:
        passes.close()


class UnequalPasses:
    """A loop whose ranks run different numbers of passes, from its construction to :meth:`close`.

    Args:
        model: A sharded model, or a module with sharded models in it.

    Raises:
        MiCSError: If nothing in it is sharded, or models in it by different partitions.
    """

    def __init__(self, model: nn.Module) -> None:
        self._runtimes = list({id(runtime): runtime for runtime in runtimes_in(model)}.values())
        meshes = {id(runtime.mesh): runtime.mesh for runtime in self._runtimes}
        if len(meshes) > 1:
            sizes = ", ".join(str(mesh.layout.shard_size) for mesh in meshes.values())
            raise MiCSError(
                f"{type(model).__name__} has models of different partitions (shard_size={sizes}), whose ranks cannot "
                "run different numbers of passes. Give all of them one shard_size."
            )
        (mesh,) = meshes.values()
        self._group = mesh.partition_group
        is_on_host = carries_cpu_tensors(self._group)
        self._device = torch.device("cpu") if is_on_host else communication_device(mesh.device_mesh.device_type)
        self._units = [group for runtime in self._runtimes for group in runtime.gathers.groups]
        for runtime in self._runtimes:
            runtime.window.order.is_compared = False
        self._listen()

    def end_part(self) -> None:
        """Waits until all ranks have ended a part of the loop, after which they communicate in ways of their own."""
        self._serve(_PART_ENDED)

    def end_loop(self) -> None:
        """Waits until all ranks have ended the loop."""
        self._serve(_LOOP_ENDED)

    def close(self) -> None:
        """Ends it all, also after an error; what passes left gathered is freed, as it is on ranks that ran none."""
        for runtime in self._runtimes:
            runtime.gathers.reset()
            runtime.window.order.is_compared = True
            runtime.window.reshard()

    def _listen(self) -> None:
        first = _UNITS
        for runtime in self._runtimes:
            runtime.gathers.listener = functools.partial(self._tell_of, first)
            runtime.gathers.any_unfinished = self._any_unfinished
            first += len(runtime.gathers.groups)

    def _tell_of(self, first: int, index: int) -> None:
        if current_backward_id() != -1:
            raise MiCSError(
                "A backward pass runs where ranks may run different numbers of forward passes, but ranks reduce "
                "gradients together. Train outside of unequal_passes, with as many batches on every rank."
            )
        self._say(first + index, async_op=True)

    def _say(self, number: int, *, async_op: bool = False) -> Tensor:
        """Tells the others a number; returns what holds the greatest one, at once or when they have said theirs."""
        message = torch.tensor([number], device=self._device)
        if self._group.size() > 1:
            dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._group, async_op=async_op)
        return message

    def _any_unfinished(self, goes_on: bool) -> bool:
        return int(self._say(_SEQUENCES_GO_ON if goes_on else _SEQUENCES_ENDED)) == _SEQUENCES_GO_ON

    def _serve(self, mine: int) -> None:
        for runtime in self._runtimes:
            runtime.passes.expect_gathers()
            runtime.gathers.listener = None  # the others know already
        while (number := int(self._say(mine))) > mine:
            if number >= _UNITS:
                self._units[number - _UNITS].join_gather()
        self._listen()


def lengths_differ(model: nn.Module, lengths: Sequence[int | None]) -> bool:
    """Returns whether ranks run, or may run, different numbers of passes. Collective over the world.

    Args:
        model: A sharded model, or a module with sharded models in it.
        lengths: Numbers of batches of this rank's loaders, as many on all ranks; ``None`` where it is not known.
    """
    mesh = runtimes_in(model)[0].mesh
    if mesh.layout.shard_size == 1:
        return False
    agreed = agreed_lengths(lengths)
    return agreed is None or any(lowest != highest for lowest, highest in agreed)
