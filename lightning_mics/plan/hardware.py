"""Accelerators, links, nodes and clusters: those of the catalogue, and the user's own from YAML."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import parse_quantity
from lightning_mics.topology import ClusterTopology, check_positive_int
from lightning_mics.yaml_text import read_yaml

_SECTIONS = ("accelerators", "hosts", "networks", "fabrics", "instances")
_CATALOGUE = "catalogue.yaml"
# Fields that are quantities: the unit, a value that works, and the least that does where zero would do.
_QUANTITIES: dict[str, tuple[str, str, float | None]] = {
    "bandwidth": ("B/s", "100 Gbit/s", None),
    "compute_efficiency": ("", "0.8", None),
    "efficiency": ("", "0.8", None),
    "attention_efficiency": ("", "0.6", 0.0),
    "latency": ("s", "20 us", 0.0),
    "launch": ("s", "10 us", 0.0),
    "memory": ("B", "40 GiB", 1.0),
    "optimizer_efficiency": ("", "0.8", None),
    "product_efficiency": ("", "0.8", 0.0),
    "memory_bandwidth": ("B/s", "1555 GB/s", None),
    "host_bandwidth": ("B/s", "32 GB/s", None),
    "unit": ("s", "500 us", 0.0),
    "unit_overhead": ("s", "1 ms", 0.0),
    "workspace": ("B", "32 MiB", 0.0),
}


@dataclass(frozen=True, kw_only=True)
class Link:
    """What carries collectives, inside a node or between nodes.

    Attributes:
        bandwidth: Nominal bytes a second, one way: of one accelerator inside a node, of the whole node between nodes.
        efficiency: Share of the bandwidth that large collectives reach, above 0 and at most 1.
        latency: Seconds that a step of a ring takes whatever its size.
        source: Where the figures are from.
    """

    bandwidth: float
    efficiency: float
    latency: float
    source: str = ""

    @property
    def rate(self) -> float:
        """Bytes a second that large collectives reach."""
        return self.bandwidth * self.efficiency


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A device that computes for one rank.

    Attributes:
        name: What to call it.
        memory: Its bytes.
        peak_flops: Dense FLOP/s by dtype of the matrix products, for example ``"bfloat16"``.
        memory_bandwidth: Bytes a second between the device and its memory.
        compute_efficiency: Share of the peak that a model's passes reach, above 0 and at most 1; where the two below
            are not known, or not what a model computes.
        product_efficiency: Share of the peak that products of large matrices reach; 0 if it is not known.
        attention_efficiency: The same of attention in one piece.
        device_type: ``"cuda"`` or ``"cpu"``.
        unit_overhead: Seconds of host time in each pass of an FSDP unit that compute waits for. Accelerators hide it:
            their host runs ahead.
        host_bandwidth: Bytes a second between the device's memory and the host's, one way; that of 16 lanes of PCI
            Express 4.0 unless it is given.
        workspace: Bytes of scratch memory that PyTorch gives cuBLAS, for each thread that multiplies matrices.
        optimizer_efficiency: Share of the bandwidth that an optimizer's step reaches, above 0 and at most 1.
        source: Where the figures are from.
    """

    name: str
    memory: int
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    compute_efficiency: float
    device_type: str = "cuda"
    unit_overhead: float = 0.0
    host_bandwidth: float = 32e9
    workspace: float = 8.125 * 2**20
    optimizer_efficiency: float = 1.0
    product_efficiency: float = 0.0
    attention_efficiency: float = 0.0
    source: str = ""

    def peak_in(self, dtype: str) -> float:
        """Returns the peak of a dtype, in FLOP/s; the two dtypes of 16 bits stand for each other.

        Raises:
            MiCSConfigError: If it is not known.
        """
        same = {"bfloat16": "float16", "float16": "bfloat16"}
        peak = self.peak_flops.get(dtype) or self.peak_flops.get(same.get(dtype, dtype))
        if peak is None:
            raise MiCSConfigError(
                f"The peak of {self.name} in {dtype} is not known. Add it to its peak_flops, which has "
                f"{', '.join(self.peak_flops)}; or plan for another precision."
            )
        return peak


