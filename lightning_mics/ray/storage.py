"""Checkpoints in Ray's storage: written there by all ranks, not copied to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray.train
from pyarrow.fs import FileSystem

from lightning_mics import checkpoint as checkpoints
from lightning_mics.checkpoint import ranks
from lightning_mics.errors import CheckpointError, MiCSError

_SCHEMES = {"local": "", "s3": "s3://", "gcs": "gs://", "abfs": "abfs://"}


def report(metrics: dict[str, Any], save: Callable[[str], object] | None = None) -> None:
    """Reports metrics to Ray, and a checkpoint, if one is to be saved. Collective over the world.

    The checkpoint is saved in Ray's storage (``RunConfig(storage_path=...)``) by all ranks, each its part, and reported
    when it is whole. Ray lists it, deletes it (``CheckpointConfig``) and hands it to workers that it starts again.

    Args:
        metrics: Plain numbers and words; rank 0's count.
        save: Saves a checkpoint to the path or URL that it is given, on every rank: ``accelerator.save_state``,
            ``trainer.save_checkpoint``, or a function that calls :func:`~lightning_mics.save_checkpoint`.

    Raises:
        CheckpointError: On every rank, if saving failed on any.

    Example::

        report({"loss": loss}, lambda path: save_checkpoint(path, model, optimizer, meta={"step": step}))
    """
    if save is None:
        ray.train.report(metrics)
        return
    storage = ray.train.get_context().get_storage()
    name = str(ranks.on_first_rank(storage.make_default_checkpoint_dir_name))
    save(run_path(name))
    checkpoints.wait_for_checkpoints()
    place = storage.build_checkpoint_path_from_name(name)
    report_saved(metrics, ray.train.Checkpoint(place, storage.storage_filesystem))


def report_saved(metrics: dict[str, Any], checkpoint: ray.train.Checkpoint) -> None:
    """Reports a checkpoint that lies in Ray's storage already.

    Raises:
        MiCSError: If Ray would copy it.
    """
    modes = getattr(ray.train, "CheckpointUploadMode", None)
    if modes is None:
        raise MiCSError(
            f"Ray {ray.__version__} copies what is reported, so that ranks would copy each other's shards. Use the "
            "second version of Ray Train: ray>=2.60 without RAY_TRAIN_V2_ENABLED=0."
        )
    ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=modes.NO_UPLOAD)


def last_checkpoint() -> str | None:
    """Returns the path or URL of the checkpoint that was reported last, also by workers before these; or ``None``.

    Everything that loads takes it: ``load_checkpoint``, ``accelerator.load_state``, ``fit(ckpt_path=...)``,
    ``train(resume_from_checkpoint=...)``.
    """
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else path_of(checkpoint)


def run_path(name: str) -> str:
    """Returns the path or URL of something of this run in Ray's storage, equal on all ranks."""
    storage = ray.train.get_context().get_storage()
    return _path(storage.storage_filesystem, storage.build_checkpoint_path_from_name(name))


def path_of(checkpoint: ray.train.Checkpoint) -> str:
    """Returns the path or URL of a checkpoint, such as ``trainer.fit().checkpoint``.

    Raises:
        CheckpointError: If Ray's storage has no name that others could use.
    """
    return _path(checkpoint.filesystem, checkpoint.path)


def _path(filesystem: FileSystem, path: str) -> str:
    kind = filesystem.type_name
    if kind in _SCHEMES:
        return _SCHEMES[kind] + path
    inner = getattr(getattr(filesystem, "handler", None), "fs", None)  # of fsspec
    if inner is None:
        raise CheckpointError(
            f"Ray's storage of kind {kind!r} has no URL. Use RunConfig(storage_path=...) with a folder that all nodes "
            "share, s3://, gs://, abfs://, or a storage_filesystem= that wraps one of fsspec."
        )
    return str(inner.unstrip_protocol(path))
