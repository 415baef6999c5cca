"""ModelCheckpoint beside a checkpoint that is still being written, and one of object storage."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import lightning.pytorch.callbacks.model_checkpoint as model_checkpoint
import lightning.pytorch.trainer.connectors.checkpoint_connector as connector
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mics import checkpoint as checkpoints
from lightning_mics.checkpoint.manifest import MANIFEST


def expect_late_checkpoints(callback: Any) -> None:
    """Has ModelCheckpoint take the name of a checkpoint that is not there yet for taken, and link to it when it is."""
    if isinstance(callback, ModelCheckpoint):
        callback.file_exists = MethodType(_exists_or_will, callback)  # type: ignore[method-assign]
        callback._link_checkpoint = _link_checkpoint  # type: ignore[method-assign]


def _exists_or_will(self: ModelCheckpoint, filepath: Any, trainer: pl.Trainer) -> bool:
    return checkpoints.was_saved_last(filepath) or ModelCheckpoint.file_exists(self, filepath, trainer)


def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
    if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
        checkpoints.afterwards(lambda: _link(filepath, linkpath))
    trainer.strategy.barrier()


def _link(target: str, link: str) -> None:
    """Makes a link, in the place of an earlier one in one step."""
    if os.path.isdir(link) and not os.path.islink(link):
        shutil.rmtree(link)
    folder, name = os.path.split(link)
    new = os.path.join(folder, f".{name}.new")
    os.symlink(os.path.relpath(target, folder), new)
    os.replace(new, link)


def find_urls_of_last(callback: Any) -> None:
    """Has ModelCheckpoint find the last checkpoints under a URL, of which it drops the protocol."""
    if isinstance(callback, ModelCheckpoint):
        callback._find_last_checkpoints = MethodType(_find_last, callback)  # type: ignore[method-assign]


def _find_last(self: ModelCheckpoint, trainer: pl.Trainer) -> set[str]:
    options = getattr(trainer.strategy, "storage_options", None)
    folder = checkpoints.place(self._ModelCheckpoint__resolve_ckpt_dir(trainer), options)  # type: ignore[attr-defined]
    if not isinstance(folder, checkpoints.Remote):
        return ModelCheckpoint._find_last_checkpoints(self, trainer)
    pattern = rf"{self.CHECKPOINT_NAME_LAST}(-\d+)?.*{re.escape(self.FILE_EXTENSION)}"
    found = [_dated(entry) for entry in folder.iterdir() if re.fullmatch(pattern, entry.name)]
    return {file.url for file in found if file.exists()}


# How Lightning finds the file system of a checkpoint, for which it knows no options.
_LOOKS = ((model_checkpoint, "get_filesystem"), (connector, "get_filesystem"), (connector, "url_to_fs"))


@contextmanager
def looking_with(options: Mapping[str, Any] | None) -> Iterator[None]:
    """Has Lightning look for checkpoints in object storage with some options, inside this context."""
    with ExitStack() as stack:
        for module, name in _LOOKS if options else ():
            original = getattr(module, name)
            stack.callback(setattr, module, name, original)
            setattr(module, name, functools.partial(_look, original, options or {}))
        yield


def _look(original: Callable[..., Any], options: Mapping[str, Any], path: Any, **kwargs: Any) -> Any:
    return original(path, **{**(options if "://" in str(path) else {}), **kwargs})


def _dated(checkpoint: checkpoints.Remote) -> checkpoints.Remote:
    """Returns that object of a checkpoint which has a time, and names it."""
    return checkpoint if checkpoint.is_file() else checkpoint / MANIFEST