@dataclass(frozen=True, kw_only=True)
class Host:
    """A processor, of which one core launches what the accelerator of a rank computes.

    Attributes:
        launch: Seconds of an operation in a forward pass, with what Python does for it; 0 if they are not counted.
        unit: Seconds of what FSDP2 does for a unit before a pass: the gather, copies, hooks.
        name: What to call it.
        source: Where the figures are from.
    """

    launch: float = 0.0
    unit: float = 0.0
    name: str = "host"
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine with equal accelerators.

    Attributes:
        name: What to call it.
        accelerator: What it has.
        num_accelerators: How many of them.
        intra: The link between its accelerators, as one of them sees it.
        inter: The link to other nodes, of the whole node.
        source: Where the figures are from.
        host: What launches its accelerators' work.
    """

    name: str
    accelerator: Accelerator
    num_accelerators: int
    intra: Link
    inter: Link
    source: str = ""
    host: Host = Host()


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes.

    Attributes:
        node: What each of them is.
        num_nodes: How many there are.

    Raises:
        MiCSConfigError: If ``num_nodes`` is not a positive whole number.
    """

    node: Node
    num_nodes: int

    def __post_init__(self) -> None:
        check_positive_int("num_nodes", self.num_nodes, 2)

    @property
    def world_size(self) -> int:
        """Number of ranks: one for each accelerator."""
        return self.num_nodes * self.node.num_accelerators

    @property
    def topology(self) -> ClusterTopology:
        """Its ranks and nodes."""
        return ClusterTopology(world_size=self.world_size, node_size=self.node.num_accelerators)

    def with_nodes(self, num_nodes: int) -> Cluster:
        """Returns the same with another number of nodes."""
        return replace(self, num_nodes=num_nodes)

    def with_host(self, host: Host) -> Cluster:
        """Returns the same with another host."""
        return replace(self, node=replace(self.node, host=host))

    def with_links_at(self, share: float) -> Cluster:
        """Returns the same with links between nodes that give a share of their rate."""
        inter = replace(self.node.inter, bandwidth=self.node.inter.bandwidth * share)
        return replace(self, node=replace(self.node, inter=inter))


def find_instance(name: str, num_nodes: int) -> Cluster:
    """Returns a cluster of a cloud's instances, or of a generic node of the catalogue.

    Raises:
        MiCSConfigError: If the name is unknown (the nearest known one is suggested), or ``num_nodes`` is not positive.
    """
    return Cluster(node=_Reader(_catalogue()).instance(name), num_nodes=num_nodes)


def load_cluster(path: str | os.PathLike[str], num_nodes: int | None = None) -> Cluster:
    """Reads a cluster from a YAML file.

    Args:
        path: A file with ``instance``, or with ``accelerator``, ``num_accelerators``, ``intra`` and ``inter``, each by
            its name in the catalogue or in full; and with ``num_nodes``. Sections named like the catalogue's extend
            it.
        num_nodes: Number of nodes; wins over the file's.

    Raises:
        MiCSConfigError: If the file cannot be read, or something in it is unknown or cannot work; names the key.
    """
    values = _read_yaml(Path(path))
    reader = _Reader(_extended(_catalogue(), values, str(path)), f"{path}: ")
    return reader.cluster({key: value for key, value in values.items() if key not in _SECTIONS}, num_nodes)


def cluster_to_yaml(cluster: Cluster) -> str:
    """Returns the text of a file that :func:`load_cluster` reads as this cluster, with all figures in full."""
    node = cluster.node
    values = {"name": node.name, "num_nodes": cluster.num_nodes, **asdict(node)}
    values["accelerator"]["peak_flops"] = dict(node.accelerator.peak_flops)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def find_host(name: str) -> Host:
    """Returns a host of the catalogue.

    Raises:
        MiCSConfigError: If the name is unknown.
    """
    return _Reader(_catalogue()).host(name)


