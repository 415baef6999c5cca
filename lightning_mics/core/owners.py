"""Steps on whole parameters: each has an owner, which takes the step on it for all ranks that divide its states.

Some optimizers look at a whole matrix: its orthogonalisation, its factors, its norms. For the time of a step the rows
of the parameter, of its gradient and of its states meet at one rank, and what they become goes back to where the rows
live: first between the replicas that divide states, then inside the partition, and the other way round. Between steps
all of them are divided as those of any other optimizer are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mics.core._torch import local_tensor
from lightning_mics.core.masters import changed, master_of
from lightning_mics.core.mesh import communication_device
from lightning_mics.core.slices import empty_state, is_slice, rows_at, slices_of
from lightning_mics.core.stand_ins import LocalView, StandIn, View, step_of
from lightning_mics.errors import MiCSError

_ELEMENTS = 2**24  # of whole parameters that an owner has at a time


@torch.no_grad()
def step_on_whole(optimizer: Optimizer) -> StandIn:
    """Steps on whole parameters, each at its owner. Collective over the ranks that divide states.

    Returns:
        A stand-in without parameters, on which nothing is left to do.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    divided: dict[DeviceMesh, list[Tensor]] = {}
    for param in params:
        if isinstance(param, DTensor) and (param.grad is not None or param.requires_grad):
            divided.setdefault(_mesh_of(param), []).append(param)
    rounds = [(mesh, some) for mesh, all_of_it in divided.items() for some in _rounds(all_of_it, mesh.size())]
    plain = [param for param in params if not isinstance(param, DTensor)]
    for index, (mesh, some) in enumerate(rounds):
        is_last = index + 1 == len(rounds)
        _Round(optimizer, mesh, some).step(plain if is_last else [], keeps_settings=is_last)
    return _Spent(optimizer, LocalView(), [{**group, "params": []} for group in optimizer.param_groups])


class _Spent(StandIn):
    """Has nothing to hand back."""

    def hand_back(self, *, settings: bool = True) -> None:
        """Leaves the optimizer as it is."""


class _WholeView(View):
    """Whole tensors in the place of what ranks divide."""

    def __init__(self) -> None:
        self._whole: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, tensor: Tensor, whole: Tensor) -> None:
        """Notes what stands for a parameter, its gradient or a state."""
        self._whole[id(tensor)] = tensor, whole

    def holds(self, tensor: Any) -> bool:
        """Returns whether something stands for a tensor."""
        return id(tensor) in self._whole

    def of(self, param: Tensor, tensor: Tensor) -> Tensor:
        """Returns the whole; of what is whole already, itself."""
        if id(tensor) in self._whole:
            return self._whole[id(tensor)][1]
        is_detached = isinstance(tensor, DTensor) and tensor.shape == param.shape
        return self._whole[id(param)][1] if is_detached else tensor

    def back(self, param: Tensor, seen: Tensor) -> Tensor:
        """Makes room for this rank's rows of a state that has the parameter's shape."""
        if not isinstance(param, DTensor) or seen.shape != param.shape:
            return seen
        state = empty_state(param, seen.dtype)
        self.put(state, seen)
        return state


@dataclass(frozen=True)
class _Told:
    """What an owner tells of a state: the dtype where its rows follow, else the value."""

    dtype: torch.dtype | None = None
    value: Any = None
    on_device: bool = False


