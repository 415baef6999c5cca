"""The self-check: does training do what the configuration asked for?

It watches the first accumulation window, and those after a change, and compares what happened with what MiCS promises.
Problems are exchanged, so that every rank raises the same error and none is left waiting. A window that is watched
costs one pass over the local shards and gradients and two small object exchanges.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_mics.core._torch import local_tensor
from lightning_mics.core.fingerprints import fingerprints
from lightning_mics.core.gradients.window import AccumulationWindow, WindowObserver
from lightning_mics.core.mesh import MiCSMesh
from lightning_mics.core.replicas import differing, raise_together
from lightning_mics.core.slices import is_slice
from lightning_mics.metrics import CommLedger, Hop

_mode = operator.attrgetter("training")


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
    """Watches the first accumulation window of one model, and those after a change.

    A change is one of what wants gradients, of what an optimizer steps on, or of the model's mode. Ranks agree at the
    end of a window on whether to look at it. Loops that change something in every window, as adversarial ones do, are
    looked at the first ``OFTEN`` times, and every ``OFTEN``-th time from then on.

    Args:
        mesh: The groups.
        ledger: The counts of collectives.
        modules: The modules of the model's units.
    """

    OFTEN = 64

    def __init__(self, mesh: MiCSMesh, ledger: CommLedger, modules: Sequence[nn.Module]) -> None:
        self._mesh, self._ledger, self._units = mesh, ledger, modules
        self._is_due, self._has_switched, self._num_asked = True, False, 0
        self._state: object = None
        self._steps_on: weakref.WeakKeyDictionary[torch.optim.Optimizer, set[int]] = weakref.WeakKeyDictionary()
        self._start_anew({})

    def restart(self, window: AccumulationWindow) -> None:
        """Starts counting anew, after a pass that failed."""
        self._start_anew(_expected_calls(window))

    def _start_anew(self, expected: dict[tuple[str, Hop], int]) -> None:
        self._start, self._start_expected = self._calls(), expected
        self._num_resets = self._ledger.num_resets
        self._num_microsteps = 0
        self._problems: list[str] = []

    def after_step(self, window: AccumulationWindow, optimizer: torch.optim.Optimizer, params: set[int]) -> None:
        """Notes whether an optimizer steps on other parameters than before; the first one of all is no change."""
        self._has_switched |= bool(self._steps_on) and self._steps_on.get(optimizer) != params
        self._steps_on[optimizer] = params

    def asks(self, window: AccumulationWindow) -> bool:
        """Returns whether the window is the first one, or something was changed before it or in it."""
        wanted = tuple((unit.use.wanted, unit.use.num_switches) for unit in window.units)
        state = (window.num_modes, *map(_mode, self._units), *wanted)
        has_changed = self._has_switched or state != self._state
        self._state, self._has_switched = state, False
        return self._is_due or has_changed

    def after_microstep(self, window: AccumulationWindow) -> None:
        """Checks that gradients are sharded; called after each microstep, before the window's end."""
        self._num_microsteps += 1
        if not self._is_due:
            return
        for unit in window.units:
            for param in unit.trainable:
                if param.has_unsharded_grad:
                    self._problems.append(f"{param.name} keeps an unsharded gradient between microsteps")
                grad = param.sharded.grad
                if grad is not None and not (
                    isinstance(grad, DTensor) and (is_slice(grad) or local_tensor(grad).shape == param.local_shape)
                ):
                    self._problems.append(f"the gradient of {param.name} is not sharded like the parameter")

    def after_window(self, window: AccumulationWindow) -> bool:
        """Checks counts and replicas at the end of a window that a rank asked for. Collective over the world then.

        Returns:
            That it has not seen enough.

        Raises:
            SelfCheckError: On every rank, if something is not as configured.
        """
        self._num_asked += window.is_asked
        is_seldom = self._num_asked > self.OFTEN and self._num_asked % self.OFTEN
        self._is_due = self._is_due or (window.is_asked and not is_seldom)
        self.after_microstep(window)
        if self._is_due:
            self._check(window)
        return False

    def _check(self, window: AccumulationWindow) -> None:
        self._check_counts(window)
        self._check_replicas(window)
        self._check_whole(window)
        problems = self._problems
        self._is_due = not any(unit.num_reductions for unit in window.units)  # nothing was trained
        self.restart(window)
        raise_together(
            problems,
            "Training would go on with wrong gradients, with replicas that are not equal, or with unplanned traffic. "
            "Without the check (verify=False) it would do so in silence: give every rank the same code path and the "
            "same changes of parameters, or report it with a script that shows it.",
        )

    def _calls(self) -> dict[tuple[str, Hop], int]:
        return {(unit, hop): traffic.calls for unit, hop, traffic in self._ledger}

    def _check_counts(self, window: AccumulationWindow) -> None:
        """Compares collectives with what the windows since the last check did, and hop two with one a window."""
        launched: dict[str, tuple[int, int]] = {}
        for unit in window.units:
            most = 1 + unit.num_relaunches if self._mesh.layout.num_replicas > 1 else 0
            # Where nothing wanted a gradient, hop two may have been left out.
            expected = most if unit.use.wanted or unit.num_launches else 0
            launches, more = launched.get(unit.name, (0, 0))
            launched[unit.name] = launches + unit.num_launches, more + expected
        self._problems += [
            f"unit {name!r} ran {found} replication all-reduces in a window, not {expected}"
            for name, (found, expected) in launched.items()
            if found != expected
        ]
        if self._ledger.num_resets != self._num_resets:
            return  # what was counted before is gone
        calls = self._calls()
        what = {Hop.PARTITION_REDUCE: "partition reduce-scatters", Hop.REPLICATION_REDUCE: "replication all-reduces"}
        for (name, hop), total in _expected_calls(window).items():
            expected = total - self._start_expected.get((name, hop), 0)
            expected = expected if hop is Hop.REPLICATION_REDUCE or self._mesh.layout.shard_size > 1 else 0
            found = calls.get((name, hop), 0) - self._start.get((name, hop), 0)
            if found != expected:
                self._problems.append(
                    f"unit {name!r} ran {found} {what[hop]} in {self._num_microsteps} microstep(s), not {expected}"
                )

    def _check_replicas(self, window: AccumulationWindow) -> None:
        window.restore_rows()
        params = [param for unit in window.units for param in unit.group.params]
        device = window.units[0].group.device
        nothing = torch.ones(1, dtype=torch.int64, device=device)  # unlike a gradient of zeros
        # Slices differ: each replica has its own.
        grads = [None if grad is None or is_slice(grad) else grad for grad in (param.sharded.grad for param in params)]
        shards = fingerprints([param.sharded for param in params], device)
        reduced = fingerprints([nothing if grad is None else grad for grad in grads], device)
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


def _expected_calls(window: AccumulationWindow) -> dict[tuple[str, Hop], int]:
    """Returns how often units should have run either hop, in all windows."""
    calls: dict[tuple[str, Hop], int] = {}
    for unit in window.units:
        for hop, total in (
            (Hop.PARTITION_REDUCE, unit.total_reductions),
            (Hop.REPLICATION_REDUCE, unit.total_launches),
        ):
            calls[unit.name, hop] = calls.get((unit.name, hop), 0) + total
    return calls
