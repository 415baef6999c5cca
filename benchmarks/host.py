"""What MiCS costs the host beside plain FSDP2 on a two-dimensional mesh of the same groups and units.

python benchmarks/host.py --steps 30 --json host.jsonl

One rank of a world of 64 on PyTorch's fake process group, with blocks so narrow that Python is what takes time. Both
models live in one process, and their steps take turns, so that what the machine does meanwhile reaches both. Times are
those of the processor, as nothing here waits. Function calls are counted by ``cProfile`` in steps of their own.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import gc
import importlib
import json
import pkgutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import lightning_mics
from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.bench import workload
from lightning_mics.bench.workload import ModelSpec
from lightning_mics.config import as_dtype
from lightning_mics.core._torch import forget_dtensor_meshes
from lightning_mics.core.units import plan_units

WORLD, SHARD, RANK = 64, 8, 37
_PACKAGE = str(Path(lightning_mics.__file__).parent)

Step = Callable[[], None]
# File, line and name of a function, as cProfile has it.
_Code = tuple[str, int, str]


@dataclass(frozen=True)
class Calls:
    """Function calls a microstep and unit.

    Attributes:
        total: All of them, those of functions in C too.
        ours: Those of functions in lightning_mics.
        properties: Reads of properties among these.
    """

    total: float
    ours: float
    properties: float


@contextmanager
def fake_world() -> Iterator[None]:
    """Sets up one rank of the world."""
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        forget_dtensor_meshes()


def build_model(options: argparse.Namespace) -> nn.Module:
    spec = ModelSpec(layers=options.layers, width=options.width, sequence=options.sequence)
    return workload.build_model(spec)


def plain_step(model: nn.Module, options: argparse.Namespace) -> Step:
    """Shards with FSDP2 alone, in the units of MiCS; returns a step, which all-reduces once, too."""
    mesh = init_device_mesh("cpu", (WORLD // SHARD, SHARD), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=as_dtype(options.param_dtype), reduce_dtype=torch.float32)
    for unit in plan_units(model):
        fully_shard(unit[0] if len(unit) == 1 else list(unit), mesh=mesh, mp_policy=policy)
    root: FSDPModule = fully_shard(model, mesh=mesh, mp_policy=policy)
    microstep, optimize = training(model, options)

    def step() -> None:
        root.set_requires_all_reduce(False)  # it goes through all modules, so not in every microstep
        for _ in range(options.accumulation - 1):
            microstep()
        root.set_requires_all_reduce(True)
        microstep()
        optimize()

    return step


def mics_step(model: nn.Module, options: argparse.Namespace) -> Step:
    """Shards with MiCS; returns a step."""
    # The self-check would find out that the other ranks are not there.
    config = MiCSConfig(shard_size=SHARD, node_size=SHARD, verify=False, param_dtype=options.param_dtype)
    mics_shard(model, config, device_type="cpu")
    microstep, optimize = training(model, options)

    def step() -> None:
        for index in range(options.accumulation):
            with defer_replication_sync(model, enabled=index + 1 < options.accumulation):
                microstep()
        optimize()

    return step


def training(model: nn.Module, options: argparse.Namespace) -> tuple[Step, Step]:
    """Returns a microstep, and what the optimizer does."""
    batch = torch.randint(256, (1, options.sequence))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def microstep() -> None:
        model(input_ids=batch, labels=batch).loss.backward()

    def optimize() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return microstep, optimize


# --- measuring --------------------------------------------------------------------------------------------------------


def interleaved(steps: list[Step], count: int) -> list[list[float]]:
    """Returns the seconds of each step; the contenders' take turns."""
    seconds: list[list[float]] = [[] for _ in steps]
    gc.collect()
    gc.disable()
    for index in range(count):
        for turn in range(len(steps)):
            which = (index + turn) % len(steps)
            begin = time.process_time()
            steps[which]()
            seconds[which].append(time.process_time() - begin)
        gc.collect()
    gc.enable()
    return seconds


def count_calls(step: Step, per: int) -> Calls:
    """Counts function calls of one step, divided by microsteps and units."""
    profile = cProfile.Profile()
    profile.enable()
    step()
    profile.disable()
    properties = property_getters()
    total = ours = reads = 0
    for entry in profile.getstats():
        total += entry.callcount
        if isinstance(entry.code, str) or not entry.code.co_filename.startswith(_PACKAGE):
            continue
        ours += entry.callcount
        code = (entry.code.co_filename, entry.code.co_firstlineno, entry.code.co_name)
        reads += entry.callcount if code in properties else 0
    return Calls(total / per, ours / per, reads / per)


@functools.cache
def property_getters() -> frozenset[_Code]:
    """Returns the getters of all properties in the core."""
    found: set[_Code] = set()
    core = importlib.import_module("lightning_mics.core")
    for info in pkgutil.walk_packages(core.__path__, "lightning_mics.core."):
        for value in vars(importlib.import_module(info.name)).values():
            members = vars(value).values() if isinstance(value, type) else ()
            for getter in (member.fget for member in members if isinstance(member, property)):
                found.add((getter.__code__.co_filename, getter.__code__.co_firstlineno, getter.__code__.co_name))
    return frozenset(found)


# --- telling ----------------------------------------------------------------------------------------------------------


def make_table(options: argparse.Namespace, seconds: list[list[float]], calls: list[Calls]) -> Table:
    title = f"{options.layers} blocks, {options.accumulation} microsteps a step; rank {RANK} of {WORLD}, p={SHARD}"
    table = Table(title=title, caption="Medians of interleaved steps; calls are a microstep and unit.")
    for column in ("", "CPU, ms a step", "ratio", "calls", "ours", "property reads"):
        table.add_column(column, justify="right" if column else "left")
    plain = statistics.median(seconds[0])
    for label, times, count in zip(("FSDP2, 2-D mesh", "MiCS"), seconds, calls, strict=True):
        median = statistics.median(times)
        counts = (f"{count.total:.1f}", f"{count.ours:.1f}", f"{count.properties:.1f}")
        table.add_row(label, f"{median * 1e3:.1f}", f"{median / plain:.3f}", *counts)
    return table


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 48, "width": 64, "sequence": 4, "accumulation": 4, "steps": 20, "warmup": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--param-dtype", metavar="DTYPE", help="such as bfloat16; gradients are reduced in float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with fake_world():
        steps = [make(build_model(options), options) for make in (plain_step, mics_step)]
        interleaved(steps, options.warmup)
        seconds = interleaved(steps, options.steps)
        calls = [count_calls(step, options.accumulation * (options.layers + 1)) for step in steps]
        del steps
    Console().print(make_table(options, seconds, calls))
    if options.json is not None:
        case = {name: value for name, value in vars(options).items() if name != "json"}
        record = {**case, "torch": torch.__version__, "seconds": seconds, "calls": [asdict(count) for count in calls]}
        with options.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
