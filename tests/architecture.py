"""Checks how a package is built, by reading it: ``python tests/architecture.py [FOLDER]`` prints a report.

It looks for circles between modules and between rooms (folders), for imports that point up in the layers, for private
names of PyTorch outside of their homes, and for ways from the planner's arithmetic to torch. Imports inside functions
and by ``importlib`` count; those under ``if TYPE_CHECKING:`` are told apart, as they do not run.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

# Rooms and modules, top layer first: imports point down, or sideways inside of a layer.
LAYERS = (
    ("cli", "__main__", "testing"),
    ("bench", "demo", "deepspeed", "doctor"),
    ("lightning", "fabric", "accelerate", "transformers", "run", "ray"),
    ("familiar",),
    ("sharding",),
    ("pretrained", "auto"),
    ("trace",),
    ("checkpoint",),
    ("core", "plan"),
    ("config", "metrics"),
    ("precision", "topology"),
    ("yaml_text",),
    ("text", "errors", "processes", "imports"),
)
# Lazy re-exports, moved names and declared doors: they point anywhere, and imports of them count nowhere.
REEXPORTS = ("__init__", "_moved")
PRIVATE_HOMES = ("core._torch", "trace._torch")
NO_TORCH = "plan"
# Private names that other modules may use, with the reason.
ALLOWED = {
    ("core.loss_scaling", "_unscale_grads_"): "the one place where GradScaler can be told what all ranks saw",
}
# Private names of other libraries, which no rule here is about.
OTHERS = {
    "argparse": {"_option_string_actions"},
    "accelerate": {
        *("_custom_objects", "_dataloaders", "_models", "_schedulers", "_shared_state", "_reset_state"),
        *("_load_model_state_pre_hook", "_save_model_state_pre_hook"),
    },
    "lightning": {
        *(
            "_active_loop",
            "_compiler_ctx",
            "_average_model",
            "_combined_loader",
            "_combined_loader_states_to_load",
            "_data_fetcher",
            "_data_source",
            "_device_mesh",
            "_kwargs",
            "_layer_sync",
            "_load_combined_loader_states",
            "_optimizer",
            "_state_dicts",
            "_use_buffers",
        ),
        *("_reset_optimizers_and_schedulers", "_find_last_checkpoints", "_ModelCheckpoint__resolve_ckpt_dir"),
    },
    "transformers": {
        "_has_unfinished_sequences",
        *("_attn_implementation", "_init_weights", "_is_fsdp_managed_module", "_model_mapping", "_no_split_modules"),
        *("_hf_peft_config_loaded", "_keep_in_fp32_modules", "_keys_to_ignore_on_save", "_load_pretrained_model"),
    },
}
# Private attributes of every module of PyTorch, which count wherever they are spelled out.
REGISTRIES = {"_buffers", "_modules", "_non_persistent_buffers_set", "_parameters"}
MAX_FILE, MAX_FUNCTION, MAX_FIELDS = 450, 50, 10

MAX_SHOWN = 12  # imports of a circle that the report shows

_UNKNOWN = "*"
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Import:
    """One import: who, of what (a dotted name as Python sees it), where, and whether only type checkers run it."""

    source: str
    target: str
    line: int
    for_types: bool


@dataclass(frozen=True)
class Finding:
    """Something to tell of one line."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}  {self.text}"


