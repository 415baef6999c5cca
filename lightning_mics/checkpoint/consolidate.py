"""From a sharded checkpoint to files that any program reads; needs no cluster and no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_mics.checkpoint import files, storage
from lightning_mics.checkpoint.content import batches
from lightning_mics.checkpoint.generation import Generation, read_generation
from lightning_mics.checkpoint.load import read
from lightning_mics.checkpoint.own import own_names, special
from lightning_mics.checkpoint.storage import Place, Remote, place
from lightning_mics.errors import CheckpointError

Progress = Callable[[int, int], None]

_FILE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
_BATCH_BYTES = 256 * 2**20
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")


def consolidate(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    weights_only: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Place:
    """Turns a checkpoint into one file or a Hugging Face folder.

    The ending of ``destination`` decides: ``.safetensors`` holds the weights; ``.ckpt``, ``.pt``, ``.pth`` or ``.bin``
    one full Lightning checkpoint with optimizer states, which a Trainer on one device resumes from; a name without an
    ending becomes a folder for ``from_pretrained``, if the model is a Hugging Face one.

    Args:
        source: A sharded checkpoint, or a full file; a URL, too.
        destination: What to write; a URL, too.
        force: Whether to replace what is there.
        progress: Told the bytes checked and read so far, and how many there will be.
        weights_only: ``False`` trusts the checkpoint; see :func:`load_checkpoint`.
        storage_options: What the file systems of URLs take; see :func:`save_checkpoint`.

    Returns:
        The file or folder that was written.

    Raises:
        CheckpointError: If the source cannot be read or the destination not be written.
    """
    origin, target = place(source, storage_options), place(destination, storage_options)
    ending = target.suffix.lower()
    _check_destination(origin, target, ending, force)
    everything = ending in _FILE_ENDINGS

    def read_all(generation: Generation) -> dict[str, Any]:
        if generation.kind == "full":
            generation.check(alone=True)
            return generation.meta()
        return _read_sharded(generation, everything, progress)

    content = read_generation(origin, weights_only, read_all, alone=True)
    _weights(content)
    temporary = files.temporary_name(target if isinstance(target, Path) else storage.staging())
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        _write(content, temporary, ending)
        if isinstance(target, Path):
            files.commit(temporary, target)
        else:
            target.upload_all(temporary)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{target} cannot be written ({error}). Check the path, permissions and space."
        ) from error
    finally:
        files.delete(temporary)
        files.release(temporary)
    return target


def _check_destination(source: Place, destination: Place, ending: str, force: bool) -> None:
    """Checks that writing ``destination`` is possible and destroys nothing but what ``force`` allows."""
    if ending not in ("", ".safetensors", *_FILE_ENDINGS):
        raise CheckpointError(
            f"{destination} has an unknown ending. Use .safetensors (weights), .ckpt (everything), or no ending for a "
            "Hugging Face folder."
        )
    if _holds(destination, source):
        raise CheckpointError(f"{destination} holds the checkpoint that it is to be made of. Choose another name.")
    if not destination.exists():
        return
    if isinstance(destination, Path) and (kind := special(destination)) is not None:
        raise CheckpointError(f"{destination} is {kind}. Choose another name.")
    others = _other_files(destination)
    if others:
        raise CheckpointError(f"{destination} is a folder with other files in it ({others[0]}). Choose another name.")
    if not force:
        raise CheckpointError(f"{destination} exists already. Choose another name, or replace it with --force.")


def _holds(folder: Place, path: Place) -> bool:
    if isinstance(folder, Path) and isinstance(path, Path):
        return path.exists() and path.resolve().is_relative_to(folder.resolve())
    return not isinstance(folder, Path) and isinstance(path, Remote) and f"{path.url}/".startswith(f"{folder.url}/")


def _other_files(destination: Place) -> list[str]:
    """Returns what lies in a folder and is neither ours nor of an earlier model there."""
    if not destination.is_dir():
        return []
    names = [entry.name for entry in destination.iterdir()]
    ours = [] if isinstance(destination, Remote) else own_names(destination)
    return sorted(name for name in names if name not in _MODEL_FILES and name not in ours)


def _write(content: dict[str, Any], target: Path, ending: str) -> None:
    if ending in _FILE_ENDINGS:
        torch.save(content, target)
    elif ending == ".safetensors":
        _save_tensors(_weights(content), target)
    else:
        _write_huggingface(content, target)


def read_weights(source: str | os.PathLike[str], *, weights_only: bool | None = None) -> dict[str, Any]:
    """Reads a sharded checkpoint, but for its optimizers, as if it were one full Lightning file; alone.

    Args:
        source: The checkpoint.
        weights_only: As in ``torch.load``, for the part that is not tensors.

    Raises:
        CheckpointError: If it is missing, damaged, or holds objects that ``weights_only`` forbids.
    """
    return read_generation(
        source, weights_only, lambda generation: _read_sharded(generation, False, None, with_rest=True), alone=True
    )


def _read_sharded(
    generation: Generation, everything: bool, progress: Progress | None, *, with_rest: bool = False
) -> dict[str, Any]:
    total, done = 2 * generation.total_bytes(), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    generation.check(alone=True, progress=advance)
    metadata = generation.metadata()
    # Only for everything are the classes of the script needed.
    manifest = None if everything or with_rest else generation.manifest
    meta: dict[str, Any] = generation.meta() if manifest is None else {"mics": dict(manifest.model)}
    wanted = [
        name for name in metadata.state_dict_metadata if everything or not _is_optimizer(_top(metadata, name), metadata)
    ]
    total = done + sum(_nbytes(metadata, name) for name in wanted)
    nested: dict[str, Any] = {}
    for batch in batches(wanted, lambda name: _nbytes(metadata, name), _BATCH_BYTES):
        flat = {name: _empty(metadata, name) for name in batch}
        read(generation, flat, metadata, alone=True)
        for name, value in flat.items():
            _put(nested, _path(metadata, name), value)
        advance(sum(_nbytes(metadata, name) for name in batch))
    for flat_name, value in meta.get("mics", {}).pop("extra_states", {}).items():
        key, _, name = flat_name.partition(".")
        nested.setdefault(key, {})[name] = value
    return {**meta, **_as_lightning(_lists(nested))}


def _path(metadata: Metadata, name: str) -> tuple[Any, ...]:
    return tuple((metadata.planner_data or {})[name])


def _top(metadata: Metadata, name: str) -> str:
    return str(_path(metadata, name)[0])


def _is_optimizer(top: str, metadata: Metadata) -> bool:
    return any(path[:2] == (top, "param_groups") for path in (metadata.planner_data or {}).values())


def _nbytes(metadata: Metadata, name: str) -> int:
    entry = metadata.state_dict_metadata[name]
    return entry.size.numel() * entry.properties.dtype.itemsize if isinstance(entry, TensorStorageMetadata) else 0


def _empty(metadata: Metadata, name: str) -> Tensor | None:
    entry = metadata.state_dict_metadata[name]
    return torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None


def _put(nested: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for step in path[:-1]:
        nested = nested.setdefault(step, {})
    nested[path[-1]] = value


def _lists(value: Any) -> Any:
    """Turns dictionaries with the keys 0, 1, 2 ... back into lists."""
    if not isinstance(value, dict):
        return value
    entries = {key: _lists(entry) for key, entry in value.items()}
    if entries and set(entries) == set(range(len(entries))):
        return [entries[index] for index in range(len(entries))]
    return entries


def _as_lightning(content: dict[str, Any]) -> dict[str, Any]:
    """Numbers optimizers and their parameters as in a full Lightning checkpoint; leaves other names alone."""
    result: dict[str, Any] = {}
    numbered: dict[int, dict[str, Any]] = {}
    for key, value in content.items():
        if not (isinstance(value, dict) and "param_groups" in value):
            result[key] = value
            continue
        by_position = _by_position(value)
        if "state_dict" in content and key.startswith("optimizer_"):
            numbered[int(key.removeprefix("optimizer_"))] = by_position
        else:
            result[key] = by_position
    if numbered:
        result["optimizer_states"] = [numbered[index] for index in sorted(numbered)]
    return result


def _by_position(optimizer: dict[str, Any]) -> dict[str, Any]:
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    position = {name: index for index, name in enumerate(names)}
    groups = [{**group, "params": [position[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    states = {position[name]: state for name, state in optimizer.get("state", {}).items()}
    return {"state": states, "param_groups": groups, "names": names}


def _weights(content: dict[str, Any]) -> dict[str, Tensor]:
    known = (content.get("mics", {}).get("model_key"), "state_dict", "model")
    candidates = [key for key in known if key in content]
    if not candidates:
        raise CheckpointError(f"The checkpoint holds no weights under 'state_dict' or 'model', only {list(content)}.")
    return {name: value for name, value in content[candidates[0]].items() if isinstance(value, Tensor)}


def _save_tensors(weights: dict[str, Tensor], target: Path) -> None:
    """Writes safetensors, which refuse tensors that share memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in weights.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor.clone() if shared else tensor.contiguous()
    save_file(separate, target, metadata={"format": "pt"})


def _write_huggingface(content: dict[str, Any], target: Path) -> None:
    described = content.get("mics", {})
    if "hf_config" not in described:
        raise CheckpointError(
            "The checkpoint does not know a Hugging Face model. Write its weights to a file instead: OUT.safetensors."
        )
    prefix = described["hf_prefix"]
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in _weights(content).items() if name.startswith(prefix)
    }
    target.mkdir()
    (target / "config.json").write_text(described["hf_config"])
    _save_tensors(weights, target / "model.safetensors")
