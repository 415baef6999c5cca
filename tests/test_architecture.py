"""The package keeps to its layers, and the script that checks so sees what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import architecture
import pytest
from architecture import Package

import lightning_mics


def package(folder: Path, modules: Mapping[str, str]) -> Package:
    """Writes a package, from the texts of its modules."""
    root = folder / "made_up"
    for name, text in {"__init__": "", **modules}.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(root)


def shown(findings: Iterable[Any]) -> list[str]:
    return [str(finding) for finding in findings]


@pytest.mark.parametrize(
    "statement",
    [
        "from made_up.b import name",
        "from made_up import b",
        "import made_up.b",
        "from . import b",
        "from .b import name",
        "def later():\n    from made_up.b import name",
        "def later():\n    import importlib\n    return importlib.import_module('made_up.b')",
        "from importlib import import_module\nimport_module('.b', __package__)",
        "name = __import__('made_up.b')",
        "_HOMES = {'name': 'b'}\ndef later(name):\n    return import_module(f'{__package__}.{_HOMES[name]}')",
        "def later(name):\n    return import_module(f'made_up.{name}')",
        "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import made_up.b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import made_up.b",
    ],
)
def test_every_import_that_runs_can_close_a_circle(tmp_path: Path, statement: str) -> None:
    found = architecture.module_circles(package(tmp_path, {"a": statement, "b": "import made_up.a"}))
    assert shown(found) == ["a - b"]


@pytest.mark.parametrize("condition", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_imports_for_type_checkers_are_told_apart(tmp_path: Path, condition: str) -> None:
    made = package(
        tmp_path, {"plan": f"if {condition}:\n    import torch, made_up.trace", "trace": "import made_up.plan"}
    )
    assert architecture.module_circles(made) == architecture.room_circles(made) == []
    assert shown(architecture.module_circles(made, types_too=True)) == ["plan - trace"]
    assert architecture.upward_imports(made) == architecture.ways_to_torch(made) == []


def test_relative_imports_of_rooms(tmp_path: Path) -> None:
    made = package(
        tmp_path,
        {"core/__init__": "", "core/a": "from .b import name\nfrom .. import config", "core/b": "", "config": ""},
    )
    assert [(item.source, item.target) for item in made.edges] == [("core.a", "core.b"), ("core.a", "config")]


def test_rooms_make_circles_that_modules_do_not(tmp_path: Path) -> None:
    made = package(
        tmp_path,
        {
            "core/a": "import made_up.core.cpu.x",
            "core/cpu/x": "import made_up.core.b",
            "core/b": "import made_up.core.cpu.y",
            "core/cpu/y": "import made_up.core.c, made_up.plan.p",
            "core/c": "",
            "plan/p": "import made_up.core.c",
        },
    )
    assert architecture.module_circles(made) == []
    assert shown(architecture.room_circles(made)) == ["core/ - plan/", "core/b - core/cpu/"]


def test_a_lazy_re_export_stands_for_its_home(tmp_path: Path) -> None:
    homes = "_HOMES = {'Name': 'core.a'}\nfrom made_up.core import a"
    made = package(tmp_path, {"__init__": homes, "core/a": "", "config": "from made_up import Name"})
    assert shown(architecture.upward_imports(made)) == ["made_up/config.py:1  config -> core.a"]


def test_imports_point_down_but_for_declared_doors(tmp_path: Path) -> None:
    modules = {"config": "def read():\n    import made_up.core.a", "core/a": "import made_up.config, made_up.text"}
    modules["text"] = ""
    assert shown(architecture.upward_imports(package(tmp_path, modules))) == ["made_up/config.py:2  config -> core.a"]
    modules["config"] = "from made_up._moved import open_door\ndef read():\n    open_door('read')"
    door = package(
        tmp_path, {**modules, "_moved": "DOORS = {'read': 'core.a:read'}\nimport made_up.core.a", "text": ""}
    )
    assert door.doors == ["read -> core.a:read"]
    assert architecture.upward_imports(door) == []


def test_modules_without_a_layer_are_named(tmp_path: Path) -> None:
    assert architecture.without_layer(package(tmp_path, {"core/a": "", "ring": ""})) == ["ring"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from torch.utils._pytree import tree_leaves", "torch.utils._pytree.tree_leaves"),
        ("def later():\n    from torch.distributed.fsdp import _fully_shard", "torch.distributed.fsdp._fully_shard"),
        ("import importlib\nimportlib.import_module('torch._C')", "torch._C"),
        ("import torch\ntorch._C", "torch._C"),
        ("import torch.distributed as dist\ndist._coalescing_manager()", "dist._coalescing_manager"),
        ("def local(tensor):\n    return tensor._local_tensor", "tensor._local_tensor"),
        ("state = module._get_fsdp_state()", "module._get_fsdp_state"),
        ("NAMES = ('_parameters', 'other')", "_parameters"),
        ("groups = getattr(state, '_fsdp_param_groups', None)", "_fsdp_param_groups"),
        ("mock.patch.object(module, '_all_gather')", "_all_gather"),
        ("mock.patch('torch.distributed._tools.name')", "torch.distributed._tools.name"),
        ("import torch\nclass A(torch.amp.GradScaler):\n    def _unscale_grads_(self): pass", "_unscale_grads_"),
    ],
)
def test_private_names_of_torch_have_a_home(tmp_path: Path, text: str, name: str) -> None:
    found = architecture.private_names(package(tmp_path, {"core/_torch": text, "a": text}))
    assert [(finding.path, finding.text) for finding in found] == [("made_up/a.py", name)]


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nsys._getframe()",
        "class A:\n    def __init__(self):\n        self._own = 1\n\ndef look(a):\n    return a._own, a.__dict__",
        "import torch\nclass A(torch.nn.Module):\n    def _own(self): pass\n    def forward(self): return self._own()",
        "def forms(command):\n    return command._option_string_actions",
    ],
)
def test_other_private_names_may_be_used(tmp_path: Path, text: str) -> None:
    assert architecture.private_names(package(tmp_path, {"a": text})) == []


def test_the_planner_reaches_no_torch(tmp_path: Path) -> None:
    made = package(
        tmp_path,
        {
            "plan/__init__": "import made_up.plan.a",
            "plan/a": "def f():\n    from torch import nn",
            "plan/b": "import made_up.text",
            "plan/c": "import made_up.metrics, made_up.errors",
            "plan/d": "def f():\n    from made_up.plan import a",
            "metrics": "import made_up.core.a",
            "core/__init__": "import torch",
            "core/a": "",
            "text": "",
            "errors": "import numpy",
        },
    )
    assert shown(architecture.ways_to_torch(made)) == [
        "made_up/plan/a.py:2  imports torch",
        "made_up/plan/c.py:1  imports metrics: core import torch",
    ]


def test_sizes(tmp_path: Path) -> None:
    long = "def long():\n" + "    pass\n" * 50 + "\n" * 400
    fields = "".join(f"    x{number}: int\n" for number in range(11))
    made = package(
        tmp_path,
        {
            "a": long,
            "b": f"@dataclass\nclass B:\n{fields}\n@dataclass(frozen=True)\nclass Frozen:\n{fields}",
            "c": "class C:\n    def __init__(self):\n"
            + "".join(f"        self.x{number} = 1\n" for number in range(11)),
        },
    )
    assert shown(architecture.long_files(made)) == ["made_up/a.py:1  451 lines"]
    assert shown(architecture.long_functions(made)) == ["made_up/a.py:1  long: 51 lines"]
    assert shown(architecture.large_classes(made)) == ["made_up/b.py:2  B: 11 fields", "made_up/c.py:1  C: 11 fields"]
    report = "\n".join(architecture.report(made))
    assert "Files over 450 lines (1)\n  made_up/a.py:1  451 lines\n" in report
    assert report.endswith("     491 (modules outside of rooms)")


@pytest.fixture(scope="module")
def real() -> Package:
    return Package(Path(lightning_mics.__file__).parent)


def test_all_modules_are_read(real: Package) -> None:
    assert {"__init__", "cli", "core.mesh", "sharding", "plan"} <= real.modules.keys()
    assert len(real.edges) > 300


@pytest.mark.parametrize(
    "rule",
    [
        architecture.module_circles,
        architecture.room_circles,
        architecture.upward_imports,
        architecture.without_layer,
        architecture.private_names,
        architecture.ways_to_torch,
    ],
    ids=lambda rule: rule.__name__,
)
def test_the_package_keeps_the_rules(real: Package, rule: Callable[[Package], list[Any]]) -> None:
    assert shown(rule(real)) == []
