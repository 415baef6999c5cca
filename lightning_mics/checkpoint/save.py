"""Writing checkpoints."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mics.checkpoint import drafts, files, index, ranks, storage
from lightning_mics.checkpoint.background import (
    PendingCheckpoint,
    carry_out,
    host_copies,
    in_flight,
    pickled,
    settle,
    wait_for_checkpoints,
)
from lightning_mics.checkpoint.beside import without_shards
from lightning_mics.checkpoint.each_rank import numbered, states_of_ranks
from lightning_mics.checkpoint.manifest import Facts, Manifest, step_of
from lightning_mics.checkpoint.naming import final_name_in_logs
from lightning_mics.checkpoint.sharing import own_part
from lightning_mics.checkpoint.state import (
    huggingface_metadata,
    is_extra_state,
    model_state,
    optimizer_state,
)
from lightning_mics.checkpoint.writer import NotingFileSystem
from lightning_mics.core._torch import tree_leaves
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.buffers import broadcast_buffers
from lightning_mics.core.runtime import is_sharded, runtime_of
from lightning_mics.errors import CheckpointError


@on_all_ranks("save_checkpoint")
def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    meta: dict[str, Any] | None = None,
    *,
    sharded: bool = True,
    background: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    dataloaders: Any = (),
) -> PendingCheckpoint:
    """Saves a model, its optimizers and anything else. Collective over the world.

    Args:
        path: A folder (sharded) or a file (full), or a URL that fsspec knows, such as ``s3://bucket/run``; an earlier
            checkpoint there is replaced when the new one is whole, and nothing else ever.
        model: A model sharded by :func:`~lightning_mics.mics_shard`, or a plain one.
        optimizers: One or several optimizers over its parameters.
        meta: More to remember, such as the step; anything that ``torch.save`` takes. Rank 0's counts.
        sharded: Whether each rank writes its part of a folder, or rank 0 one whole file.
        background: Whether to return as soon as everything is copied to host memory, and write while training goes
            on. ``None`` for what the model's ``async_checkpoint`` says. It may change at once; what is written is its
            state at the call.
        storage_options: What the file system of a URL takes, such as credentials or an endpoint.
        dataloaders: A loader with ``state_dict``, such as torchdata's ``StatefulDataLoader``, or a list of them. Each
            rank's own state is kept.

    Returns:
        A handle that can wait for the checkpoint. A failure in the background is raised there, or by the next save,
        load or :func:`wait_for_checkpoints`, on every rank.

    Raises:
        CheckpointError: On every rank, if writing failed on any; the previous checkpoint is untouched.
    """
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    loaders = numbered(dataloaders)
    ranks.agree(
        "save_checkpoint",
        path=path,
        sharded=sharded,
        optimizers=len(listed),
        background=background,
        dataloaders=len(loaders),
    )
    target = storage.place(path, storage_options)
    if is_sharded(model):
        broadcast_buffers(model)
    if background is None:
        background = is_sharded(model) and runtime_of(model).config.async_checkpoint
    weights = model_state(model, full=not sharded)
    states = [optimizer_state(model, optimizer, full=not sharded) for optimizer in listed]
    meta = {**(meta or {}), "mics": {**huggingface_metadata(model), **states_of_ranks(loaders)}}
    if sharded:
        named = {f"optimizer_{index}": state for index, state in enumerate(states)}
        return save_sharded(target, {"state_dict": weights, **named}, meta, background=background)
    return save_full(target, {**meta, "state_dict": weights, "optimizer_states": states}, background=background)


@on_all_ranks("save_sharded")
def save_sharded(
    path: str | os.PathLike[str] | storage.Remote,
    state: dict[str, Any],
    meta: dict[str, Any],
    add_files: Callable[[Path], Collection[str]] | None = None,
    *,
    background: bool = False,
) -> PendingCheckpoint:
    """Writes a folder of shards. Collective over the world.

    Each shard is written once, by one of the replicas that hold it.

    Args:
        path: The folder.
        state: Nested dictionaries of tensors; DTensors are written by shard. Of everything else rank 0's counts.
        meta: The rest; rank 0's counts, with shards in it made whole.
        add_files: Writes more files into the folder that it is given, on every rank, before ``state`` is written.
            Returns the keys of ``state`` that need not be written any more; rank 0's count.
        background: Whether to write while training goes on; see :func:`save_checkpoint`.

    Raises:
        CheckpointError: On every rank, if writing failed on any; the previous checkpoint is untouched.
    """
    wait_for_checkpoints()
    ranks.agree("save_sharded", path=path, state=[*state])
    path, meta = storage.place(path), without_shards(meta)
    draft = drafts.begin(path, folder=True)
    with draft.undone_on_error():
        if add_files is not None:
            with final_name_in_logs(draft.local, path):
                done = ranks.together(lambda: add_files(draft.local))[0]
            state = {key: entries for key, entries in state.items() if key not in done}
        added = draft.describe_added()
        meta = _with_extra_states(state, {**meta, "mics": meta.get("mics", {})})
        listing = functools.partial(
            Manifest,
            world_size=ranks.world_size(),
            shard_size=_shard_size(state),
            step=step_of(meta),
            model=_of_model(meta),
        )
        # Buffers may differ between ranks; of what is not sharded rank 0's counts.
        state, rest = own_part(_without_extra_states(state)), cast(Any, meta)
        if background:
            state, rest = ranks.on_each_rank(
                lambda: (host_copies.copy(state), pickled(meta) if ranks.rank() == 0 else None)
            )

    def write() -> None:
        with draft.undone_on_error():
            written = ranks.together(lambda: draft.send(_write(draft.local, state, rest)))
            listed = added | {name: facts for part in written for name, facts in part.items()}
            ranks.on_first_rank(lambda: draft.finish(listing(listed)))
        draft.close()

    return carry_out(path, write, background=background)


@on_all_ranks("save_full")
def save_full(
    path: str | os.PathLike[str] | storage.Remote, checkpoint: dict[str, Any], *, background: bool = False
) -> PendingCheckpoint:
    """Writes one whole file on rank 0. Collective over the world.

    Args:
        path: The file.
        checkpoint: What to write; rank 0's counts, with shards in it made whole.
        background: Whether to write while training goes on; see :func:`save_checkpoint`.

    Raises:
        CheckpointError: On every rank, if writing failed; the previous checkpoint is untouched.
    """
    wait_for_checkpoints()
    ranks.agree("save_full", path=path)
    path = storage.place(path)
    content: Any = without_shards(checkpoint)
    draft = drafts.begin(path, folder=False)
    if background:
        with draft.undone_on_error():
            content = ranks.on_each_rank(lambda: pickled(content) if ranks.rank() == 0 else None)

    def write_file() -> None:
        with draft.local.open("wb") as file:
            _dump(content, file)
            os.fsync(file.fileno())
        draft.finish_file()

    def write() -> None:
        with draft.undone_on_error():
            ranks.on_first_rank(write_file)
        draft.close()

    return carry_out(path, write, background=background)


def save_folder(
    path: str | os.PathLike[str],
    write: Callable[[Path, Path], None],
    *,
    step: int,
    shard_size: int,
    background: bool = False,
) -> PendingCheckpoint:
    """Saves files of other libraries as a checkpoint: checked by a manifest, and named when whole. Collective.

    Args:
        path: The folder; what was there is replaced.
        write: Writes the files, on every rank, into the first folder that it is given, which has the name of ``path``;
            in the background that is on a disk of the machine's own. What it saves by :func:`save_sharded` it puts
            into the second, which all ranks see, in the background as well.
        step: The step of training.
        shard_size: Number of ranks that the model is spread over.
        background: Whether to write to ``path`` while training goes on; see :func:`save_checkpoint`.

    Raises:
        CheckpointError: On every rank, if writing failed on any; what was there is untouched.
    """
    wait_for_checkpoints()
    ranks.agree("save_folder", path=path, background=background)
    path = Path(path)
    draft = drafts.begin(path, folder=True, replaces_all=True, aside=background)
    named, aside = draft.local / path.name, draft.aside / path.name
    with draft.undone_on_error(), final_name_in_logs(aside, path):
        try:
            ranks.on_each_rank(lambda: write(aside, named))
        except CheckpointError:
            settle()  # nobody may write into what is deleted now
            raise
    inside = in_flight()

    def finish() -> None:
        with draft.undone_on_error():
            if inside is not None:
                inside.wait()
            draft.bring()
            seen = ranks.together(lambda: files.names_in(named))
            if any(names != seen[0] for names in seen):
                raise CheckpointError(
                    "not all ranks see the same files in it. Save to an absolute path on storage that all nodes share"
                )
            mine = seen[0][ranks.rank() :: ranks.world_size()]
            described = ranks.together(lambda: files.describe(named, mine))
            listed = {name: facts for part in described for name, facts in part.items()}
            manifest = Manifest(listed, ranks.world_size(), shard_size, step, {})
            ranks.on_first_rank(lambda: _lift(named, draft.local))
            ranks.on_first_rank(lambda: draft.finish(manifest))
        draft.close()

    return carry_out(path, finish, background=background)


def _lift(inner: Path, outer: Path) -> None:
    for entry in list(inner.iterdir()):
        entry.rename(outer / entry.name)
    inner.rmdir()


def _with_extra_states(state: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """Keeps what modules return from ``get_extra_state`` with the rest: DCP would take a dictionary apart."""
    extra = {
        f"{key}.{name}": value
        for key, entries in state.items()
        if isinstance(entries, dict)
        for name, value in entries.items()
        if is_extra_state(name, value)
    }
    return {**meta, "mics": {**meta.get("mics", {}), "extra_states": extra}} if extra else meta


def _without_extra_states(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: {name: value for name, value in entries.items() if not is_extra_state(name, value)}
        if isinstance(entries, dict)
        else entries
        for key, entries in state.items()
    }


def _dump(content: Any, stream: Any) -> None:
    """Writes an object as ``torch.save`` does, which may have been done already."""
    if isinstance(content, memoryview):
        stream.write(content)
    else:
        torch.save(content, stream)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which says in the index that the save returns where everything is.

    Some versions of PyTorch (2.11) say so only in a copy of it.
    """

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {part.index: part.storage_data for parts in results for part in parts}
        super().finish(metadata, results)


def _write(temporary: Path, state: dict[str, Any], rest: Any) -> dict[str, Facts]:
    """Writes this rank's shards and, on rank 0, the rest. Returns what was written."""
    writer = _Writer(temporary, sync_files=True)
    writer.fs = noting = NotingFileSystem()
    alone = not ranks.is_distributed()
    with ranks.quiet_dcp(alone):
        metadata = dcp.save(state, storage_writer=writer, no_dist=alone, process_group=ranks.meeting_place())
    if ranks.rank() == 0:
        with noting.create_stream(temporary / index.NAME, "wb") as stream:
            stream.write(index.encode(metadata).encode())
            os.fsync(stream.fileno())
        with noting.create_stream(temporary / files.META, "wb") as stream:
            _dump(rest, stream)
            os.fsync(stream.fileno())
    return noting.written


def _shard_size(state: dict[str, Any]) -> int | None:
    return next((leaf.device_mesh.shape[0] for leaf in tree_leaves(state) if isinstance(leaf, DTensor)), None)


def _of_model(meta: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in meta["mics"].items() if isinstance(value, str)}
