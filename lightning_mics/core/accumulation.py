"""The calls around accumulation windows: deferring hop two, closing a window by hand, freeing what is gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from lightning_mics.core.runtime import runtimes_in


@contextmanager
def defer_replication_sync(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Leaves out the all-reduce between replicas in backward passes inside this context.

    Use it for every microstep of an accumulation window but the last. Gradients stay sharded in between.

    Args:
        model: A model sharded by :func:`~lightning_mics.mics_shard`, or a module that contains some.
        enabled: With ``False`` the context does nothing, which saves an ``if`` in loops.

    Raises:
        MiCSError: If the model is not sharded by MiCS.

    Example::

        for index, batch in enumerate(batches):
            with defer_replication_sync(model, enabled=index + 1 < len(batches)):
                (model(batch).loss / len(batches)).backward()
        optimizer.step()
    """
    with ExitStack() as stack:
        for runtime in runtimes_in(model):
            window = runtime.window
            stack.callback(setattr, window, "deferring", window.deferring)
            window.deferring = window.deferring or enabled
        yield


def sync_gradients(model: nn.Module) -> None:
    """Closes an accumulation window by hand, where the last microstep was not known to be the last.

    Collective over the world; does nothing where no gradient waits for it.

    Args:
        model: A model sharded by :func:`~lightning_mics.mics_shard`, or a module that contains some.

    Raises:
        MiCSError: If the model is not sharded by MiCS.
    """
    for runtime in runtimes_in(model):
        runtime.passes.recover()
        if runtime.window.pending:
            runtime.window.synchronize()


def reshard(model: nn.Module) -> None:
    """Frees what forward passes without backward passes left gathered; ``parameters()`` are shards afterwards.

    Raises:
        MiCSError: If the model is not sharded by MiCS.
    """
    for runtime in runtimes_in(model):
        runtime.window.reshard()
