"""What the ranks tell each other at the end of a window, in one small message.

The message is the host's own, and its answer decides what the host does next. So it travels between hosts, and none of
them waits for its device: over groups that carry CPU tensors, if there are such, else on a stream of its own.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lightning_mics.core._torch import carries_cpu_tensors
from lightning_mics.core.failures import explaining
from lightning_mics.core.gradients.unit import Phase, UnitGradients
from lightning_mics.core.gradients.whole import WholeGradients
from lightning_mics.core.mesh import MiCSMesh, communication_device
from lightning_mics.core.places import Call, here, of_world, waiting
from lightning_mics.errors import SelfCheckError

_SLOT = 8  # bytes: a fingerprint and its complement


class CollectiveOrder:
    """Fingerprints of the order of a rank's partition collectives, of what it wrote in passes, and of its hooks.

    Attributes:
        written: Names of the gathered parameters that this rank wrote.
        hooked: Names of the parameters whose gradients hooks of this rank want to see.
        is_compared: Whether collectives count now: partitions may run different numbers of passes in an evaluation.
    """

    def __init__(self) -> None:
        self._hash = self._writes = 0
        self.written: set[str] = set()
        self.hooked: list[str] = []
        self.is_compared = True

    def note(self, unit_index: int, kind: int) -> None:
        """Folds in a collective: which unit's, and 0 for a gather or 1 for a reduction."""
        if self.is_compared:
            self._hash = (self._hash * 1_000_003 + unit_index * 2 + kind + 1) & 0xFFFFFFFF

    def note_write(self, name: str, checksum: int) -> None:
        """Folds in a write to a gathered parameter: the sum of what it holds then."""
        self.written.add(name)
        self._writes = (self._writes * 1_000_003 + checksum + len(name)) & 0xFFFFFFFF

    def clear(self) -> None:
        """Starts a new window."""
        self._hash = self._writes = 0
        self.written = set()
        self.hooked = []

    def slot(self) -> bytes:
        """Returns the fingerprint of the order and its complement.

        The maximum of a byte and that of its complement, over some ranks, add up to 255 only if all sent one byte.
        """
        return _with_complement(self._hash)

    def write_slot(self) -> bytes:
        """Returns the fingerprint of writes and its complement."""
        return _with_complement(self._writes)

    def hook_slot(self) -> bytes:
        """Returns the fingerprint of hooks and its complement."""
        return _with_complement(zlib.crc32(" ".join(self.hooked).encode()))


