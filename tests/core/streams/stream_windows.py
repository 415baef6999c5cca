"""Accumulation windows of every kind, and the configurations in which they run.

To add one, write a function of a :class:`Run` and list it in ``WINDOWS``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from stream_checker import StreamChecker
from stream_clocks import Settings, Stream
from stream_world import pretended_device
from torch import Tensor, nn

from lightning_mics import MiCSConfig, clip_grad_norm_, defer_replication_sync, mics_shard, sync_gradients

_WIDTH = 16


class Block(nn.Module):
    """One unit of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.down(nn.functional.gelu(self.up(inputs))))


class PlannedError(Exception):
    """Ends a pass that is to fail."""


class Net(nn.Module):
    """Three blocks, of which a forward pass can leave out some or fail at one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, inputs: Tensor, skip: Iterable[int] = (), fail_at: int | None = None) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index == fail_at:
                raise PlannedError
            if index not in skip:
                inputs = inputs + block(inputs)
        return self.head(inputs)


class _FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise PlannedError


@dataclass(frozen=True)
class Configuration:
    """How a model is sharded.

    Attributes:
        settings: Arguments of :class:`~lightning_mics.MiCSConfig`.
        dtype: Dtype of the parameters.
        world_size: Ranks of the world.
        rank: The one that runs.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    world_size: int = 4
    rank: int = 1


_TWO_STAGES = {"shard_size": 4, "hierarchical": True}
_EXACT = {"reduce_dtype": "float32"}
CONFIGURATIONS = {
    "flat": Configuration(),
    "hierarchical": Configuration(_TWO_STAGES, world_size=8, rank=5),
    "mixed bf16": Configuration({"param_dtype": "bfloat16", "reduce_dtype": "float32"}),
    "p=1": Configuration({"shard_size": 1}),
    "bf16 parameters": Configuration(_EXACT, torch.bfloat16),
    "bf16 parameters, hierarchical": Configuration({**_TWO_STAGES, **_EXACT}, torch.bfloat16, world_size=8, rank=5),
    "offload": Configuration({"cpu_offload": True}),
    "bf16 parameters, offload": Configuration({**_EXACT, "cpu_offload": True}, torch.bfloat16),
}

Edit = Callable[["Run"], object]


