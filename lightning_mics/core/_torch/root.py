"""What FSDP2 keeps for a root module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from lightning_mics.core._needs import gone, require
from lightning_mics.core._torch.modules import current_backward_id, outside_graphs
from lightning_mics.core._torch.units import unit_param_groups

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_state
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
except ImportError as error:
    raise gone(error) from error

require(
    _fsdp_state.FSDPState,
    *("_pre_forward", "_post_forward", "_pre_backward", "_pre_forward_hook_handle", "_post_forward_hook_handle"),
    *("_is_root", "_state_ctx", "_comm_ctx", "_modules", "_register_root_post_backward_final_callback"),
    "_root_post_backward_final_callback",
)
require(_fsdp_state.FSDPStateContext, "all_states", "iter_forward_root", "post_backward_final_callback_queued")


# What FSDP2 hangs on a module: with its groups and hooks it leads to everything.
FSDPState = _fsdp_state.FSDPState


class ForwardHooks(NamedTuple):
    """What runs before and after a forward pass of an FSDP module."""

    before: Callable[..., Any]
    after: Callable[..., Any]


class RootState:
    """The state that FSDP2 keeps for a root module, and its hooks around the root's passes.

    Attributes:
        hooks: FSDP2's own hooks around the forward pass.
        pre_backward: FSDP2's own hook on gradients of the root's outputs.
    """

    def __init__(self, root: nn.Module) -> None:
        assert isinstance(root, FSDPModule)
        self._root: Any = root
        self._state: Any = root._get_fsdp_state()
        self.hooks = ForwardHooks(self._state._pre_forward, self._state._post_forward)
        self.pre_backward: Callable[[Tensor], Tensor] = self._state._pre_backward

    def replace_hooks(
        self, forward: ForwardHooks, method: ForwardHooks, pre_backward: Callable[[Tensor], Tensor]
    ) -> None:
        """Puts others in the place of FSDP2's hooks: around ``forward``, around registered methods, and in backward."""
        state, root = self._state, self._root
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        before, after = map(outside_graphs, forward)
        state._pre_forward_hook_handle = root.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        state._post_forward_hook_handle = root.register_forward_hook(after, prepend=False)
        # Methods of ``register_fsdp_forward_method`` look these up.
        state._pre_forward, state._post_forward, state._pre_backward = map(outside_graphs, (*method, pre_backward))

    @property
    def has_failed(self) -> bool:
        """Whether an exception ended a pass: outside of passes nothing of theirs is left."""
        context = self._state._state_ctx
        is_left = context.iter_forward_root is not None or context.post_backward_final_callback_queued
        return bool(self._state._is_root and is_left and current_backward_id() == -1)

    def reset(self) -> None:
        """Lets FSDP2 start afresh after a pass that failed; sharded gradients of the passes before it stay."""
        shards = [param.sharded_param for group in _groups_under(self._state) for param in group.fsdp_params]
        gradients = [shard.grad for shard in shards]
        reset: Callable[[], None] | None = getattr(self._root, "reset_iter_state", None)
        if reset is None:  # torch < 2.13
            _reset_iter_state(self._state)
        else:
            reset()
        for shard, gradient in zip(shards, gradients, strict=True):
            shard.grad = gradient  # torch 2.15 drops it

    def queue_end_of_backward(self) -> None:
        """Makes FSDP2 end the backward pass in progress, as its own hooks do: nothing if one has."""
        if self._state._is_root:
            self._state._register_root_post_backward_final_callback()

    def go_on_after(self, is_nested: Callable[[], bool]) -> None:
        """Lets a forward pass go on after a backward pass inside of it, where ``is_nested`` says that it was one.

        FSDP2 takes the end of a backward pass for that of all passes.
        """
        modules: list[Any] = [module for module in self._root.modules() if isinstance(module, FSDPModule)]
        units = [group for module in modules for group in unit_param_groups(module)]
        for state in {module._get_fsdp_state() for module in modules}:
            end = functools.partial(
                _end_of_backward, state._root_post_backward_final_callback, self._state, units, is_nested
            )
            state._root_post_backward_final_callback = end

    def expect_backward(self) -> None:
        """Lets FSDP2 end the backward pass in progress, maybe before any forward pass, which makes its streams."""
        self.begin()
        self.queue_end_of_backward()

    def begin(self) -> None:
        """Makes what FSDP2 makes in the first forward pass: its streams, and who is the root."""
        self._state._lazy_init()

    def reshard(self) -> None:
        """Frees the root's own parameters."""
        self._root.reshard()


def _end_of_backward(end: Callable[[], None], root: Any, units: list[Any], is_nested: Callable[[], bool]) -> None:
    context = root._state_ctx
    for unit in units:
        # With several passes through a unit that recomputes, the last may come after FSDP2's last hop one.
        if unit._group._training_state is TrainingState.POST_BACKWARD and unit.holds_unreduced:
            unit._group._training_state = TrainingState.IDLE
    forward_root = context.iter_forward_root
    if forward_root is None or not is_nested():
        end()
        return
    holders = [holder for state in context.all_states for holder in (state, *_groups_of(state))]
    running = [holder for holder in holders if holder._training_state is TrainingState.FORWARD]
    end()
    for holder in running:
        holder._training_state = TrainingState.FORWARD
    context.iter_forward_root = forward_root


def _groups_of(state: Any) -> list[Any]:
    return [unit._group for unit in unit_param_groups(state._modules[0])]


def _groups_under(root: Any) -> list[Any]:
    """Returns the parameter groups of all units under the state of a root that has run."""
    return [group for state in root._state_ctx.all_states for group in _groups_of(state)]


def _reset_iter_state(root: Any) -> None:
    """Waits for what a failed pass left under way, and forgets it, as ``reset_iter_state`` does in torch 2.13."""
    streams, shared, stream = root._comm_ctx, root._state_ctx, root._device_handle.current_stream()
    groups = _groups_under(root)
    pending = [streams.all_gather_state, streams.reduce_scatter_state, *(group._all_reduce_state for group in groups)]
    events = [state.event for state in pending if state is not None]
    for group in groups:
        events += [group._post_reduce_event, getattr(group._all_gather_result, "all_gather_event", None)]
        if isinstance(work := getattr(group._all_gather_result, "all_gather_work", None), dist.Work):
            work.wait()
    for event in filter(None, events):
        stream.wait_event(event)
    streams.all_gather_state = streams.reduce_scatter_state = shared.iter_forward_root = None
    shared.post_backward_final_callback_queued = False
    streams.post_forward_order.clear()
    for state in shared.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = type(state._training_state).IDLE
    for group in groups:
        group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
        group._reshard_after_forward_event = group._partial_reduce_output = None
        group._post_forward_indices.clear()
        group._training_state = type(group._training_state).IDLE
        group._to_sharded()