def _with_complement(fingerprint: int) -> bytes:
    sent = fingerprint.to_bytes(_SLOT // 2, "big")
    return sent + bytes(255 - byte for byte in sent)


def _is_one(slot: bytes) -> bool:
    """Whether all ranks sent one fingerprint; nothing came from ranks that the fake backend only pretends to have."""
    half = _SLOT // 2
    return not any(slot) or all(high + low == 255 for high, low in zip(slot[:half], slot[half:], strict=True))


class Channel(ABC):
    """A way for hosts to exchange a message."""

    @abstractmethod
    def maximum(self, message: bytearray) -> bytes:
        """Returns the largest of each byte over all ranks; may change ``message``. Collective over the world."""


class HostChannel(Channel):
    """Groups that carry CPU tensors: first each partition, then each rank with those in its place in other replicas.

    Together they are the world, in rings of ``p`` and ``r`` ranks and not of ``p * r``.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        self._groups = groups

    def maximum(self, message: bytearray) -> bytes:
        """Reduces the message in place."""
        flags = torch.frombuffer(message, dtype=torch.uint8)
        for group in self._groups:
            here.launched[id(group)] += 1
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        return bytes(message)


class DeviceChannel(Channel):
    """A group of all ranks that carries only the device's tensors.

    The stream waits for no other, and neither hop uses the group. So the host, which waits for the stream, waits for
    other hosts to come to the end of their window, and not for the device to get there.
    """

    def __init__(self, mesh: MiCSMesh) -> None:
        self._device = communication_device(mesh.device_mesh.device_type)
        self._handle = torch.get_device_module(self._device.type)
        self._stream, self._group = self._handle.Stream(priority=-1), mesh.host_group

    def maximum(self, message: bytearray) -> bytes:
        """Reduces a copy of the message on the device."""
        host = torch.frombuffer(message, dtype=torch.uint8).pin_memory()
        with self._handle.stream(self._stream):
            flags = host.to(self._device, non_blocking=True)
            here.launched[id(self._group)] += 1
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
            host.copy_(flags, non_blocking=True)
            arrival = self._stream.record_event()
        arrival.synchronize()
        return bytes(host.tolist())


def channel_for(mesh: MiCSMesh) -> Channel:
    """Returns the way between the hosts of a mesh."""
    groups = [group for group in (mesh.partition_group, mesh.replication_group) if group.size() > 1]
    return HostChannel(groups) if all(map(carries_cpu_tensors, groups)) else DeviceChannel(mesh)


class Agreement:
    """Exchanges what was used, what is outdated, and the order of collectives.

    Args:
        mesh: The groups.
        units: The gradients of each FSDP unit, the same ones in the same order on all ranks.
        order: This rank's order of partition collectives.
        whole: The gradients of parameters that are not sharded.

    Attributes:
        order: See above.
    """

    def __init__(
        self, mesh: MiCSMesh, units: Sequence[UnitGradients], order: CollectiveOrder, whole: WholeGradients
    ) -> None:
        self._layout, self._units, self.order, self._whole = mesh.layout, units, order, whole
        self._mine = _SLOT * mesh.layout.replica_of(dist.get_rank())
        self._channel = channel_for(mesh)
        groups = [mesh.partition_group, mesh.replication_group, mesh.host_group]
        self._call = Call("window", "the end of a window", range(dist.get_world_size()), groups, of_world().models)

    def reach(self, asks: bool) -> tuple[list[int], list[UnitGradients], bool]:
        """Asks all ranks, and clears the gradients of whole parameters that none used. Collective over the world.

        Args:
            asks: Whether this rank wants all of them to look at the window.

        Returns:
            Unit by unit, which parameters any rank used; the units whose hop two is outdated on any rank; whether a
            rank asks.

        Raises:
            SelfCheckError: On every rank, if ranks of a partition group ran their collectives in different order, or
                ranks differ in what they wrote or in hooks on gradients.
        """
        units = self._units
        used = b"".join([unit.use.used.to_bytes(len(unit.group.params), "little") for unit in units])
        slots = bytearray(_SLOT * self._layout.num_replicas)
        slots[self._mine : self._mine + _SLOT] = self.order.slot()
        writes, written = self.order.write_slot(), self.order.written
        hooks, hooked = self.order.hook_slot(), self.order.hooked
        self.order.clear()
        outdated = bytes([unit.phase is Phase.OUTDATED for unit in units])
        whole = self._whole.used()
        message = bytearray(whole + used + outdated + bytes([asks]) + slots + writes + hooks)
        with explaining(), waiting(self._call):
            answer = self._channel.maximum(message)
        here.windows += 1
        self._whole.clear_unused(answer[: len(whole)])
        answer = answer[len(whole) :]
        rest = answer[len(used) :]
        self._check_order(rest[len(units) + 1 :])
        _check_writes(answer[-2 * _SLOT : -_SLOT], written)
        _check_hooks(answer[-_SLOT:], hooked)
        again = [unit for unit, is_outdated in zip(units, rest, strict=False) if is_outdated]
        return self._split(answer), again, bool(rest[len(units)])

    def _split(self, answer: bytes) -> list[int]:
        found, start = [], 0
        for unit in self._units:
            end = start + len(unit.group.params)
            found.append(int.from_bytes(answer[start:end], "little"))
            start = end
        return found

    def _check_order(self, slots: bytes) -> None:
        for replica, group in enumerate(self._layout.partition_groups):
            slot = slots[_SLOT * replica : _SLOT * (replica + 1)]
            if not _is_one(slot):
                raise SelfCheckError(
                    f"Ranks {list(group)} of one partition group ran the units of the model in different order, so "
                    "gathered parameters or gradients may belong to different units. Let every rank of a partition "
                    "take the same path through the model, put the modules of the branch into one unit (wrap=), or "
                    "use shard_size=1."
                )


def _check_writes(slot: bytes, written: set[str]) -> None:
    if not _is_one(slot):
        raise SelfCheckError(
            "Ranks wrote different values to gathered parameters in a forward pass; this rank wrote "
            f"{', '.join(sorted(written)) or 'none'}. Average what is written over all ranks first (all_reduce), keep "
            "it in a buffer, or renormalise embeddings with nn.Embedding(max_norm=)."
        )


def _check_hooks(slot: bytes, hooked: Sequence[str]) -> None:
    if not _is_one(slot):
        raise SelfCheckError(
            "Hooks on gradients (p.register_hook, p.register_post_accumulate_grad_hook) are on some ranks only; this "
            f"rank has them on {', '.join(hooked) or 'none'}. They see the mean over all ranks, which all of these "
            "gather together: register them on every rank."
        )
