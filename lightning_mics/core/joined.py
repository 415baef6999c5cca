"""Training on data of which ranks have different numbers of batches.

Before each microstep hosts tell each other whether there is another batch behind it, so that all of them end together:
with the first rank that runs out, or with the last. A rank that ran out meanwhile computes with a batch again that
counts nothing; what counts is the mean over the ranks that have data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset

from lightning_mics.core._torch import carries_cpu_tensors
from lightning_mics.core.failures import explaining
from lightning_mics.core.gradients.agreement import channel_for
from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.core.mesh import MiCSMesh, communication_device
from lightning_mics.core.places import Call, of_world, waiting
from lightning_mics.core.runtime import runtimes_in
from lightning_mics.errors import MiCSError

UnevenInputs = Literal["error", "shortest", "longest"]
_END = object()


@dataclass(frozen=True)
class Microstep:
    """A batch, and what all ranks know of it.

    Attributes:
        batch: This rank's.
        weight: What its gradients count in a mean over all ranks: the number of ranks over that of those with data, or
            zero where it only stands in for one.
        is_last: Whether no rank goes on behind it.
    """

    batch: Any
    weight: float
    is_last: bool


class Attendance:
    """Asks all ranks whether they have another batch, in one small message between hosts.

    Args:
        mesh: The groups.
    """

    def __init__(self, mesh: MiCSMesh) -> None:
        self._channel, self.world_size = channel_for(mesh), mesh.layout.topology.world_size
        groups = [mesh.partition_group, mesh.replication_group, mesh.host_group]
        self._call = Call("batch", "the next batch (uneven_inputs)", range(self.world_size), groups, of_world().models)

    def ask(self, has_batch: bool) -> list[int]:
        """Returns the ranks that have one. Collective over the world."""
        message = bytearray(self.world_size)
        message[dist.get_rank()] = has_batch
        with explaining(), waiting(self._call):
            answer = self._channel.maximum(message)
        return [rank for rank, is_there in enumerate(answer) if is_there]

    def spread(self, batch: Any, source: int) -> Any:
        """Returns a rank's batch on all of them. Collective over the world."""
        box = [batch]
        with explaining(), waiting(self._call):
            dist.broadcast_object_list(box, src=source)
        return box[0]


_ATTENDANCES: WeakKeyDictionary[AccumulationWindow, Attendance] = WeakKeyDictionary()


def attendance_of(model: nn.Module) -> Attendance:
    """Returns what asks the ranks of a sharded model."""
    runtime = runtimes_in(model)[0]
    if runtime.window not in _ATTENDANCES:
        _ATTENDANCES[runtime.window] = Attendance(runtime.mesh)
    return _ATTENDANCES[runtime.window]


def windows_of(model: nn.Module) -> list[AccumulationWindow]:
    """Returns the windows of a sharded model, or of all in a module."""
    return [runtime.window for runtime in runtimes_in(model)]


def has_data(model: nn.Module) -> bool:
    """Returns whether this rank's batch counts, or only stands in where the rank has run out of data.

    For what a rank sums up by itself, such as losses; gradients are weighted already.

    Args:
        model: A model sharded by :func:`~lightning_mics.mics_shard`, or a module that contains some.

    Raises:
        MiCSError: If the model is not sharded by MiCS.
    """
    return runtimes_in(model)[0].window.weight > 0


def joined_steps(
    batches: Iterator[Any],
    uneven_inputs: UnevenInputs,
    attendance: Attendance,
    before_fetch: Callable[[], None] = lambda: None,
) -> Iterator[Microstep]:
    """Yields this rank's microsteps, as many as on all others. Collective over the world.

    Each batch is fetched while the one before it waits to be computed with, and announced: one message a microstep.

    Args:
        batches: This rank's.
        uneven_inputs: When to end.
        attendance: What asks the others.
        before_fetch: Called before a batch is fetched, when all that were fetched are about to be handed out.

    Raises:
        MiCSError: On every rank, with ``"error"``, when the first of them runs out before others.
    """
    size, index = attendance.world_size, 0

    def goes_on(present: Sequence[int]) -> bool:
        if uneven_inputs == "error" and 0 < len(present) < size:
            out = [rank for rank in range(size) if rank not in present]
            raise MiCSError(
                f"{len(out)} of {size} ranks (the first is rank {out[0]}) ran out of batches after {index}, and others "
                "have more. Give all ranks the same number, or say with uneven_inputs='shortest' or 'longest' when "
                "all of them end."
            )
        return len(present) == size if uneven_inputs == "shortest" else bool(present)

    before_fetch()
    ahead = next(batches, _END)
    present = attendance.ask(ahead is not _END)
    is_going_on, spare = goes_on(present), _END
    if is_going_on and len(present) < size:  # who has no batch at all needs one to stand in
        spare = attendance.spread(ahead if dist.get_rank() == present[0] else None, present[0])
    while is_going_on:
        index += 1
        batch, weight = (copy.deepcopy(spare), 0.0) if ahead is _END else (ahead, size / len(present))
        if ahead is not _END:
            before_fetch()
            ahead = next(batches, _END)
            spare = copy.deepcopy(batch) if ahead is _END else _END  # whoever computes with it may change it
        present = attendance.ask(ahead is not _END)
        is_going_on = goes_on(present)
        yield Microstep(batch, weight, not is_going_on)