class _Round:
    """A step on some parameters.

    Args:
        optimizer: Whose step it is.
        mesh: Who divides its states: a partition, or with the replicas that divide its shards further.
        params: Parameters, the same in the same order on all ranks of it.
    """

    def __init__(self, optimizer: Optimizer, mesh: DeviceMesh, params: Sequence[Tensor]) -> None:
        self._optimizer, self._params, self._view = optimizer, params, _WholeView()
        self._values: list[Tensor] = [param if (master := master_of(param)) is None else master for param in params]
        device = communication_device(mesh.device_type)
        self._partition = _Exchange(mesh.get_group("shard"), device)
        self._replicas = _Exchange(mesh.get_group("slice"), device) if mesh.ndim > 1 else None
        num_replicas = 1 if self._replicas is None else self._replicas.size
        self._owners = [divmod(owner, num_replicas) for owner in _owners(params, mesh.size())]

    def step(self, plain: Iterable[Tensor], *, keeps_settings: bool) -> None:
        """Takes it.

        Args:
            plain: Parameters that are whole on every rank, which each steps on.
            keeps_settings: Whether what the step sets in groups and on the optimizer is kept.
        """
        self._collect()
        chosen = {id(param) for i, param in enumerate(self._params) if self._owns(i)} | set(map(id, plain))
        groups = [
            {**group, "params": [param for param in group["params"] if id(param) in chosen]}
            for group in self._optimizer.param_groups
        ]
        stand_in = StandIn(self._optimizer, self._view, groups)
        stand_in.take_gradients()
        error: Exception | None = None
        try:
            step_of(self._optimizer)(stand_in.optimizer)
            stand_in.hand_back(settings=keeps_settings)
        except Exception as raised:  # all ranks are to hear of it
            error = raised
        self._agree(error)
        for i, param in enumerate(self._params):
            if self._owns(i):
                self._view.put(self._values[i], stand_in.seen(param))
        changed(self._params)
        self._deal()

    def _is_of_replica(self, index: int) -> bool:
        return self._replicas is None or self._owners[index][1] == self._replicas.place

    def _owns(self, index: int) -> bool:
        return self._is_of_replica(index) and self._owners[index][0] == self._partition.place

    def _states(self) -> Iterator[tuple[int, Tensor]]:
        """Yields what is divided by rows beside parameters, with the number of the parameter."""
        for i, param in enumerate(self._params):
            for value in self._optimizer.state.get(param, {}).values():
                if isinstance(value, DTensor) and value.shape == param.shape:
                    yield i, value

    def _collect(self) -> None:
        """Brings all that belongs to a parameter to its owner."""
        grads = [(i, param.grad) for i, param in enumerate(self._params) if param.grad is not None]
        masters = [(i, value) for i, value in enumerate(self._values) if is_slice(value)]
        divided = [*grads, *self._states(), *masters]
        if self._replicas is None:
            shards = [local_tensor(tensor) for _, tensor in divided]
        else:
            rows = [self._rows(i, tensor) for i, tensor in divided]
            shapes = [local_tensor(self._params[i]).shape for i, _ in divided]
            shards = self._replicas.collect(rows, shapes, [self._owners[i][1] for i, _ in divided])
        divided = [(i, tensor) for i, tensor in divided if self._is_of_replica(i)]
        kept = [(i, value) for i, value in enumerate(self._values) if self._is_of_replica(i) and not is_slice(value)]
        divided, shards = divided + kept, shards + [local_tensor(param) for _, param in kept]
        shapes, owners = [self._params[i].shape for i, _ in divided], [self._owners[i][0] for i, _ in divided]
        wholes = iter(self._partition.collect(shards, shapes, owners))
        for i, tensor in divided:
            if self._owns(i):
                self._view.put(tensor, next(wholes))

    def _deal(self) -> None:
        """Brings what owners made of parameters and states to where their rows live."""
        divided = [*self._states(), *enumerate(self._values)]
        here = [(i, tensor) for i, tensor in divided if self._is_of_replica(i)]
        shards = [self._shard(i, tensor) for i, tensor in here]
        wholes = [self._view.of(self._params[i], tensor) for i, tensor in here if self._owns(i)]
        self._partition.deal(wholes, shards, [self._owners[i][0] for i, _ in here])
        if self._replicas is not None:
            rows = [self._rows(i, tensor) for i, tensor in divided]
            self._replicas.deal(shards, rows, [self._owners[i][1] for i, _ in divided])

    def _shard(self, index: int, tensor: Tensor) -> Tensor:
        """Returns memory for a shard: its own, if it has some."""
        param = self._params[index]
        if self._replicas is None or not is_slice(tensor):
            return local_tensor(tensor)
        return torch.empty_like(local_tensor(param), dtype=tensor.dtype)

    def _rows(self, index: int, tensor: Tensor) -> Tensor:
        slices = slices_of(self._params[index])
        assert slices is not None
        return slices.local(tensor)

    def _agree(self, error: Exception | None) -> None:
        """Tells all ranks which states there are; rows follow. Raises everywhere what was raised anywhere."""
        owned = [i for i in range(len(self._params)) if self._owns(i) and error is None]
        states = {i: self._told(self._optimizer.state.get(self._params[i], {})) for i in owned}
        messages = [(None if error is None else f"{type(error).__name__}: {error}", states)]
        for exchange in (self._partition, self._replicas):
            messages = messages if exchange is None else exchange.spread(messages)
        failed = next((failure for failure, _ in messages if failure is not None), None)
        if failed is not None:
            raise error or MiCSError(f"{type(self._optimizer).__name__}.step() failed on another rank: {failed}")
        everyones = {i: told for _, states in messages for i, told in states.items() if told}
        for i in sorted(everyones):  # in one order on all ranks, as saving gathers states one after another
            states = self._optimizer.state.pop(self._params[i], {})
            self._optimizer.state[self._params[i]] = states if self._owns(i) else self._taken(i, everyones[i], states)

    def _told(self, states: dict[Any, Any]) -> dict[Any, _Told]:
        told = {}
        for name, value in states.items():
            if self._view.holds(value):
                told[name] = _Told(dtype=value.dtype)
            elif isinstance(value, Tensor):
                told[name] = _Told(value=value.cpu(), on_device=value.device.type != "cpu")
            else:
                told[name] = _Told(value=value)
        return told

    def _taken(self, index: int, told: dict[Any, _Told], known: dict[Any, Any]) -> dict[Any, Any]:
        """Returns the states of a parameter that another rank owns: values, and room for this rank's rows."""
        param, states = self._params[index], {}
        for name, state in told.items():
            if state.dtype is None:
                states[name] = state.value.to(param.device) if state.on_device else state.value
            else:
                value = known.get(name)
                is_fit = isinstance(value, DTensor) and value.dtype == state.dtype
                states[name] = value if is_fit else empty_state(param, state.dtype)
        return states