@dataclass
class Module:
    """A module of the package, by its name inside of it (``core.mesh``; ``core`` for the folder's ``__init__``)."""

    package: str
    name: str
    path: Path
    tree: ast.Module
    lines: int
    names: dict[str, str] = field(default_factory=dict)  # what imports bind, as dotted names
    imports: list[Import] = field(default_factory=list)

    @cached_property
    def nodes(self) -> list[Any]:
        """All nodes of the tree."""
        return list(ast.walk(self.tree))

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The constants of the module that are written out."""
        package = self.full_name if self.is_folder else self.full_name.rpartition(".")[0]
        found: dict[str, Any] = {"__name__": self.full_name, "__package__": package}
        for node in self.tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                with suppress(ValueError):
                    found[target.id] = ast.literal_eval(node.value)
        return found

    @property
    def is_folder(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def full_name(self) -> str:
        return self.package if self.name == "__init__" else f"{self.package}.{self.name}"


class Package:
    """All modules below a folder, read but not run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.name = self.folder.name
        self.modules: dict[str, Module] = {}
        for path in sorted(self.folder.rglob("*.py")):
            parts = path.relative_to(self.folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
            text = path.read_text()
            self.modules[name] = Module(self.name, name, path, ast.parse(text), len(text.splitlines()))
        for module in self.modules.values():
            _ImportReader(module).visit(module.tree)

    def where(self, module: Module) -> str:
        return str(module.path.relative_to(self.folder.parent))

    @property
    def doors(self) -> list[str]:
        """What lower modules offer though a higher one does it, by way of ``_moved``."""
        moved = self.modules.get("_moved")
        return [f"{name} -> {home}" for name, home in (moved.constants.get("DOORS", {}) if moved else {}).items()]

    @cached_property
    def edges(self) -> list[Import]:
        """Imports between modules of the package, without those of re-exports."""
        found = {}
        for module in self.modules.values():
            if module.name in REEXPORTS:
                continue
            for item in module.imports:
                for target in self._modules_named(item.target):
                    if target not in (module.name, *REEXPORTS):
                        found[Import(module.name, target, item.line, item.for_types)] = None
        return list(found)

    def _modules_named(self, name: str) -> list[str]:
        """Returns the modules that a dotted name stands for: itself, or what it is a name of."""
        if name.endswith(_UNKNOWN):
            prefix = name[: -len(_UNKNOWN)]
            return [module.name for module in self.modules.values() if module.full_name.startswith(prefix)]
        package, _, inside = name.partition(".")
        if package != self.name:
            return []
        while inside and inside not in self.modules:
            folder, _, last = inside.rpartition(".")
            module = self.modules.get(folder or "__init__")
            homes = module.constants.get("_HOMES", {}) if module else {}
            if module and last in homes:  # a lazy re-export is an import of the name's home
                return self._modules_named(f"{module.full_name}.{homes[last]}")
            inside = folder
        return [inside or "__init__"]


class _ImportReader(ast.NodeVisitor):
    def __init__(self, module: Module) -> None:
        self._module = module
        self._for_types = False

    def visit_If(self, node: ast.If) -> None:
        if _name_of(node.test) != "TYPE_CHECKING":
            return self.generic_visit(node)
        self._for_types = True
        for child in node.body:
            self.visit(child)
        self._for_types = False
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)
            first = alias.name.split(".")[0]
            self._module.names[alias.asname or first] = alias.name if alias.asname else first

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        origin = self._absolute("." * node.level + (node.module or ""))
        for alias in node.names:
            name = f"{origin}.{alias.name}" if alias.name != "*" else origin
            self._add(name, node.lineno)
            self._module.names[alias.asname or alias.name] = name

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if _name_of(node.func) in ("import_module", "__import__") and node.args:
            for name in _strings(node.args[0], self._module):
                self._add(self._absolute(name), node.lineno)

    def _absolute(self, name: str) -> str:
        if not name.startswith("."):
            return name
        rest = name.lstrip(".")
        parts = self._module.full_name.split(".")
        parts = parts[: len(parts) - (len(name) - len(rest) - self._module.is_folder)]
        return ".".join([*parts, rest] if rest else parts)

    def _add(self, target: str, line: int) -> None:
        self._module.imports.append(Import(self._module.name, target, line, self._for_types))


