"""Reading the file, and remembering what became of each leaf field."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_mics.deepspeed.conversion import Field
from lightning_mics.deepspeed.tables import AUTO, AUTO_OF_HUGGING_FACE, OBJECTS, ZERO
from lightning_mics.errors import MiCSConfigError

KeyPath = tuple[str, ...]


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Returns the configuration and a name for it."""
    if isinstance(source, Mapping):
        return source, "a DeepSpeed configuration"
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MiCSConfigError(f"There is no file {path}. Pass the path of a DeepSpeed configuration (JSON).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MiCSConfigError(f"{path} cannot be read as a text file: {error}. Pass a DeepSpeed JSON file.") from error
    try:
        tree = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise MiCSConfigError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}. DeepSpeed also takes "
            "comments and trailing commas; remove them."
        ) from error
    if not isinstance(tree, Mapping):
        raise MiCSConfigError(f'{path} must hold an object like {{"train_batch_size": 256}}, not {_json_kind(tree)}.')
    return tree, path.name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise MiCSConfigError(f"The key {key!r} stands twice in one object of the file. Remove one of them.")
        tree[key] = value
    return tree


def _json_kind(value: object) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _leaves(tree: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


class Reader:
    """The leaves of the file, and for each the list it went to."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._leaves = dict(_leaves(tree))
        self._verdicts: dict[KeyPath, tuple[str, str]] = {}
        for section in OBJECTS:
            value = self._leaves.get(tuple(section.split(".")))
            if value is not None and value != {} and not (section == ZERO and isinstance(value, bool)):
                raise MiCSConfigError(
                    f"{section}={value!r} is {_json_kind(value)}, but must be an object of settings: {{...}}."
                )

    def __contains__(self, key: str) -> bool:
        return tuple(key.split(".")) in self._leaves

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a leaf."""
        return self._leaves.get(tuple(key.split(".")), default)

    def under(self, section: str) -> dict[str, Any]:
        """The leaves directly or further below a section, by the rest of their keys."""
        path = tuple(section.split("."))
        return {".".join(key[len(path) :]): value for key, value in self._leaves.items() if key[: len(path)] == path}

    def open_leaves(self) -> list[tuple[KeyPath, Any]]:
        """The leaves that nobody has decided about yet."""
        return [(path, value) for path, value in self._leaves.items() if path not in self._verdicts]

    def carried(self, key: str, note: str) -> None:
        """Notes that a field keeps its meaning; as do the next two, for a field that is not there nothing happens."""
        self._decide(key, "carried", note)

    def changed(self, key: str, note: str) -> None:
        """Notes that a field became something else."""
        self._decide(key, "changed", note)

    def dropped(self, key: str, note: str) -> None:
        """Notes that a field has no counterpart."""
        self._decide(key, "no_counterpart", note)

    def left_to_script(self, key: str) -> None:
        """Notes that the file says "auto"."""
        ours = AUTO_OF_HUGGING_FACE.get(key)
        note = f"Left to the script ({ours} of TrainingArguments)." if ours else "Left to the script."
        self._decide(key, "changed", note)

    def decide_path(self, path: KeyPath, verdict: str, note: str) -> None:
        """Notes what became of a leaf that is known by its path."""
        assert path not in self._verdicts, path
        self._verdicts[path] = (verdict, note)

    def _decide(self, key: str, verdict: str, note: str) -> None:
        path = tuple(key.split("."))
        if path in self._leaves:
            self.decide_path(path, verdict, note)

    def fields(self, verdict: str) -> tuple[Field, ...]:
        """The fields of one list, in the order of the file."""
        found = []
        for path, value in self._leaves.items():
            list_name, note = self._verdicts[path]
            if list_name == verdict:
                found.append(Field(".".join(path), value, note))
        return tuple(found)

    def whole(self, key: str, least: int = 1, example: int = 8) -> int | None:
        """A whole number; ``None`` if it is not there or "auto"."""
        value = self.value(key)
        if value is None or value == AUTO:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MiCSConfigError(f"{key}={value!r} is not a whole number of at least {least}. Try {key}={example}.")
        return value

    def number(self, key: str) -> float | None:
        """A number of at least 0; ``None`` if it is not there or "auto"."""
        value = self.value(key)
        if value is None or value == AUTO:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise MiCSConfigError(f"{key}={value!r} is not a number of at least 0. Try {key}=1.0.")
        return float(value)

    def switch(self, key: str) -> bool | None:
        """A switch; ``None`` if it is not there or "auto"."""
        value = self.value(key)
        if value is None or value == AUTO:
            return None
        if not isinstance(value, bool):
            raise MiCSConfigError(f"{key}={value!r} is not a switch. Values that work: true, false, 'auto'.")
        return value

    def is_auto(self, key: str) -> bool:
        """Whether the file leaves a field to the script."""
        return bool(self.value(key) == AUTO)