class _Exchange:
    """Moves rows between the ranks of a group, which divide tensors by rows, and one of them, which has them whole.

    Args:
        group: The group.
        device: Where this rank communicates.

    Attributes:
        size: Its ranks.
        place: This rank's place in it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._nothing = torch.empty(0, dtype=torch.uint8, device=device)
        self.size, self.place = group.size(), group.rank()

    def collect(self, rows: Sequence[Tensor], shapes: Sequence[torch.Size], owners: Sequence[int]) -> list[Tensor]:
        """Returns the whole of those tensors that this rank owns, in order. Collective over the group.

        Args:
            rows: This rank's rows of each tensor.
            shapes: The shape of each whole tensor.
            owners: The place of each one's owner.
        """
        everything = list(zip(rows, shapes, owners, strict=True))
        wholes = [part.new_empty(shape) for part, shape, owner in everything if owner == self.place]
        self._exchange(self._by_place(rows, owners), [self._parts(wholes, place) for place in range(self.size)])
        return wholes

    def deal(self, wholes: Sequence[Tensor], rows: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Puts each rank's rows where they belong. Collective over the group.

        Args:
            wholes: The tensors that this rank owns, in order.
            rows: Where this rank's rows of each tensor go.
            owners: The place of each one's owner.
        """
        self._exchange([self._parts(wholes, place) for place in range(self.size)], self._by_place(rows, owners))

    def spread(self, messages: list[Any]) -> list[Any]:
        """Returns the messages of all ranks. Collective over the group."""
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, messages, group=self._group)
        return list(itertools.chain.from_iterable(everyones))

    def _by_place(self, rows: Sequence[Tensor], owners: Sequence[int]) -> list[list[Tensor]]:
        return [
            [part for part, owner in zip(rows, owners, strict=True) if owner == place] for place in range(self.size)
        ]

    def _parts(self, wholes: Sequence[Tensor], place: int) -> list[Tensor]:
        return [whole[rows_at(place, self.size, len(whole))] for whole in wholes]

    def _exchange(self, sent: list[list[Tensor]], received: list[list[Tensor]]) -> None:
        """Sends tensors to each rank, and puts what comes from each into tensors, whatever their dtypes."""
        parts = [part.contiguous().view(-1).view(torch.uint8) for parts in sent for part in parts]
        outgoing = torch.cat([self._nothing, *(part.to(self._device) for part in parts)])
        sizes = [[sum(part.nbytes for part in parts) for parts in direction] for direction in (sent, received)]
        incoming = outgoing.new_empty(sum(sizes[1]))
        dist.all_to_all_single(incoming, outgoing, sizes[1], sizes[0], group=self._group)
        start = 0
        for part in itertools.chain.from_iterable(received):
            come = incoming[start : start + part.nbytes].clone()  # memory that begins where any dtype may
            part.copy_(come.view(part.dtype).view(part.shape))
            start += part.nbytes


def _mesh_of(param: DTensor) -> DeviceMesh:
    slices = slices_of(param)
    return param.device_mesh if slices is None else slices.mesh


def _cost(param: Tensor) -> int:
    """Returns what work on a matrix grows with."""
    return param.numel() * min(param.shape)


def _rounds(params: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yields parameters, the most work first, so many at a time that no owner needs much memory."""
    found: list[Tensor] = []
    numel = 0
    for param in sorted(params, key=_cost, reverse=True):
        if found and numel + param.numel() > size * _ELEMENTS:
            yield found
            found, numel = [], 0
        found.append(param)
        numel += param.numel()
    if found:
        yield found


def _owners(params: Iterable[Tensor], size: int) -> Iterator[int]:
    """Yields the owner of each parameter, of which the most work comes first."""
    loads = [0] * size
    for param in params:
        owner = loads.index(min(loads))
        loads[owner] += _cost(param)
        yield owner
