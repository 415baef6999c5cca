"""Fields that need no calculation, and those that nobody knows."""

from __future__ import annotations

import difflib
from typing import Any

from lightning_mics.deepspeed.reader import KeyPath, Reader
from lightning_mics.deepspeed.tables import (
    CALCULATED,
    CHANGED,
    NO_COUNTERPART,
    NO_COUNTERPART_SECTIONS,
    OBJECTS,
    STAGE3,
    ZERO,
)


def account_for_the_rest(reader: Reader) -> None:
    """Puts every field that is still open into one of the lists."""
    for path, value in reader.open_leaves():
        key = ".".join(path)
        if path[0] == ZERO and len(path) > 1:
            key = ".".join([ZERO, path[1].removeprefix("stage3_"), *path[2:]])
        verdict, note = _look_up(key) or ("unknown", _guess(path))
        if verdict == "no_counterpart" and _is_off(reader, path, value):
            note = "Off in this file: nothing to do."
        reader.decide_path(path, "no_counterpart" if verdict == "unknown" else verdict, note)


def _look_up(key: str) -> tuple[str, str] | None:
    if key in CHANGED:
        return "changed", CHANGED[key]
    if key in NO_COUNTERPART:
        return "no_counterpart", NO_COUNTERPART[key]
    if key in OBJECTS:
        return "changed", "Empty: nothing to do."
    for section, note in NO_COUNTERPART_SECTIONS.items():
        if key == section or key.startswith(f"{section}."):
            return "no_counterpart", note
    return None


def _is_off(reader: Reader, path: KeyPath, value: Any) -> bool:
    if value is None or value is False or value == {}:
        return True
    return any(reader.value(".".join([*path[:depth], "enabled"])) is False for depth in range(1, len(path)))


def _guess(path: KeyPath) -> str:
    """Names the nearest known key, of the same section if there is one."""
    parent, name = ".".join(path[:-1]), path[-1]
    known = _known_keys()
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent]
    if parent == ZERO:
        siblings += [f"stage3_{sibling}" for sibling in siblings if sibling in STAGE3]
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"Not a known DeepSpeed setting. The nearest is {'.'.join([*path[:-1], near[0]])!r}."
    near = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in known], n=1, cutoff=0.7)
    if near:
        whole = next(key for key in known if key.rpartition(".")[2] == near[0])
        return f"Not a known DeepSpeed setting. The nearest is {whole!r}."
    return "Not a known DeepSpeed setting, and none is near. If your own code reads it, it stays there."


def _known_keys() -> list[str]:
    return [*CHANGED, *NO_COUNTERPART, *NO_COUNTERPART_SECTIONS, *OBJECTS, *CALCULATED]
