"""Reading the file, and accounting for each of its leaf fields."""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_mics.deepspeed.conversion import Field, Outcome
from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import nearest

AUTO = "auto"
ZERO = "zero_optimization"
_TO_SCRIPT = "Left to the script."
_STAGE3 = "stage3_"  # DeepSpeed takes some fields of zero_optimization with it and without


@functools.cache
def known() -> dict[str, Any]:
    """Returns the table of DeepSpeed's fields."""
    text = (importlib.resources.files("lightning_mics.deepspeed") / "fields.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


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


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Reader:
    """The leaf fields of the file, and what became of those that were decided about.

    A decision about a field that is not in the file does nothing.
    """

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._leaves = list(_leaves(tree))
        self._values = dict(self._leaves)
        self._decided: dict[str, tuple[Outcome, str]] = {}
        for section in _sections():
            value = self._values.get(section)
            if value is not None and value != {} and not (section == ZERO and isinstance(value, bool)):
                raise MiCSConfigError(
                    f"{section}={value!r} is {_json_kind(value)}, but must be an object of settings: {{...}}.",
                    setting=section,
                )

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def value(self, key: str, default: Any = None) -> Any:
        """Returns the value of a field."""
        return self._values.get(key, default)

    def under(self, section: str) -> dict[str, Any]:
        """Returns the fields below a section, by the rest of their keys."""
        start = f"{section}."
        return {key.removeprefix(start): value for key, value in self._leaves if key.startswith(start)}

    def is_auto(self, key: str) -> bool:
        """Returns whether the file leaves a field to the script."""
        return bool(self.value(key) == AUTO)

    def whole(self, key: str, least: int = 1, example: int = 8) -> int | None:
        """Returns a whole number; ``None`` if it is not there or "auto"."""
        value = self._given(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise MiCSConfigError(
                f"{key}={value!r} is not a whole number of at least {least}. Try {key}={example}.", setting=key
            )
        return value

    def number(self, key: str) -> float | None:
        """Returns a number of at least 0; ``None`` if it is not there or "auto"."""
        value = self._given(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise MiCSConfigError(f"{key}={value!r} is not a number of at least 0. Try {key}=1.0.", setting=key)
        return None if value is None else float(value)

    def switch(self, key: str) -> bool | None:
        """Returns a switch; ``None`` if it is not there or "auto"."""
        value = self._given(key)
        if value is not None and not isinstance(value, bool):
            raise MiCSConfigError(
                f"{key}={value!r} is not a switch. Values that work: true, false, 'auto'.", setting=key
            )
        return value

    def _given(self, key: str) -> Any:
        return None if self.is_auto(key) else self.value(key)

    def kept(self, key: str, note: str) -> None:
        """Decides that a field means the same here, or in the script."""
        self._decided[key] = ("kept", note)

    def replaced(self, key: str, note: str) -> None:
        """Decides that a field became something else, or is not needed."""
        self._decided[key] = ("replaced", note)

    def dropped(self, key: str, note: str) -> None:
        """Decides that a field has no counterpart."""
        self._decided[key] = ("dropped", note)

    def report(self) -> tuple[Field, ...]:
        """Returns all fields in the file's order, those that nobody decided about by the table."""
        return tuple(
            Field(key, value, *(self._decided.get(key) or self._look_up(key, value))) for key, value in self._leaves
        )

    def _look_up(self, key: str, value: Any) -> tuple[Outcome, str]:
        entry = _entry(key)
        if value == AUTO and (key in known()["auto"] or key.startswith(("optimizer.", "scheduler."))):
            filled_by = known()["auto"].get(key)
            return "replaced", f"Left to the script ({filled_by} of TrainingArguments)." if filled_by else _TO_SCRIPT
        if entry is None:
            return ("replaced", "Empty: nothing to do.") if key in _sections() else ("unknown", _nearest(key))
        ((outcome, note),) = entry.items()
        if outcome == "dropped" and (value is None or value is False or value == {} or self._is_off(key)):
            note = "Off in this file: nothing to do."
        return outcome, note

    def _is_off(self, key: str) -> bool:
        """Returns whether a section around a field is switched off."""
        return any(self.value(f"{section}.enabled") is False for section in _sections_of(key))


def _sections_of(key: str) -> list[str]:
    """Returns the names of the sections around a field."""
    names = key.split(".")[:-1]
    return [".".join(names[: depth + 1]) for depth in range(len(names))]


def _entry(key: str) -> dict[Outcome, str] | None:
    fields: dict[str, dict[Outcome, str]] = known()["fields"]
    spellings = [key]
    if key.startswith(f"{ZERO}."):
        name = key.removeprefix(f"{ZERO}.").removeprefix(_STAGE3)
        spellings += [f"{ZERO}.{name}", f"{ZERO}.{_STAGE3}{name}"]
    spellings += [f"{section}.*" for section in reversed([*_sections_of(key), key])]
    return next((fields[name] for name in spellings if name in fields), None)


@functools.cache
def _known_keys() -> list[str]:
    """Returns the names of all fields and sections."""
    return [key.removesuffix(".*") for key in known()["fields"]] + sorted(_sections())


@functools.cache
def _sections() -> set[str]:
    """Returns the names of the sections that must be objects."""
    fields = known()["fields"]
    sections = {section for key in fields for section in _sections_of(key.removesuffix(".*"))}
    return {section for section in sections if section == ZERO or section not in fields}


def _nearest(key: str) -> str:
    """Names the known key that looks most like an unknown one, of the same section if there is one."""
    section, _, name = key.rpartition(".")
    whole = {near: near.rpartition(".") for near in _known_keys()}
    near = nearest(name, [last for parent, _, last in whole.values() if parent == section])
    if near is not None:
        return f"Not a known DeepSpeed setting. The nearest is {f'{section}.{near}'.lstrip('.')!r}."
    near = nearest(name, [last for _, _, last in whole.values()], cutoff=0.7)
    if near is not None:
        place = next(key for key, (_, _, last) in whole.items() if last == near)
        return f"Not a known DeepSpeed setting. The nearest is {place!r}."
    return "Not a known DeepSpeed setting, and none is near. If your own code reads it, it stays there."
