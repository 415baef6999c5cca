"""The self-check: does training do what the configuration asked for?

It watches the first accumulation window and compares what happened with what MiCS promises. Problems are exchanged, so
that every rank raises the same error and none is left waiting. It costs one pass over the local shards and gradients
and two small object exchanges, once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lightning_mics.core._torch import local_tensor
from lightning_mics.core.gradients.window import AccumulationWindow, WindowObserver
from lightning_mics.core.mesh import MiCSMesh
from lightning_mics.core.replicas import differing, fingerprints, raise_together
from lightning_mics.metrics import CommLedger, Hop


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


class SelfCheck(WindowObserver):
    """Watches the first accumulation window of one model.

    Args:
        mesh: The groups.
        ledger: The counts of collectives.
    """

    def __init__(self, mesh: MiCSMesh, ledger: CommLedger) -> None:
        self._mesh = mesh
        self._ledger = ledger
        self.restart()

    def restart(self) -> None:
        """Starts counting anew, after a pass that failed."""
        self._start = self._calls()
        self._num_microsteps = 0
        self._problems: list[str] = []

    def after_microstep(self, window: AccumulationWindow) -> None:
        """Checks that gradients are sharded; called after each microstep, before the window's end."""
        self._num_microsteps += 1
        for unit in window.units:
            for param in unit.trainable:
                if param.has_unsharded_grad:
                    self._problems.append(f"{param.name} keeps an unsharded gradient between microsteps")
                grad = param.sharded.grad
                if grad is not None and (
                    not isinstance(grad, DTensor) or local_tensor(grad).shape != param.local_shape
                ):
                    self._problems.append(f"the gradient of {param.name} is not sharded like the parameter")

    def after_window(self, window: AccumulationWindow) -> bool:
        """Checks counts and replicas at the end of the window. Collective over the world.

        Returns:
            Whether the check is done; a window in which nothing was trained is not enough.

        Raises:
            SelfCheckError: On every rank, if something is not as configured.
        """
        self.after_microstep(window)
        self._check_counts(window)
        self._check_replicas(window)
        self._check_whole(window)
        raise_together(
            self._problems,
            "Training would go on with wrong gradients or unplanned traffic. If you are sure that it is right, switch "
            "the check off with verify=False.",
        )
        has_trained = any(unit.num_reductions for unit in window.units)
        if not has_trained:
            self.restart()
        return has_trained

    def _calls(self) -> dict[tuple[str, Hop], int]:
        return {(unit, hop): traffic.calls for unit, hop, traffic in self._ledger}

    def _check_counts(self, window: AccumulationWindow) -> None:
        layout, calls = self._mesh.layout, self._calls()

        def count(unit: str, hop: Hop) -> int:
            return calls.get((unit, hop), 0) - self._start.get((unit, hop), 0)

        for unit in window.units:
            narrow, wide = count(unit.name, Hop.PARTITION_REDUCE), count(unit.name, Hop.REPLICATION_REDUCE)
            expected = unit.num_reductions if layout.shard_size > 1 else 0
            if narrow != expected:
                self._problems.append(
                    f"unit {unit.name!r} ran {narrow} partition reduce-scatters in {self._num_microsteps} "
                    f"microstep(s), not {expected}"
                )
            most = (1 + unit.num_relaunches) if layout.num_replicas > 1 and unit.participants.params else 0
            if wide != most:
                self._problems.append(f"unit {unit.name!r} ran {wide} replication all-reduces in a window, not {most}")

    def _check_replicas(self, window: AccumulationWindow) -> None:
        params = [param for unit in window.units for param in unit.group.params]
        device = window.units[0].group.device
        nothing = torch.ones(1, dtype=torch.int64, device=device)  # unlike a gradient of zeros
        grads = [param.sharded.grad for param in params]
        shards = fingerprints((param.sharded for param in params), device)
        reduced = fingerprints((nothing if grad is None else grad for grad in grads), device)
        differs = differing(torch.cat([shards, reduced]), self._mesh.replication_group)
        for index, param in enumerate(params):
            if differs[index]:
                self._problems.append(f"replicas hold different shards of {param.name}")
            if differs[len(params) + index]:
                self._problems.append(f"replicas hold different gradients of {param.name} after the all-reduce")

    def _check_whole(self, window: AccumulationWindow) -> None:
        """Compares what every rank holds whole."""
        names, params = list(window.whole.params), list(window.whole.params.values())
        if not names:
            return
        device = window.units[0].group.device
        nothing = torch.ones(1, dtype=torch.int64, device=device)
        grads = [nothing if param.grad is None else param.grad for param in params]
        differs = differing(fingerprints([*params, *grads], device))
        for index, name in enumerate(names):
            if differs[index]:
                self._problems.append(f"ranks hold different values of {name}")
            if differs[len(names) + index]:
                self._problems.append(f"ranks hold different gradients of {name} after they were averaged")
