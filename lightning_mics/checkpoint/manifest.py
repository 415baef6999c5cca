"""The manifest of a sharded checkpoint: what it consists of, and a digest of that; the last file to be written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from lightning_mics.errors import CheckpointError

MANIFEST, META, INDEX = "mics.json", "meta.pt", ".metadata"
GENERATION = "mics-"  # begins the name of the folder in which object storage keeps what one save wrote
_FORMAT = 2
_UNCHECKED_KEYS = {"format", "world_size", "model", "files"}  # of the first version, which had no digest

Facts = dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        files: Size (``bytes``) and checksum (``crc32``) of each file, by its name in its folder.
        world_size: Number of ranks that wrote it.
        shard_size: Number of ranks that a model was spread over; ``None`` if nothing was sharded, or unknown.
        step: The step of training, where what was saved names one.
        model: What is to be known of the model without unpickling anything.
        folder: In object storage, the folder of the files in the checkpoint: each save has its own.
    """

    files: dict[str, Facts]
    world_size: int
    shard_size: int | None
    step: int | None
    model: dict[str, str]
    folder: str = ""

    def to_text(self) -> str:
        """Returns the content of the file, with a digest of itself."""
        content = {"format": _FORMAT, **asdict(self)}
        if not self.folder:
            del content["folder"]
        return json.dumps({**content, "digest": _digest(content)}, indent=1)


def parse(text: bytes, where: str, *, trusted: bool = False) -> Manifest:
    """Reads a manifest.

    Args:
        text: The content of the file.
        where: Its path, for messages.
        trusted: Whether to take one of the first version, which cannot be checked itself.

    Raises:
        CheckpointError: If it is damaged, too new, or of the first version and not trusted.
    """
    try:
        content = dict(json.loads(text))
        version, digest = int(content["format"]), content.pop("digest", None)
        if version > _FORMAT:
            raise CheckpointError(f"{where} was written by a newer lightning-mics. Update the package to read it.")
        if digest is None and version == 1 and content.keys() <= _UNCHECKED_KEYS:
            return _unchecked(content, where, trusted)
        if digest != _digest(content):
            raise ValueError("its content does not match its own checksum")
        del content["format"]
        manifest = Manifest(**content)
        if manifest.folder and not (manifest.folder.startswith(GENERATION) and "/" not in manifest.folder):
            raise ValueError(f"{manifest.folder!r} is no folder of a checkpoint")
        return manifest
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{where} is damaged: {error}. Copy the checkpoint again from where it is whole."
        ) from error


def _unchecked(content: dict[str, Any], where: str, trusted: bool) -> Manifest:
    if not trusted:
        raise CheckpointError(
            f"{where} says that an older lightning-mics wrote it, which left no checksum of this file, so that damage "
            "to it would not be seen. If you trust the checkpoint, load it with weights_only=False "
            "(mics consolidate: --trust); saving it again makes it checked."
        )
    listed = {
        name: {"bytes": int(facts["bytes"]), "crc32": int(facts["crc32"])} for name, facts in content["files"].items()
    }
    return Manifest(listed, int(content["world_size"]), None, None, dict(content.get("model", {})))


def _digest(content: dict[str, Any]) -> str:
    """Returns a checksum of what a manifest says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def step_of(meta: dict[str, Any]) -> int | None:
    """Returns the step of training that is saved, under whatever name it goes."""
    accelerate = meta.get("accelerate")
    of_accelerate = accelerate.get("step") if isinstance(accelerate, dict) else None
    return next(
        (step for step in (meta.get("global_step"), meta.get("step"), of_accelerate) if type(step) is int), None
    )