def known_names(section: str) -> list[str]:
    """Returns the names in a section of the catalogue: accelerators, hosts, networks, fabrics or instances."""
    return list(_catalogue()[section])


def find_accelerator(device_name: str, memory: int) -> Accelerator | None:
    """Returns the accelerator of the catalogue that a driver's name and memory mean; ``None`` if there is none.

    Args:
        device_name: As the driver says it, for example ``"NVIDIA A100-SXM4-40GB"``.
        memory: Its bytes.
    """
    reader = _Reader(_catalogue())
    said = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    # The last word of a name is its memory, which drivers do not always say.
    words = {name: name.lower().split("-")[:-1] for name in known_names("accelerators")}
    same = [reader.accelerator(name) for name in words if said.issuperset(words[name])]
    return min(same, key=lambda entry: (-len(words[entry.name]), abs(entry.memory - memory)), default=None)


@functools.cache
def _catalogue() -> dict[str, dict[str, Any]]:
    text = (importlib.resources.files("lightning_mics.plan") / _CATALOGUE).read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    values = read_yaml(path, "'instance: p4d.24xlarge'")
    if not isinstance(values, dict):
        raise MiCSConfigError(f"{path} must hold lines like 'instance: p4d.24xlarge', not {values!r}.")
    return values


def _extended(catalogue: dict[str, dict[str, Any]], values: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    result = dict(catalogue)
    for section in _SECTIONS:
        own = values.get(section, {})
        if not isinstance(own, dict) or not all(isinstance(entry, dict) for entry in own.values()):
            raise MiCSConfigError(f"{where}: {section} must hold names, each with lines of its own, not {own!r}.")
        result[section] = {**catalogue[section], **{str(name): entry for name, entry in own.items()}}
    return result


class _Reader:
    """Builds hardware from mappings, and says where something is wrong.

    Args:
        catalogue: What names mean.
        where: What messages begin with: the file and a colon.
    """

    def __init__(self, catalogue: Mapping[str, Mapping[str, Any]], where: str = "") -> None:
        self._catalogue, self._where = catalogue, where

    def cluster(self, values: dict[str, Any], num_nodes: int | None) -> Cluster:
        written = values.pop("num_nodes", 1)
        instance = values.pop("instance", None)
        values = self._with_inter(values)
        if instance is not None:
            values = {**self._instance(instance), **values}
        node = self._node(values)
        return Cluster(node=node, num_nodes=self._count("num_nodes", written, 2) if num_nodes is None else num_nodes)

    def instance(self, name: str) -> Node:
        return self._node(self._instance(name))

    def _instance(self, name: object) -> dict[str, Any]:
        return {**self._with_inter(self._known("instances", name)), "name": str(name)}

    def _with_inter(self, values: dict[str, Any]) -> dict[str, Any]:
        if "network" not in values:
            return values
        if "inter" in values:
            raise self._error("network and inter are two names of one thing. Keep one of them")
        return {"inter" if key == "network" else key: value for key, value in values.items()}

    def _node(self, values: dict[str, Any]) -> Node:
        self._check_keys(values, Node, "", extra=("network", "instance", "num_nodes", *_SECTIONS))
        for key in ("accelerator", "num_accelerators", "intra", "inter"):
            if key not in values:
                names = {"accelerator": "accelerators", "intra": "fabrics", "inter": "networks"}.get(key)
                example = f"{key}: {next(iter(self._catalogue[names]))}" if names else f"{key}: 8"
                raise self._error(f"{key} is missing. Add a line such as '{example}', or 'instance: p4d.24xlarge'")
        return Node(
            name=str(values.get("name", "cluster")),
            accelerator=self.accelerator(values["accelerator"]),
            num_accelerators=self._count("num_accelerators", values["num_accelerators"], 8),
            intra=self._link("intra", "fabrics", values["intra"]),
            inter=self._link("inter", "networks", values["inter"]),
            source=str(values.get("source", "")),
            host=self.host(values.get("host", "ordinary")),
        )

    def host(self, value: Any) -> Host:
        known = value if isinstance(value, dict) else {"name": value, **self._known("hosts", value)}
        return Host(**self._fields(Host, known, "host."))

    def accelerator(self, value: Any) -> Accelerator:
        known = value if isinstance(value, dict) else {"name": value, **self._known("accelerators", value)}
        values = self._fields(Accelerator, known, "accelerator.")
        peaks, kind = values["peak_flops"], values.get("device_type", "cuda")
        if not isinstance(peaks, dict) or not peaks:
            raise self._error(f"accelerator.peak_flops is {peaks!r}. Try peak_flops: {{bfloat16: 312 TFLOP/s}}")
        if kind not in ("cuda", "cpu"):
            raise self._error(f"accelerator.device_type is {kind!r}. Values that work: cuda, cpu")
        values["memory"] = int(values["memory"])
        values["peak_flops"] = {
            str(dtype): self._quantity(f"accelerator.peak_flops.{dtype}", peak, "FLOP/s", "312 TFLOP/s")
            for dtype, peak in peaks.items()
        }
        return Accelerator(**values)

    def _link(self, name: str, section: str, value: Any) -> Link:
        known = value if isinstance(value, dict) else self._known(section, value, f"{name}: ")
        return Link(**self._fields(Link, known, f"{name}."))

    def _fields(self, kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Returns values as the fields of a kind of hardware: checked, and in base units."""
        self._check_keys(values, kind, prefix)
        missing = [entry.name for entry in fields(kind) if entry.default is MISSING and entry.name not in values]
        if missing:
            raise self._error(f"{prefix}{missing[0]} is missing")
        result: dict[str, Any] = {
            key: str(value) if key in ("name", "source") else value for key, value in values.items()
        }
        for key in result.keys() & _QUANTITIES.keys():
            result[key] = self._quantity(f"{prefix}{key}", values[key], *_QUANTITIES[key])
            if key.endswith("efficiency") and result[key] > 1:
                raise self._error(f"{prefix}{key} is {result[key]:g}, and must be at most 1. Try 0.8")
        return result

    def _known(self, section: str, name: object, prefix: str = "") -> dict[str, Any]:
        known = self._catalogue[section]
        if str(name) not in known:
            raise self._error(f"{prefix}{section[:-1]} {name!r} is unknown. {_suggest(str(name), known)}")
        return dict(known[str(name)])

    def _check_keys(self, values: Mapping[str, Any], kind: type, prefix: str, extra: Iterable[str] = ()) -> None:
        known = [entry.name for entry in fields(kind)]
        for key in values:
            if key not in known:
                others = [name for name in (*known, *extra) if name != key]
                raise self._error(f"key {prefix + str(key)!r} is unknown. {_suggest(str(key), others)}")

    def _count(self, key: str, value: object, example: int) -> int:
        try:
            return check_positive_int(key, value, example)
        except MiCSConfigError as error:
            raise self._error(str(error)) from None

    def _quantity(self, key: str, value: object, unit: str, example: str, least: float | None = None) -> float:
        """Returns a number in a base unit, above zero or at least as large as ``least``."""
        number: float | None = None
        if isinstance(value, str):
            number = parse_quantity(value, unit)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            number = math.inf if abs(value) > sys.float_info.max else float(value)
        if number is None:
            raise self._error(f"{key} is {value!r}, which is no quantity. Try {example!r}")
        if not math.isfinite(number) or (number <= 0 if least is None else number < least):
            bound = "positive" if least is None else f"at least {least:g}"
            shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
            raise self._error(f"{key} is {shown}, and must be finite and {bound}. Try {example!r}")
        return number

    def _error(self, message: str) -> MiCSConfigError:
        end = "" if message.endswith((".", "?")) else "."
        return MiCSConfigError(f"{self._where}{message}{end}")


def _suggest(name: str, known: Iterable[str]) -> str:
    by_case = {entry.lower(): entry for entry in known}
    near = [by_case[found] for found in difflib.get_close_matches(name.lower(), by_case, n=2, cutoff=0.5)]
    question = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{question}Known: {', '.join(by_case.values())}."