def _name_of(node: ast.AST) -> str:
    """Returns a name, or the last part of a dotted one."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _strings(node: ast.AST, module: Module) -> list[str]:
    """Returns what a string can be; from where it cannot be read on, it is ``*``."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            ends = _strings(part.value if isinstance(part, ast.FormattedValue) else part, module) or [_UNKNOWN]
            found = [begin if begin.endswith(_UNKNOWN) else begin + end for begin in found for end in ends]
        return [name for name in found if name != _UNKNOWN]
    value = module.constants.get(_name_of(node.value if isinstance(node, ast.Subscript) else node))
    return [value] if isinstance(value, str) else [str(word) for word in getattr(value, "values", list)()]


# Circles


@dataclass(frozen=True)
class Circle:
    """Parts that need one another, with the imports between them."""

    members: tuple[str, ...]
    imports: tuple[Import, ...]

    def __str__(self) -> str:
        return " - ".join(self.members)


def module_circles(package: Package, types_too: bool = False) -> list[Circle]:
    """Returns the circles between modules, on request with the imports that only type checkers run."""
    return _circles([item for item in package.edges if types_too or not item.for_types], lambda name: name)


def room_circles(package: Package, types_too: bool = False) -> list[Circle]:
    """Returns the circles between folders, and between a folder and modules beside it, level by level."""
    edges = [item for item in package.edges if types_too or not item.for_types]
    folders = {name.rpartition(".")[0] for name in package.modules} | {
        module.name for module in package.modules.values() if module.is_folder and module.name != "__init__"
    }
    found = []
    for folder in sorted(folders):

        def part(name: str, folder: str = folder) -> str | None:
            """Names the module or folder right below ``folder`` in which a module lies."""
            module = package.modules[name]
            parts = [*name.split("."), "__init__"] if module.is_folder and name != "__init__" else name.split(".")
            above = folder.split(".") if folder else []
            if parts[: len(above)] != above or len(parts) <= len(above):
                return None
            depth = len(above) + 1
            return "/".join(parts[:depth]) + ("/" if len(parts) > depth else "")

        circles = _circles(edges, part)
        found += [circle for circle in circles if any(member.endswith("/") for member in circle.members)]
    return found


def _circles(edges: Iterable[Import], part: Callable[[str], str | None]) -> list[Circle]:
    between: dict[tuple[str, str], list[Import]] = {}
    for item in edges:
        source, target = part(item.source), part(item.target)
        if source and target and source != target:
            between.setdefault((source, target), []).append(item)
    nexts: dict[str, set[str]] = {}
    for source, target in between:
        nexts.setdefault(source, set()).add(target)
    reached = {start: _reached(start, nexts) for start in nexts}
    groups = {
        tuple(sorted(other for other in reached[start] if start in reached.get(other, ())))
        for start in nexts
        if start in reached[start]
    }
    return [
        Circle(group, tuple(item for pair, items in between.items() if {*pair} <= {*group} for item in items))
        for group in sorted(groups)
    ]


def _reached(start: str, nexts: Mapping[str, Iterable[str]]) -> set[str]:
    """Returns what can be reached from a part in one step or more."""
    found: set[str] = set()
    todo = list(nexts.get(start, ()))
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += nexts.get(name, ())
    return found


# Layers


def upward_imports(package: Package) -> list[Finding]:
    """Returns the imports that point to a higher layer, and what no layer has."""
    layers = {name: number for number, names in enumerate(LAYERS) for name in names}
    found = []
    for item in package.edges:
        source, target = layers.get(item.source.split(".")[0]), layers.get(item.target.split(".")[0])
        if not item.for_types and source is not None and target is not None and target < source:
            module = package.modules[item.source]
            found.append(Finding(package.where(module), item.line, f"{item.source} -> {item.target}"))
    return found


def without_layer(package: Package) -> list[str]:
    """Returns the rooms and modules that the list of layers lacks."""
    listed = {name for names in LAYERS for name in names}
    return sorted({name.split(".")[0] for name in package.modules} - listed - {*REEXPORTS})


# Private names of PyTorch


