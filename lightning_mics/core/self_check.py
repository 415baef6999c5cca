"""The self-check: does training do what the configuration asked for?

It watches the first accumulation window and compares what happened with what MiCS promises. Problems are exchanged, so
that every rank raises the same error and none is left waiting. It costs one pass over the local shards and gradients
and two small object exchanges, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_mics.errors import SelfCheckError
from lightning_mics.metrics import CommLedger, Hop

if TYPE_CHECKING:
    from lightning_mics.core.gradients.window import ReplicationSync
    from lightning_mics.core.mesh import MiCSMesh


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22


def fingerprint(tensor: Tensor) -> int:
    """Returns a 64-bit fingerprint of a tensor's bits (of the local shard, for a DTensor).

    Equal tensors have equal fingerprints; the position of each value counts.
    """
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    words = local.detach().contiguous().view(-1).view(_WORDS.get(local.element_size(), torch.uint8))
    total = 0
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK].to(torch.int64)
        weights = torch.arange(2 * start + 1, 2 * (start + chunk.numel()) + 1, 2, device=words.device)
        total += int((chunk * weights).sum())
    return (total + 2**63) % 2**64 - 2**63


def raise_together(problems: Sequence[str], advice: str) -> None:
    """Raises on every rank if any rank has a problem. Collective over the world.

    Raises:
        SelfCheckError: Listing the first few problems, with their ranks.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(problems))
    by_problem: dict[str, list[int]] = {}
    for rank, found in enumerate(gathered):
        for problem in found:
            by_problem.setdefault(problem, []).append(rank)
    if by_problem:
        listed = [f"  rank {', '.join(map(str, ranks))}: {problem}" for problem, ranks in by_problem.items()]
        more = [f"  ... and {len(listed) - 8} more"] if len(listed) > 8 else []
        raise SelfCheckError("\n".join(["MiCS self-check failed:", *listed[:8], *more, advice]))


def check_groups(mesh: MiCSMesh) -> None:
    """Asks every group who its members are, and compares with the layout. Collective over the world.

    Raises:
        SelfCheckError: On every rank, if a group is not what was asked for.
    """
    layout, rank = mesh.layout, dist.get_rank()
    expected = [
        ("partition group", mesh.partition_group, layout.partition_groups),
        ("replication group", mesh.replication_group, layout.replication_groups),
        ("group inside the node", mesh.intra_group, layout.intra_groups),
        ("group across nodes", mesh.inter_group, layout.inter_groups),
    ]
    problems = []
    for name, group, groups in expected:
        if group is None:
            continue
        asked = next(ranks for ranks in groups if rank in ranks)
        members: list[Any] = [None] * group.size()
        dist.all_gather_object(members, rank, group=group)
        if tuple(members) != asked:
            problems.append(f"the {name} is {tuple(members)}, not {asked}")
    raise_together(problems, "Report this with the output of print(layout).")


class SelfCheck:
    """Watches the first accumulation window of one model.

    Args:
        mesh: The groups.
        ledger: The counts of collectives.
    """

    def __init__(self, mesh: MiCSMesh, ledger: CommLedger) -> None:
        self._mesh = mesh
        self._ledger = ledger
        self._start = self._calls()
        self._problems: list[str] = []

    def restart(self) -> None:
        """Starts counting anew, after a pass that failed."""
        self._start = self._calls()
        self._problems = []

    def after_microstep(self, sync: ReplicationSync) -> None:
        """Checks that gradients are sharded; called after each microstep, before the window's end."""
        for unit in sync.units:
            for param in unit.trainable:
                if param.has_unsharded_grad:
                    self._problems.append(f"{param.name} keeps an unsharded gradient between microsteps")
                grad = param.sharded.grad
                if grad is not None and (
                    not isinstance(grad, DTensor) or grad._local_tensor.shape != param.local_shape
                ):
                    self._problems.append(f"the gradient of {param.name} is not sharded like the parameter")

    def after_window(self, sync: ReplicationSync) -> bool:
        """Checks counts and replicas at the end of the window. Collective over the world.

        Returns:
            Whether the check is done; a window in which nothing was trained is not enough.

        Raises:
            SelfCheckError: On every rank, if something is not as configured.
        """
        self.after_microstep(sync)
        self._check_counts(sync)
        self._check_replicas(sync)
        raise_together(
            self._problems,
            "Training would go on with wrong gradients or unplanned traffic. If you are sure that it is right, switch "
            "the check off with verify=False.",
        )
        return any(unit.num_reductions for unit in sync.units)

    def _calls(self) -> dict[tuple[str, Hop], int]:
        return {(unit, hop): traffic.calls for unit, hop, traffic in self._ledger}

    def _check_counts(self, sync: ReplicationSync) -> None:
        layout, calls = self._mesh.layout, self._calls()

        def count(unit: str, hop: Hop) -> int:
            return calls.get((unit, hop), 0) - self._start.get((unit, hop), 0)

        for unit in sync.units:
            narrow, wide = count(unit.name, Hop.PARTITION_REDUCE), count(unit.name, Hop.REPLICATION_REDUCE)
            expected = unit.num_reductions if layout.shard_size > 1 else 0
            if narrow != expected:
                self._problems.append(
                    f"unit {unit.name!r} ran {narrow} partition reduce-scatters in {sync.num_microsteps} "
                    f"microstep(s), not {expected}"
                )
            most = (1 + unit.needs_relaunch) if layout.num_replicas > 1 and unit.participants else 0
            if wide != most:
                self._problems.append(f"unit {unit.name!r} ran {wide} replication all-reduces in a window, not {most}")

    def _check_replicas(self, sync: ReplicationSync) -> None:
        names, prints = [], []
        for unit in sync.units:
            for param in unit.group.params:
                names.append(param.name)
                grad = param.sharded.grad
                prints.append((fingerprint(param.sharded), None if grad is None else fingerprint(grad)))
        gathered: list[Any] = [None] * self._mesh.replication_group.size()
        dist.all_gather_object(gathered, prints, group=self._mesh.replication_group)
        for index, name in enumerate(names):
            if any(other[index][0] != gathered[0][index][0] for other in gathered):
                self._problems.append(f"replicas hold different shards of {name}")
            if any(other[index][1] != gathered[0][index][1] for other in gathered):
                self._problems.append(f"replicas hold different gradients of {name} after the all-reduce")


def equalize_replicas(named_tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> int:
    """Makes full (not yet sharded) tensors equal on all ranks: those that differ become rank 0's.

    Collective over the world. Tensors that are equal already cost only their fingerprint.

    Args:
        named_tensors: Names and tensors, the same on every rank.
        device: Where this rank communicates.

    Returns:
        The number of tensors that differed.

    Raises:
        SelfCheckError: On every rank, if tensors still differ afterwards.
    """
    tensors = dict(named_tensors)
    different = _different(tensors, device)
    for name in different:
        source = tensors[name].detach()
        staged = source.to(device).contiguous()
        dist.broadcast(staged, src=0)
        if staged.data_ptr() != source.data_ptr():
            source.copy_(staged)
    if different:
        left = _different({name: tensors[name] for name in different}, device)
        raise_together([f"{name} differs from rank 0 after the broadcast" for name in left], "Check the network.")
    return len(different)


def _different(tensors: dict[str, Tensor], device: torch.device) -> list[str]:
    if not tensors:
        return []
    prints = torch.tensor([fingerprint(tensor) for tensor in tensors.values()], dtype=torch.int64, device=device)
    low, high = prints.clone(), prints
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return [name for name, differs in zip(tensors, (low != high).tolist(), strict=True) if differs]
