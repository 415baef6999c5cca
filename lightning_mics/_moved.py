"""Names that lead elsewhere: documented modules that moved, and doors from lower modules to higher ones."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_PACKAGE = "lightning_mics"
MOVED = {
    "links": "trace.links",
    "plan.models": "trace.models",
    "plan.optimizers": "trace.optimizers",
    "strategies": "lightning",
    "strategies.fabric": "lightning.fabric",
    "strategies.monitor": "lightning.monitor",
    "strategies.trainer": "lightning.trainer",
}
# What a module offers, or uses, though a higher module does it: looked up when it is called.
DOORS = {
    "MiCSConfig.from_deepspeed": "deepspeed:convert_deepspeed",
    "plan.memory.optimizer_footprint": "trace.optimizers:optimizer_footprint",
    "plan.plan": "trace.planning:plan",
}


def open_door(name: str) -> Any:
    """Returns what stands behind one of the doors."""
    module, _, attribute = DOORS[name].partition(":")
    return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), attribute)


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a moved module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{_PACKAGE}.{MOVED[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__  # Python writes the old name's spec over it
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Makes the old names known to Python.

    Before all other finders: one of them would find a module of a moved package once more, under its old name.
    """
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
