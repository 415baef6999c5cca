"""The root's passes: where a forward pass begins and ends, also through registered methods, and after one that failed.

What FSDP2 alone does not do:

- A registered forward method may call ``forward``, as a ``training_step`` does. The end of the inner call is not the
  end of the pass.
- Without a backward pass to come the root is freed, which saves memory.
- After an exception in a pass FSDP2 starts afresh only when told to.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mics.core._torch import ForwardHooks, RootState, current_backward_id, outside_graphs
from lightning_mics.core.cpu.prefetch import ForwardPrefetch
from lightning_mics.core.gradients.window import AccumulationWindow
from lightning_mics.core.parameters import Parameters
from lightning_mics.errors import MiCSError

_Kind = Literal["forward", "method"]


@dataclass(eq=False)
class _Call:
    """A call of the root that is running.

    Attributes:
        kind: Whether it is ``forward``, or a registered method.
        tells: Whether it tells of its end, however that comes. Calls inside of one that does belong to its pass.
        thread: The one that runs it.
        has_output: Whether it came to its end without an exception.
    """

    kind: _Kind
    tells: bool
    thread: threading.Thread = field(default_factory=threading.current_thread)
    has_output: bool = False

    @property
    def is_mine(self) -> bool:
        """Whether the current thread runs it, or nobody any more."""
        return self.thread is threading.current_thread() or not self.thread.is_alive()


class RootPasses:
    """Watches the forward and backward passes of a root module.

    ``forward`` tells of its end by a hook that PyTorch calls after exceptions, too (but not after an interrupt),
    methods that :meth:`telling` wraps by themselves. Other registered methods do so only if they do not raise: calls
    inside of them are left to FSDP2. Calls of which nobody hears any more are taken for over at the next call of their
    kind, and when a backward pass begins.

    Args:
        root: The root FSDP module.
        window: Its gradients.
        prefetch: What gathers ahead in forward passes, where anything does.
        parameters: Its parameters, which are shards again when a pass has ended.
    """

    def __init__(
        self, root: nn.Module, window: AccumulationWindow, prefetch: ForwardPrefetch | None, parameters: Parameters
    ) -> None:
        self._window, self._prefetch, self._held = window, prefetch, parameters
        self._running: list[_Call] = []
        self._state = RootState(root)
        self._fsdp = self._state.hooks
        self._state.replace_hooks(self._hooks("forward"), self._hooks("method"), self._begin_backward)
        window.before_backward = self._state.queue_end_of_backward
        self._state.go_on_after(lambda: not window.adds_gradients)
        root.register_forward_hook(outside_graphs(self._after_forward), always_call=True)

    def _hooks(self, kind: _Kind) -> ForwardHooks:
        return ForwardHooks(functools.partial(self._enter, kind), functools.partial(self._leave, kind))

    def _enter(self, kind: _Kind, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refuse_other_threads()
        self._drop_unheard(kind)
        self.recover()
        is_inner = _tells(self._running)
        self._running.append(_Call(kind, tells=kind == "forward"))
        if is_inner:
            self._held.share_requires_grad()
            return args, kwargs
        self._held.begin_use()
        self._window.begin_forward(module.training)
        if self._prefetch is not None:
            self._prefetch.forward_begins()
        return self._fsdp.before(module, args, kwargs)

    def _refuse_other_threads(self) -> None:
        if not all(call.is_mine for call in self._running):
            caller, other = threading.current_thread().name, self._running[-1].thread.name
            raise MiCSError(
                f"{caller} called the model while {other} runs a forward pass of it. Passes of one model gather into "
                "the same memory: let threads take turns, with a lock around each."
            )

    def recover(self) -> None:
        """Starts afresh after a pass that failed, and frees what that left."""
        if not self._running and self._state.has_failed:
            self._state.reset()
            self._window.abandon()

    def _free(self) -> None:
        """Recovers while the error of the pass is on its way up, which a lost connection to a peer must not hide."""
        with suppress(RuntimeError):  # the next pass tries again
            self.recover()

    def _drop_unheard(self, kind: _Kind) -> None:
        """Drops a call that an interrupt, or an exception in a method that does not tell, has ended.

        A root's ``forward`` does not call itself; calls inside of a method that does not tell are passes of their own.
        """
        is_over = kind == "forward" or (bool(self._running) and not self._running[-1].tells)
        if is_over and self._is_innermost(kind) and current_backward_id() == -1:
            self._running = self._running[:-1]

    def _leave(self, kind: _Kind, module: nn.Module, args: Any, output: Any) -> Any:
        outer = self._running
        if self._is_innermost(kind):
            self._running[-1].has_output, outer = True, self._running[:-1]
        if kind == "method":
            self._running = outer
        if _tells(outer):
            return output
        output = self._fsdp.after(module, args, output)
        if self._prefetch is not None:
            self._prefetch.forward_ended()
        if not outer:
            if not torch.is_grad_enabled():
                self._state.reshard()
            self._held.end_pass()
        return output

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Ends a call of ``forward``, also one that raised; its memory is wanted by who catches the error."""
        if self._is_innermost("forward") and self._running[-1].is_mine:
            *self._running, call = self._running
            if not call.has_output:
                self._free()

    def telling(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a method that tells of its end; it is to be registered as a forward method afterwards."""

        @functools.wraps(method)
        def told(*args: Any, **kwargs: Any) -> Any:
            call = self._running[-1] if self._is_innermost("method") else None
            if call is not None:
                call.tells = True
            try:
                return method(*args, **kwargs)
            except BaseException:
                if call in self._running:
                    self._running = self._running[: self._running.index(call)]
                    self._free()
                raise

        return told

    def _is_innermost(self, kind: _Kind) -> bool:
        return bool(self._running) and self._running[-1].kind == kind

    def begin_backward_outside(self) -> None:
        """A backward pass has come to a parameter that is not sharded, maybe before any forward pass of the root."""
        self._state.expect_backward()
        self._window.begin_backward()

    def expect_gathers(self) -> None:
        """Gathers of units come, maybe before any forward pass of the root."""
        self.recover()
        self._state.begin()

    def _begin_backward(self, grad: Tensor) -> Tensor:
        self._running = [call for call in self._running if call.tells]
        grad = self._state.pre_backward(grad)
        self._window.begin_backward()
        return grad


def _tells(calls: list[_Call]) -> bool:
    return bool(calls) and calls[-1].tells