def private_names(package: Package) -> list[Finding]:
    """Returns the private names of PyTorch outside of their homes.

    Those are private parts of a name that was imported from torch, private attributes that nothing in the package
    defines and no other library is known for, and private methods of a class of torch that a class overrides.
    """
    known = set().union(*OTHERS.values(), *map(_defined, package.modules.values())) - REGISTRIES
    used = {
        node.attr for module in package.modules.values() for node in module.nodes if isinstance(node, ast.Attribute)
    }
    found = []
    for module in package.modules.values():
        if module.name.startswith(PRIVATE_HOMES):
            continue
        seen = {(item.line, item.target) for item in module.imports if _private_of_torch(item.target)}
        for node in module.nodes:
            seen |= {(node.lineno, name) for name in _private_in(node, module, known)}
            if isinstance(node, ast.ClassDef):
                seen |= {(node.lineno, name) for name in _overrides(node, module, used)}
        for line, name in sorted(seen):
            if (module.name, name.rpartition(".")[2]) not in ALLOWED:
                found.append(Finding(package.where(module), line, name))
    return found


def _is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.startswith("_") and not name.endswith("__")


def _private_of_torch(name: str) -> bool:
    return name.split(".")[0] == "torch" and any(map(_is_private, name.split(".")))


def _private_in(node: Any, module: Module, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and _is_private(node.attr):
        yield from _private_attribute(node, module, known)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in REGISTRIES:
        yield node.value
    elif isinstance(node, ast.Call):
        function = _name_of(node.func)
        if function in ("getattr", "hasattr", "setattr", "delattr", "object") and len(node.args) > 1:
            name = getattr(node.args[1], "value", None)
            if _is_private(name) and name not in known:
                yield str(name)
        elif function == "patch" and node.args:
            yield from filter(_private_of_torch, _strings(node.args[0], module))


def _private_attribute(node: ast.Attribute, module: Module, known: set[str]) -> Iterator[str]:
    chain = ast.unparse(node)
    root, _, rest = chain.partition(".")
    origin = module.names.get(root, "")
    is_foreign = node.attr not in known and origin.split(".")[0] in ("", module.package)
    if is_foreign or _private_of_torch(f"{origin}.{rest}"):
        yield chain


def _defined(module: Module) -> set[str]:
    """Returns the private names that a module defines."""
    found = set()
    for node in module.nodes:
        if isinstance(node, (*_Function, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and _is_set(node):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and _is_set(node) and _name_of(node.value) in ("self", "cls"):
            found.add(node.attr)
    return set(filter(_is_private, found))


def _is_set(node: ast.Attribute | ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _overrides(node: ast.ClassDef, module: Module, used: set[str]) -> Iterator[str]:
    """Returns the private methods of a class of torch that a class changes: the package itself never calls them."""
    if any(module.names.get(ast.unparse(base).split(".")[0], "").split(".")[0] == "torch" for base in node.bases):
        for item in node.body:
            if isinstance(item, _Function) and _is_private(item.name) and item.name not in used:
                yield item.name


# Arithmetic without torch


def ways_to_torch(package: Package) -> list[Finding]:
    """Returns the imports by which the planner's arithmetic reaches torch, directly or through other modules."""
    torch = {
        module.name: item.line
        for module in package.modules.values()
        for item in module.imports
        if not item.for_types and item.target.split(".")[0] == "torch"
    }
    nexts: dict[str, set[str]] = {}
    for item in package.edges:
        if not item.for_types:
            parts = item.target.split(".")  # Python runs the folders above a module, too
            above = {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
            nexts.setdefault(item.source, set()).update(above & package.modules.keys())
    found = []
    for module in package.modules.values():
        if module.name.split(".")[0] != NO_TORCH:
            continue
        if module.name in torch:
            found.append(Finding(package.where(module), torch[module.name], "imports torch"))
        for item in package.edges:
            outside = item.source == module.name and item.target.split(".")[0] != NO_TORCH and not item.for_types
            if outside and (bad := ({item.target} | _reached(item.target, nexts)) & torch.keys()):
                found.append(Finding(package.where(module), item.line, f"imports {item.target}: {_some(bad)}"))
    return sorted(set(found), key=str)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + " import torch"


# Sizes


def long_files(package: Package) -> list[Finding]:
    """Returns the files over the bound."""
    modules = package.modules.values()
    return [Finding(package.where(module), 1, f"{module.lines} lines") for module in modules if module.lines > MAX_FILE]


def long_functions(package: Package) -> list[Finding]:
    """Returns the functions over the bound."""
    found = []
    for module in package.modules.values():
        for node in module.nodes:
            if isinstance(node, _Function):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    found.append(Finding(package.where(module), node.lineno, f"{node.name}: {lines} lines"))
    return found


def large_classes(package: Package) -> list[Finding]:
    """Returns the classes with more fields than the bound; frozen settings, which only hold values, excepted."""
    found = []
    for module in package.modules.values():
        for node in module.nodes:
            if isinstance(node, ast.ClassDef) and (count := _count_fields(node)) > MAX_FIELDS:
                found.append(Finding(package.where(module), node.lineno, f"{node.name}: {count} fields"))
    return found


def _count_fields(node: ast.ClassDef) -> int:
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    if "frozen=True" in decorators or any(_name_of(base) in ("NamedTuple", "TypedDict") for base in node.bases):
        return 0
    fields = {
        item.attr
        for item in ast.walk(node)
        if isinstance(item, ast.Attribute) and _is_set(item) and _name_of(item.value) == "self"
    }
    if "dataclass" in decorators:
        fields |= {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
    return len(fields)


def lines_by_room(package: Package) -> dict[str, int]:
    """Returns the lines of each room, and of the modules outside of rooms together."""
    lines: Counter[str] = Counter()
    for module in package.modules.values():
        room = module.path.relative_to(package.folder).parent.as_posix()
        lines["(modules outside of rooms)" if room == "." else room] += module.lines
    return dict(sorted(lines.items()))


# The report


def report(package: Package) -> Iterator[str]:
    """Gives the lines of the report."""
    circles, rooms = module_circles(package), room_circles(package)
    yield from _section("Circles between modules", circles)
    yield from _section("... counting imports for type checkers", _others(module_circles(package, True), circles))
    yield from _section("Circles between rooms", rooms)
    yield from _section("... counting imports for type checkers", _others(room_circles(package, True), rooms))
    yield from _section("Imports that point up", upward_imports(package))
    yield from _section("Doors that point up", package.doors)
    yield from _section("Not in the list of layers", without_layer(package))
    yield from _section("Private names of PyTorch outside of their homes", private_names(package))
    yield from _section("Ways from the planner to torch", ways_to_torch(package))
    yield from _section(f"Files over {MAX_FILE} lines", long_files(package))
    yield from _section(f"Functions over {MAX_FUNCTION} lines", long_functions(package))
    yield from _section(f"Classes with more than {MAX_FIELDS} fields", large_classes(package))
    rooms_lines = lines_by_room(package)
    yield f"Lines ({sum(rooms_lines.values())})"
    yield from (f"  {count:6} {room}" for room, count in rooms_lines.items())


def _others(circles: list[Circle], known: list[Circle]) -> list[Circle]:
    members = {circle.members for circle in known}
    return [circle for circle in circles if circle.members not in members]


def _section(title: str, findings: Iterable[Any]) -> Iterator[str]:
    findings = list(findings)
    yield f"{title} ({len(findings)})"
    for finding in findings:
        yield f"  {finding}"
        if isinstance(finding, Circle):
            for item in finding.imports[:MAX_SHOWN]:
                note = " (for type checkers)" if item.for_types else ""
                yield f"      {item.source}:{item.line} -> {item.target}{note}"
            if len(finding.imports) > MAX_SHOWN:
                yield f"      and {len(finding.imports) - MAX_SHOWN} more imports"
    yield ""


def main() -> None:
    """Prints the report on a package folder, by default the one beside the tests."""
    folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "lightning_mics"
    print("\n".join(report(Package(folder))))


if __name__ == "__main__":
    main()
