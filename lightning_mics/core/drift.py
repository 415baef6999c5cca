"""Replicas that drift apart: a fingerprint of each rank's shards after every N-th optimizer step, and what follows.

The fingerprints are taken behind the step, on the device, and gathered by one asynchronous message of 8 bytes a rank.
They are read before the next step's gradients are averaged, a forward pass later; so the host waits for nothing that
the device does not have behind it. To repair shards they must be read before that forward pass, whose gradients would
come from wrong weights.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.config import MiCSConfig
from lightning_mics.core._torch import all_gather_single, local_tensor
from lightning_mics.core.fingerprints import fingerprints, joint_fingerprint
from lightning_mics.core.gradients.window import AccumulationWindow, WindowObserver
from lightning_mics.core.log import inform
from lightning_mics.core.masters import rows_of
from lightning_mics.core.mesh import MiCSMesh, communication_device
from lightning_mics.core.slices import is_slice
from lightning_mics.errors import SelfCheckError
from lightning_mics.text import listing


@dataclass(frozen=True)
class _Question:
    """Fingerprints on their way.

    Attributes:
        step: After which optimizer step they were taken.
        read: Waits for them, and returns those of all ranks.
        kept: Memory that is read or written on the way.
    """

    step: int
    read: Callable[[], list[list[int]]]
    kept: Sequence[Any]


@dataclass(frozen=True)
class _Difference:
    """A parameter of which replicas hold different shards.

    Attributes:
        name: Its name.
        ranks: Those that hold this shard.
        source: One of the majority; ``None`` where there is none.
        wrong: Those that differ from the majority; all of them where there is none.
    """

    name: str
    ranks: tuple[int, ...]
    source: int | None
    wrong: tuple[int, ...]

    def __str__(self) -> str:
        if self.source is None:
            return f"{_ranks(self.ranks)} hold different shards of {self.name}, and no majority says which is right"
        right = [rank for rank in self.ranks if rank not in self.wrong]
        verb = "holds" if len(self.wrong) == 1 else "hold"
        return f"{_ranks(self.wrong)} {verb} another shard of {self.name} than {_ranks(right)}, the majority"


@dataclass(frozen=True)
class _Held:
    """Values of which other ranks hold the same.

    Attributes:
        name: What to call them.
        param: Their parameter.
        values: They themselves: a shard, or the float32 rows of one.
        group: Who holds them.
    """

    name: str
    param: nn.Parameter
    values: Tensor
    group: dist.ProcessGroup


class DriftCheck(WindowObserver):
    """Compares the shards of replicas after every N-th optimizer step.

    Args:
        mesh: The groups.
        config: The settings; ``verify_every`` and ``on_mismatch`` count.
    """

    def __init__(self, mesh: MiCSMesh, config: MiCSConfig) -> None:
        assert config.verify_every
        self._groups = [mesh.layout.replication_groups]
        if config.master_weights == "owners" and mesh.instance_group is not None and mesh.instance_group.size() > 1:
            divided = mesh.layout.resolve_optimizer_shard_size(config.optimizer_shard_size)
            self._groups.append(mesh.layout.instance_groups(divided))
        self._mesh, self._every, self._repairs = mesh, config.verify_every, config.on_mismatch == "repair"
        self._step = 0
        self._question: _Question | None = None
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._stream: Any = None

    def after_step(self, window: AccumulationWindow, optimizer: torch.optim.Optimizer, params: set[int]) -> None:
        """Launches the comparison, where it is due."""
        if all(known() is not optimizer for known in self._optimizers):
            self._optimizers = [known for known in self._optimizers if known() is not None]
            self._optimizers.append(weakref.ref(optimizer))
        self._step += 1
        if self._step % self._every == 0:
            self._settle(window)
            self._ask(window)

    def after_window(self, window: AccumulationWindow) -> bool:
        """Returns that it has not seen enough."""
        return False

    def before_forward(self, window: AccumulationWindow) -> None:
        """Repairs before anything is computed from wrong weights."""
        if self._repairs:
            self._settle(window)

    def before_averaging(self, window: AccumulationWindow) -> None:
        """Raises before a replica that differs has part in others' gradients."""
        self._settle(window)

    @torch.no_grad()
    def _ask(self, window: AccumulationWindow) -> None:
        window.restore_rows()
        kinds = self._held(window)
        device = kinds[0][0].values.device
        mine = torch.stack([joint_fingerprint([held.values for held in kind], device) for kind in kinds])
        group = self._mesh.host_group
        everyones = mine.new_empty(group.size() * len(mine))
        if mine.device.type == "cpu":
            work = all_gather_single(everyones, mine, group=group, async_op=True)

            def read() -> list[list[int]]:
                work.wait()
                return everyones.view(-1, len(mine)).t().tolist()

            self._question = _Question(self._step, read, (mine, everyones))
            return
        self._ask_device(mine, everyones)

    def _ask_device(self, mine: Tensor, everyones: Tensor) -> None:
        handle = torch.get_device_module(mine.device.type)
        self._stream = self._stream or handle.Stream()
        self._stream.wait_stream(handle.current_stream())
        with handle.stream(self._stream):
            all_gather_single(everyones, mine, group=self._mesh.host_group, async_op=True).wait()
            answer = torch.empty(everyones.shape, dtype=everyones.dtype, pin_memory=True)
            answer.copy_(everyones, non_blocking=True)
            arrival = self._stream.record_event()

        def read() -> list[list[int]]:
            arrival.synchronize()
            return answer.view(-1, len(mine)).t().tolist()

        self._question = _Question(self._step, read, (mine, everyones, answer))

    def _settle(self, window: AccumulationWindow) -> None:
        """Reads the fingerprints; all ranks see the same ones, and do the same."""
        question, self._question = self._question, None
        if question is None:
            return
        kinds = zip(question.read(), self._groups, strict=True)
        if any(len({prints[rank] for rank in ranks}) > 1 for prints, groups in kinds for ranks in groups):
            self._answer(window, question.step)

    @torch.no_grad()
    def _answer(self, window: AccumulationWindow, step: int) -> None:
        """Names what differs, and repairs it or raises. Collective over the world."""
        kinds = self._held(window)
        found = [(kind[index], differs) for kind in kinds if kind for index, differs in self._differences(kind).items()]
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, [difference for _, difference in found])
        # Those of one shard tell the same.
        differences = list(dict.fromkeys(difference for rank in told for difference in rank))
        if not differences:
            inform(
                f"replicas differed after optimizer step {step}; what was written to them since has made them equal."
            )
            return
        if not self._repairs or any(difference.source is None for difference in differences):
            raise SelfCheckError(self._explain(differences, step))
        for held, difference in found:
            assert difference.source is not None
            self._copy(held, difference.source)
        window.adopt_masters()
        window.reshard()
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        inform(f"after optimizer step {step} {differences[0]}{more}; copied from the majority, with optimizer states.")

    def _held(self, window: AccumulationWindow) -> list[list[_Held]]:
        """Returns what ranks hold in common, on one device: parameters, and what instances of states keep of them."""
        params = [(param.name, param.sharded) for unit in window.units for param in unit.group.params]
        both = [*params, *window.whole.params.items()]
        group, device = self._mesh.replication_group, both[0][1].device
        kinds = [[_Held(name, param, local_tensor(param), group) for name, param in both if param.device == device]]
        if len(self._groups) > 1:
            assert self._mesh.instance_group is not None
            masters = [(name, param, rows_of(param)) for name, param in params]
            kinds.append(
                [
                    _Held(f"the float32 values of {name}", param, local_tensor(rows), self._mesh.instance_group)
                    for name, param, rows in masters
                    if rows is not None
                ]
            )
        return kinds

    def _differences(self, kind: Sequence[_Held]) -> dict[int, _Difference]:
        """Returns what differs in this rank's group, by index. Collective over it."""
        group = kind[0].group
        device = communication_device(self._mesh.device_mesh.device_type)
        mine = fingerprints([held.values for held in kind], device)
        everyones = mine.new_empty(group.size() * len(mine))
        all_gather_single(everyones, mine, group=group)
        rows = everyones.view(group.size(), -1).t().tolist()
        ranks = tuple(dist.get_process_group_ranks(group))
        return {
            index: _difference(held.name, ranks, prints)
            for index, (held, prints) in enumerate(zip(kind, rows, strict=True))
            if len(set(prints)) > 1
        }

    def _copy(self, held: _Held, source: int) -> None:
        """Makes a shard and its optimizer states those of another rank. Collective over its group."""
        for tensor in [held.values, *self._states(held.param)]:
            staged = tensor.to(communication_device(self._mesh.device_mesh.device_type)).contiguous()
            dist.broadcast(staged, src=source, group=held.group)
            tensor.copy_(staged)

    def _states(self, param: nn.Parameter) -> Iterator[Tensor]:
        for known in self._optimizers:
            optimizer = known()
            states: dict[str, Any] = {} if optimizer is None else optimizer.state.get(param, {})
            for name in sorted(states):
                if isinstance(states[name], Tensor) and not is_slice(states[name]):  # that of another is another's
                    yield local_tensor(states[name])

    def _explain(self, differences: Sequence[_Difference], step: int) -> str:
        listed = [f"  {difference}" for difference in differences[:8]]
        more = [f"  ... and {len(differences) - 8} more"] if len(differences) > 8 else []
        if any(difference.source is None for difference in differences):
            last = "With a majority, of three replicas or more, on_mismatch='repair' would copy the right shards."
        else:
            last = "on_mismatch='repair' would copy the right shards and train on."
        return "\n".join(
            [
                f"Replicas have drifted apart after optimizer step {step} (verify_every={self._every}):",
                *listed,
                *more,
                f"Nothing was averaged since. Go on from a checkpoint made before step {step}. A rank that is named "
                f"again has faulty memory, or runs other code than its peers. {last}",
            ]
        )


def _difference(name: str, ranks: tuple[int, ...], prints: Sequence[int]) -> _Difference:
    (most, count), *_ = Counter(prints).most_common(1)
    if 2 * count <= len(prints):
        return _Difference(name, ranks, None, ranks)
    wrong = tuple(rank for rank, value in zip(ranks, prints, strict=True) if value != most)
    return _Difference(name, ranks, ranks[prints.index(most)], wrong)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {listing([*ranks[:8], *(['...'] if ranks[8:] else [])])}"