class Run:
    """A sharded model in training.

    Args:
        configuration: How it is sharded.
        settings: More arguments of its config.
    """

    def __init__(self, configuration: Configuration, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model = Net().to(configuration.dtype)
        defaults: dict[str, Any] = {"shard_size": 2, "node_size": 2, "wrap": ["Block"], "verify": False}
        mics_shard(self.model, MiCSConfig(**{**defaults, **configuration.settings, **settings}), device_type="cuda")
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), foreach=True)
        self._dtype = configuration.dtype
        self.other: Run | None = None

    @property
    def discriminator(self) -> Run:
        """The second model of a window that has two."""
        assert self.other is not None
        return self.other

    @property
    def blocks(self) -> list[Any]:
        """The units but for the root."""
        return list(self.model.blocks)

    def inputs(self) -> Tensor:
        """Returns a batch."""
        return torch.randn(4, _WIDTH, dtype=self._dtype, device="cuda")

    def loss(self, **kwargs: Any) -> Tensor:
        """Runs a forward pass."""
        return self.model(self.inputs(), **kwargs).square().mean()

    def microstep(self, *, defer: bool = True, **kwargs: Any) -> None:
        """Runs a forward and a backward pass."""
        with defer_replication_sync(self.model, enabled=defer):
            self.loss(**kwargs).backward()

    def failing_backward(self, *, defer: bool = True) -> None:
        """Runs a microstep whose backward pass fails in the first block."""
        hook = self.blocks[0].register_forward_hook(lambda module, args, output: _FailInBackward.apply(output))
        with contextlib.suppress(PlannedError):
            self.microstep(defer=defer)
        hook.remove()

    def step(self, *, set_to_none: bool = True) -> None:
        """Takes an optimizer step and clears the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def window(
        self,
        microsteps: int = 3,
        *,
        between: Edit | None = None,
        before_sync: Edit | None = None,
        before_step: Edit | None = None,
        by_hand: bool = False,
        set_to_none: bool = True,
        **kwargs: Any,
    ) -> None:
        """Runs a whole window.

        Args:
            microsteps: How many.
            between: Called after each microstep but the last.
            before_sync: Called before ``sync_gradients``.
            before_step: Called before the optimizer's step.
            by_hand: Whether ``sync_gradients`` ends the window, and not its last backward pass.
            set_to_none: Whether gradients are cleared or zeroed.
            kwargs: Arguments of the model.
        """
        for index in range(microsteps):
            is_last = index + 1 == microsteps
            self.microstep(defer=by_hand or not is_last, **kwargs)
            if between is not None and not is_last:
                between(self)
        if by_hand:
            if before_sync is not None:
                before_sync(self)
            sync_gradients(self.model)
        if before_step is not None:
            before_step(self)
        self.step(set_to_none=set_to_none)


@dataclass(frozen=True)
class Window:
    """A kind of window.

    Attributes:
        body: Runs a few of them.
        settings: More arguments of the model's config.
        on_side_stream: Whether another stream than the default one is current.
        peers_used_all: Whether other ranks used every unit, and want all of them reduced again.
        has_two_models: Whether there is a second model.
    """

    body: Callable[[Run], object]
    settings: dict[str, Any] = field(default_factory=dict)
    on_side_stream: bool = False
    peers_used_all: bool = False
    has_two_models: bool = False

    def run(
        self, configuration: Configuration, settings: Settings | None = None, *, has_gloo: bool = False
    ) -> StreamChecker:
        """Runs it, with groups that carry CPU tensors or without; returns the checker with what it found."""
        num_replicas = configuration.world_size // configuration.settings.get("shard_size", 2)

        def say_used(message: Tensor) -> None:
            message[: -8 * (num_replicas + 2)] = 1  # then the order of each replica's collectives, writes and hooks

        peers = say_used if self.peers_used_all else None
        world = (configuration.world_size, configuration.rank)
        has_gloo = has_gloo or bool(configuration.settings.get("cpu_offload"))
        with pretended_device(*world, settings, peers, has_gloo) as checker:
            run = Run(configuration, self.settings)
            run.other = Run(configuration, self.settings) if self.has_two_models else None
            stream = Stream(checker.timeline, "side") if self.on_side_stream else None
            with checker, checker.timeline.use(stream):
                self.body(run)
            return checker


def _repeat(count: int = 2, **kwargs: Any) -> Callable[[Run], object]:
    def body(run: Run) -> None:
        for _ in range(count):
            run.window(**kwargs)

    return body


# --- what users do to gradients


def _grads(run: Run) -> Iterator[nn.Parameter]:
    return (param for param in run.model.parameters() if param.grad is not None)


def scale(run: Run) -> None:
    """Scales gradients in place."""
    for param in _grads(run):
        param.grad.mul_(0.5)


def replace(run: Run) -> None:
    """Puts other tensors in the place of gradients."""
    for param in _grads(run):
        param.grad = param.grad * 2


def drop_some(run: Run) -> None:
    """Drops every other gradient."""
    for param in list(run.model.parameters())[1::2]:
        param.grad = None


def _clip(run: Run) -> None:
    clip_grad_norm_(run.model, 0.01)


def _clip_and_read(run: Run) -> None:
    clip_grad_norm_(run.model, 0.01).item()


# --- windows


def _unused_alternating(run: Run) -> None:
    for index in range(4):
        run.window(2, skip=(index % 3,))


def _unused_here_only(run: Run) -> None:
    for index in range(4):
        run.window(2, skip=(index % 3,), by_hand=bool(index % 2))


def _partly_unused(run: Run) -> None:
    for index in range(3):
        run.microstep(skip=(index % 3,))
        run.microstep(defer=False)
        run.step()


def _second_backward(run: Run) -> None:
    for _ in range(2):
        run.microstep()
        run.microstep(defer=False)
        run.microstep(defer=False)
        run.step()


def _second_backward_edited(run: Run) -> None:
    for _ in range(2):
        run.microstep(defer=False)
        scale(run)
        run.microstep(defer=False)
        replace(run)
        run.microstep(defer=False)
        run.step()


def _two_forwards(run: Run) -> None:
    for _ in range(2):
        run.microstep()
        (run.loss() + run.loss()).backward()
        run.step()


def _failed_forward(run: Run) -> None:
    for index in range(3):
        run.microstep()
        with contextlib.suppress(PlannedError):
            run.loss(fail_at=1)
        if index == 1:
            run.optimizer.zero_grad()
        run.window(2)


def _failed_backward(*, defer: bool, then: Edit | None = None) -> Callable[[Run], object]:
    def body(run: Run) -> None:
        for index in range(3):
            run.microstep()
            run.failing_backward(defer=defer)
            if then is not None:
                then(run)
            if index == 1:
                run.optimizer.zero_grad()
            run.window(2)

    return body


def _failed_backward_then_forward(run: Run) -> None:
    for _ in range(2):
        run.microstep()
        run.failing_backward()
        loss = run.loss()
        scale(run)
        loss.backward()
        run.step()


def _failed_first_backward(run: Run) -> None:
    for _ in range(2):
        run.failing_backward()
        scale(run)
        run.window(2)


def _no_backward(run: Run) -> None:
    for _ in range(2):
        run.window()
        with torch.no_grad():
            run.loss()
        run.loss()


def _evaluated_before_step(run: Run, *, is_async: bool = False) -> None:
    run.model._set_unshard_async_op(is_async)
    for _ in range(2):
        run.microstep(defer=False)
        with torch.no_grad():
            run.loss()
        run.step()


def _zeroed_in_between(run: Run) -> None:
    for _ in range(2):
        run.microstep()
        run.optimizer.zero_grad()
        run.window()


def _frozen_and_thawed(run: Run) -> None:
    for index in range(3):
        for microstep in range(3):
            run.blocks[index].requires_grad_(microstep != 1)
            run.microstep(defer=microstep < 2)
        run.model.requires_grad_(True)
        run.step()


def _prefetching(run: Run) -> None:
    for first, second in zip(run.blocks, run.blocks[1:], strict=False):
        first.set_modules_to_forward_prefetch([second])
        second.set_modules_to_backward_prefetch([first])
    _repeat()(run)


def _asynchronous_gathers(run: Run) -> None:
    run.model._set_unshard_async_op(True)
    _repeat()(run)


def _adversaries(run: Run) -> None:
    for _ in range(2):
        with torch.no_grad():
            made = run.model(run.inputs())
        for index in range(2):
            with defer_replication_sync(run.discriminator.model, enabled=index == 0):
                run.discriminator.model(made).square().mean().backward()
        run.discriminator.step()
        run.discriminator.model.requires_grad_(False)
        for index in range(2):
            with defer_replication_sync(run.model, enabled=index == 0):
                run.discriminator.model(run.model(run.inputs())).square().mean().backward()
        run.step()
        run.discriminator.model.requires_grad_(True)


def _through_both(run: Run) -> None:
    both = nn.ModuleList([run.model, run.discriminator.model])
    for _ in range(2):
        for index in range(2):
            with defer_replication_sync(both, enabled=index == 0):
                run.discriminator.model(run.model(run.inputs())).square().mean().backward()
        clip_grad_norm_(both, 0.01)
        run.step()
        run.discriminator.step()


def _interleaved(run: Run) -> None:
    for _ in range(2):
        run.microstep()
        run.discriminator.microstep()
        scale(run)
        run.microstep(defer=False)
        run.discriminator.microstep()
        replace(run.discriminator)
        run.step()
        sync_gradients(run.discriminator.model)
        run.discriminator.step()


def _failed_beside(run: Run) -> None:
    for _ in range(2):
        run.microstep()
        run.discriminator.failing_backward()
        run.microstep(defer=False)
        scale(run.discriminator)
        run.step()
        run.discriminator.window(2)


def send_objects(run: Run) -> None:
    """Lets ranks tell each other of gradients, as objects and as tensors."""
    values, gathered = [{"step": 1}], [None] * dist.get_world_size()
    dist.broadcast_object_list(values, src=0)
    dist.all_gather_object(gathered, [param.grad is None for param in run.model.parameters()])
    for param in list(_grads(run))[:2]:
        grad = param.grad.to_local()
        copy = grad.clone()
        work = dist.broadcast(copy, src=0, async_op=True)
        dist.all_reduce(grad, op=dist.ReduceOp.MAX)
        work.wait()
        grad.mul_(0.5).add_(copy)


def _adam(**kwargs: Any) -> Callable[[Run], object]:
    def body(run: Run) -> None:
        run.optimizer = torch.optim.AdamW(run.model.parameters(), **kwargs)
        _repeat(3)(run)

    return body


def _penalised(run: Run) -> None:
    """A penalty on shards that was built before the forward pass reaches gradients while others are reduced."""
    for _ in range(2):
        for index in range(3):
            with defer_replication_sync(run.model, enabled=index < 2):
                shards = [param.to_local() for param in run.model.parameters()]
                penalties = [shard.float().square().sum() for shard in shards]
                value = run.loss()
                torch.autograd.backward([*penalties, value])
        run.step()


WINDOWS = {
    "penalty on shards": Window(_penalised),
    "accumulation": Window(_repeat(3)),
    "one microstep": Window(_repeat(3, microsteps=1)),
    "by hand": Window(_repeat(by_hand=True)),
    "unused unit": Window(_repeat(skip=(1,))),
    "unused unit, by hand": Window(_repeat(skip=(1,), by_hand=True)),
    "unused units, alternating": Window(_unused_alternating),
    "unused on this rank only": Window(_unused_here_only, peers_used_all=True),
    "unused in one microstep": Window(_partly_unused),
    "clipped": Window(_repeat(before_step=_clip)),
    "clipped, norm read": Window(_repeat(before_step=_clip_and_read)),
    "second backward pass": Window(_second_backward),
    "second backward pass, edited": Window(_second_backward_edited),
    "two forward passes, one backward pass": Window(_two_forwards),
    "scaled before sync": Window(_repeat(by_hand=True, before_sync=scale)),
    "replaced before sync": Window(_repeat(by_hand=True, before_sync=replace)),
    "some dropped before sync": Window(_repeat(by_hand=True, before_sync=drop_some)),
    "scaled between microsteps": Window(_repeat(between=scale)),
    "replaced between microsteps": Window(_repeat(between=replace)),
    "some dropped between microsteps": Window(_repeat(between=drop_some)),
    "scaled everywhere": Window(_repeat(by_hand=True, between=scale, before_sync=scale)),
    "replaced everywhere": Window(_repeat(by_hand=True, between=replace, before_sync=replace)),
    "failed forward pass": Window(_failed_forward),
    "failed backward pass": Window(_failed_backward(defer=True)),
    "failed backward pass, syncing": Window(_failed_backward(defer=False)),
    "failed backward pass, scaled": Window(_failed_backward(defer=True, then=scale)),
    "failed backward pass, syncing, scaled": Window(_failed_backward(defer=False, then=scale)),
    "failed backward pass, replaced": Window(_failed_backward(defer=True, then=replace)),
    "failed first backward pass, scaled": Window(_failed_first_backward),
    "failed backward pass, forward, scaled": Window(_failed_backward_then_forward),
    "no backward pass": Window(_no_backward),
    "evaluated before a step": Window(_evaluated_before_step),
    "evaluated before a step, asynchronous gathers": Window(functools.partial(_evaluated_before_step, is_async=True)),
    "zeroed gradients": Window(_repeat(3, set_to_none=False)),
    "zeroed in the window": Window(_zeroed_in_between),
    "frozen and thawed": Window(_frozen_and_thawed),
    "prefetching": Window(_prefetching),
    "asynchronous gathers": Window(_asynchronous_gathers),
    "activation checkpointing": Window(_repeat(), {"activation_checkpointing": True}),
    "activation checkpointing, offloaded": Window(
        _repeat(), {"activation_checkpointing": True, "activation_checkpointing_offload": True}
    ),
    "not resharded after forward": Window(_repeat(), {"reshard_after_forward": False}),
    "another current stream": Window(_repeat(), on_side_stream=True),
    "adversaries": Window(_adversaries, has_two_models=True),
    "one loss of two models": Window(_through_both, has_two_models=True),
    "two models by turns": Window(_interleaved, has_two_models=True),
    "two models, one fails": Window(_failed_beside, has_two_models=True),
    "objects between microsteps": Window(_repeat(between=send_objects)),
    "objects before sync": Window(_repeat(by_hand=True, before_sync=send_objects)),
    "single-tensor Adam": Window(_adam(foreach=False)),
    "fused Adam": Window(_adam(fused=True)),
    "verify_every": Window(_repeat(3), {"verify_every": 1}),
    "verify_every, repair": Window(_repeat(3), {"verify_every": 1, "on_mismatch": "repair"}),
    "self-check": Window(_repeat(), {"verify": True}),
    "self-check, replaced before sync": Window(_repeat(by_hand=True, before_sync=replace), {"verify": True}),
}