def steps_alone(batches: Iterator[Any], before_fetch: Callable[[], None]) -> Iterator[Microstep]:
    """Yields the batches of a rank that need ask no other."""
    before_fetch()
    ahead = next(batches, _END)
    while ahead is not _END:
        batch = ahead
        before_fetch()
        ahead = next(batches, _END)
        yield Microstep(batch, 1.0, ahead is _END)


def agreed_lengths(lengths: Sequence[int | None]) -> list[tuple[int, int]] | None:
    """Returns the lowest and highest of each number of batches over all ranks. Collective over the world.

    Args:
        lengths: Numbers of batches of this rank's loaders, as many on all ranks; ``None`` where it is not known.

    Returns:
        ``None`` where one is not known on some rank.
    """
    known = [-1 if length is None else length for length in lengths]
    ends = torch.tensor([*known, *(-length for length in known), int(None in lengths)])
    if not carries_cpu_tensors(dist.group.WORLD):  # type: ignore[arg-type]
        ends = ends.to(communication_device(torch.accelerator.current_accelerator().type))  # type: ignore[union-attr]
    with explaining():
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    *found, is_unknown = ends.tolist()
    lowest = [-length for length in found[len(known) :]]
    return None if is_unknown else list(zip(lowest, found, strict=False))


def counted_length(loader: Any) -> int | None:
    """Returns a loader's number of batches; ``None`` where it may end before its length, if it has one."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def at_end(state: Any) -> Any:
    """Returns the state of a loader whose epoch has ended, maybe with batches left, so that a new one follows."""
    return {**state, _FINISHED: True} if isinstance(state, dict) and _FINISHED in state else state


_FINISHED = "_iterator_finished"  # in the states of torchdata's loaders, which Accelerate sets as well


class JoinedLoader:
    """A loader that ends on all ranks together, as the model's ``uneven_inputs`` says, and resumes at the sample.

    With ``"shortest"`` all ranks end with the first that runs out of batches. With ``"longest"`` they end with the
    last; those that ran out compute with their last batch again (or with another rank's, where they never had one),
    and it counts nothing: gradients are the mean over the ranks that have data. With ``"error"`` an error on all ranks
    names who ran out. Where all lengths are known and equal nothing is asked; otherwise hosts exchange one small
    message before each microstep.

    Where the loader has ``state_dict`` and ``load_state_dict``, as torchdata's ``StatefulDataLoader``, so does this
    one: the place behind the batch that was handed out last. Making one, and each loop, is collective over the world.

    Args:
        loader: This rank's loader, or any iterable of batches.
        model: A model sharded by :func:`~lightning_mics.mics_shard`, or a module that contains some.

    Attributes:
        loader: See above.
        is_last: Whether the batch that was handed out last is the last of all ranks.

    Raises:
        MiCSError: If the model is not sharded by MiCS.

    Example::

        batches = JoinedLoader(loader, model)
        for index, batch in enumerate(batches):
            with defer_replication_sync(model, enabled=index % 4 != 3 and not batches.is_last):
                (model(batch).loss / 4).backward()
    """

    is_last = False
    _windows: Sequence[AccumulationWindow] = ()

    def __init__(self, loader: Iterable[Any], model: nn.Module) -> None:
        runtimes_in(model)
        self._set(loader, lambda: model)

    def _set(self, loader: Iterable[Any], model: Callable[[], nn.Module | None]) -> None:
        self.loader, self._model = loader, model
        self._state: Any = None
        self._has_ended = False
        self._lengths = self._agree()
        if hasattr(loader, "state_dict"):
            self.state_dict, self.load_state_dict = self._state_dict, self._load_state_dict

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "loader" not in vars(self):
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        if self._lengths is None:
            return len(self.loader)  # type: ignore[arg-type]  # it says that it has none
        lowest, highest = self._lengths
        return lowest if self._uneven_inputs() == "shortest" else highest

    def _agree(self) -> tuple[int, int] | None:
        agreed = agreed_lengths([counted_length(self.loader)])
        return None if agreed is None else agreed[0]

    def _uneven_inputs(self) -> UnevenInputs:
        model = self._model()
        return "error" if model is None else runtimes_in(model)[0].config.uneven_inputs

    def __iter__(self) -> Iterator[Any]:
        model = self._model()
        self._has_ended, self.is_last = False, False
        self._lengths = self._agree()
        self._windows = () if model is None else windows_of(model)
        batches = iter(self.loader)
        if model is None or (self._lengths is not None and len({*self._lengths}) == 1):
            steps = steps_alone(batches, self._note)
        else:
            steps = joined_steps(batches, self._uneven_inputs(), attendance_of(model), self._note)
        try:
            for step in steps:
                self.is_last = step.is_last
                self._hand_out(step)
                yield step.batch
            self._has_ended = True
        finally:
            self._weigh(1.0)

    def _hand_out(self, step: Microstep) -> None:
        self._weigh(step.weight)

    def _weigh(self, weight: float) -> None:
        for window in self._windows:
            window.weigh(weight)

    def _note(self) -> None:
        if hasattr(self.loader, "state_dict"):
            self._state = copy.deepcopy(self.loader.state_dict())  # a dataset may go on changing what it returned

    def _state_dict(self) -> Any:
        if self._has_ended or self._state is None:
            state = self.loader.state_dict()  # type: ignore[attr-defined]
            return at_end(state) if self._has_ended else state
        return self._state

    def _load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)  # type: ignore[attr-defined]
        self._state, self._has_ended = None, False
