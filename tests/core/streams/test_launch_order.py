"""Communication is launched as early as it can be: read from the order in which a rank launches its collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch.distributed as dist
from stream_checker import StreamChecker
from stream_windows import CONFIGURATIONS, Run
from stream_world import pretended_device
from torch import Tensor

from lightning_mics.core import collectives
from lightning_mics.core.runtime import runtime_of

# The group, the collective, and the stream that was current.
Launch = tuple[str, str, str]


def launches(configuration: str, body: Callable[[Run], object]) -> list[Launch]:
    """Returns the collectives that a window launches, in their order."""
    chosen, found = CONFIGURATIONS[configuration], []
    original = StreamChecker.collective

    def noted(checker: StreamChecker, group: dist.ProcessGroup, name: str, *args: Any, **kwargs: Any) -> Any:
        found.append((names.get(group.group_name, "other"), name, checker.timeline.current.name))
        return original(checker, group, name, *args, **kwargs)

    with pretended_device(chosen.world_size, chosen.rank, has_gloo=True) as checker:
        run = Run(chosen, {})
        mesh = runtime_of(run.model).mesh
        groups = {"across": mesh.inter_group, "inside": mesh.intra_group, "partition": mesh.partition_group}
        names = {group.group_name: name for name, group in groups.items() if group is not None}
        names[mesh.replication_group.group_name] = "replicas"
        with checker, mock.patch.object(StreamChecker, "collective", noted):
            body(run)
    return found


def test_the_stage_inside_nodes_does_not_wait_to_be_waited_for() -> None:
    def body(run: Run) -> None:
        run.model._set_unshard_async_op(True)
        run.microstep(defer=False)

    gathers = [launch for launch in launches("hierarchical", body) if launch[1] == "gather"]
    assert len(gathers) > 10
    streams = {stream for _, _, stream in gathers}
    assert len(streams) == 1 and "compute" not in streams
    # Across nodes, then one gather for each of the two nodes, before anything else.
    assert [group for group, _, _ in gathers] == ["across", "inside", "inside"] * (len(gathers) // 3)


def test_the_own_node_is_gathered_while_others_are_under_way() -> None:
    order: list[str] = []
    original = collectives.all_gather_single

    def noted(output: Tensor, source: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
        order.append("across" if async_op else "inside")
        work = original(output, source, group=group, async_op=async_op)
        return mock.Mock(wait=lambda: order.append("wait") or work.wait()) if async_op else work

    with mock.patch.object(collectives, "all_gather_single", noted):
        launches("hierarchical", lambda run: run.microstep(defer=False))
    assert len(order) > 10
    assert order == ["across", "inside", "wait", "inside"] * (len(order) // 4)


def test_hop_two_of_a_unit_runs_beside_the_backward_pass_of_the_next_ones() -> None:
    found = launches("flat", lambda run: run.microstep(defer=False))
    reductions = [group for group, name, _ in found if name in ("reduce_scatter", "all_reduce")]
    # The last block and the one before; the first, whose inputs want no gradient, comes behind the root.
    in_backward, at_its_end = ["partition", "replicas"] * 2, ["partition"] * 2 + ["replicas"] * 2
    agreement = ["partition", "replicas"]
    assert reductions == in_backward + at_its_end + agreement
