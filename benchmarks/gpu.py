"""One rank of a world of 64, on one device: what MiCS costs beside plain FSDP2 where the network is free.

python benchmarks/gpu.py --layers 24 --width 2048 --sequence 1024 --batch 4 --json gpu.jsonl

The process group is PyTorch's fake one: shapes, memory and the host's work are those of a real rank, but no bytes
travel and numbers mean nothing. A collective is a kernel or two on the device. So the table tells of kernels, streams
and host overhead only; what MiCS saves on the network comes on top.

Host time is until the last kernel is launched. In MiCS it includes one wait for the device a step: at the end of a
window ranks agree on which parameters were used, and the host reads the answer.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.bench import workload
from lightning_mics.bench.workload import ModelSpec
from lightning_mics.core._torch import forget_dtensor_meshes
from lightning_mics.core.units import plan_units
from lightning_mics.metrics import format_bytes

WORLD, NODE, RANK = 64, 8, 37
ACCUMULATION = 4
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

Step = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class Contender:
    """A way to shard: the shape of a plain FSDP2 mesh, or MiCS."""

    label: str
    mesh: tuple[int, ...] = ()
    mics: dict[str, Any] = field(default_factory=dict)


CONTENDERS = (
    Contender("FSDP2, 64 ranks", mesh=(WORLD,)),
    Contender("FSDP2, 2-D mesh (8, 8)", mesh=(WORLD // NODE, NODE)),
    Contender("MiCS p=8", mics={"shard_size": 8}),
    Contender("MiCS p=16 hierarchical", mics={"shard_size": 16, "hierarchical": True}),
)


@dataclass
class Result:
    """Optimizer steps of all rounds."""

    wall_seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def wall(self) -> float:
        return statistics.median(self.wall_seconds)

    @property
    def host(self) -> float:
        return statistics.median(self.host_seconds)


# --- the world --------------------------------------------------------------------------------------------------------


class _Done(dist.Work):
    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True


def _gather(group: dist.ProcessGroup, output: Tensor, source: Tensor, *options: Any) -> dist.Work:
    parts, rank = output.view(group.size(), -1), group.rank()
    in_place = parts[rank].data_ptr() == source.data_ptr()
    for others in (parts[:rank], parts[rank + 1 :]) if in_place else (parts,):
        if len(others):
            others.copy_(source.view(1, -1))
    return _Done()


def _reduce_scatter(group: dist.ProcessGroup, output: Tensor, source: Tensor, *options: Any) -> dist.Work:
    output.copy_(source.view(group.size(), *output.shape)[group.rank()])
    return _Done()


def _all_reduce(group: dist.ProcessGroup, tensors: list[Tensor], *options: Any) -> dist.Work:
    for tensor in tensors:
        tensor.mul_(1)
    return _Done()


def _each(collective: Callable[..., dist.Work]) -> Callable[..., dist.Work]:
    def coalesced(group: dist.ProcessGroup, outputs: list[Tensor], sources: list[Tensor], *options: Any) -> dist.Work:
        for output, source in zip(outputs, sources, strict=True):
            collective(group, output, source)
        return _Done()

    return coalesced


# Names of torch 2.13, and those before.
_COLLECTIVES = {
    "all_gather_single": _gather,
    "_allgather_base": _gather,
    "all_gather_single_coalesced": _each(_gather),
    "allgather_into_tensor_coalesced": _each(_gather),
    "reduce_scatter_single": _reduce_scatter,
    "_reduce_scatter_base": _reduce_scatter,
    "reduce_scatter_single_coalesced": _each(_reduce_scatter),
    "reduce_scatter_tensor_coalesced": _each(_reduce_scatter),
    "allreduce": _all_reduce,
}


@contextmanager
def fake_world() -> Iterator[None]:
    """Sets up one rank of the world.

    The fake backend gathers with one kernel for each rank of the group, and all-reduces with none. That would charge
    contenders for the sizes of their groups. Here every collective is a kernel or two, about what it is with NCCL.
    """
    with ExitStack() as stack:
        for name, collective in _COLLECTIVES.items():
            if hasattr(dist.ProcessGroup, name):
                stack.enter_context(mock.patch.object(dist.ProcessGroup, name, collective))
        dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
        try:
            yield
        finally:
            plain_mesh.cache_clear()
            dist.destroy_process_group()
            forget_dtensor_meshes()


@functools.cache
def plain_mesh(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh(DEVICE.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


# --- training ---------------------------------------------------------------------------------------------------------


def build_model(options: argparse.Namespace) -> nn.Module:
    spec = ModelSpec(
        layers=options.layers, width=options.width, sequence=options.sequence, vocabulary=options.vocabulary
    )
    with DEVICE:
        return workload.build_model(spec)


def accumulate(model: nn.Module, tokens: Tensor) -> None:
    (model(input_ids=tokens, labels=tokens).loss / ACCUMULATION).backward()


def plain_step(model: nn.Module, mesh: DeviceMesh) -> Step:
    """Shards with FSDP2 in the units of MiCS. On two dimensions it, too, all-reduces once a step."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in plan_units(model):
        fully_shard(unit[0] if len(unit) == 1 else list(unit), mesh=mesh, mp_policy=policy)
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batches: Sequence[Tensor]) -> None:
        for index, tokens in enumerate(batches):
            if mesh.ndim == 2:
                sharded.set_requires_all_reduce(index + 1 == len(batches))
            accumulate(model, tokens)
        optimizer.step()
        optimizer.zero_grad()

    return step


def mics_step(model: nn.Module, settings: dict[str, Any]) -> Step:
    # The self-check would find out that the other ranks are not there.
    config = MiCSConfig(node_size=NODE, param_dtype="bfloat16", verify=False, **settings)
    mics_shard(model, config, device_type=DEVICE.type)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batches: Sequence[Tensor]) -> None:
        for index, tokens in enumerate(batches):
            with defer_replication_sync(model, enabled=index + 1 < len(batches)):
                accumulate(model, tokens)
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- measuring --------------------------------------------------------------------------------------------------------


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(contender: Contender, options: argparse.Namespace, result: Result) -> None:
    """Adds one round to ``result``. The model is built anew, so that no contender sees another one's memory."""
    model = build_model(options)
    step = mics_step(model, contender.mics) if contender.mics else plain_step(model, plain_mesh(contender.mesh))
    shape = (ACCUMULATION, options.batch, options.sequence)
    batches = list(torch.randint(options.vocabulary, shape, device=DEVICE))
    for _ in range(options.warmup):
        step(batches)
    synchronize()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.steps):
        start = time.perf_counter()
        step(batches)
        result.host_seconds.append(time.perf_counter() - start)
        synchronize()
        result.wall_seconds.append(time.perf_counter() - start)
    if DEVICE.type == "cuda":
        result.peak_bytes = max(result.peak_bytes or 0, torch.cuda.max_memory_allocated())


def clean_up() -> None:
    """Frees the last model, which is full of reference cycles."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def compare(options: argparse.Namespace) -> list[Result]:
    results = [Result() for _ in CONTENDERS]
    for _ in range(options.rounds):
        for contender, result in zip(CONTENDERS, results, strict=True):
            measure(contender, options, result)
            clean_up()
    return results


# --- telling ----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    is_cuda = DEVICE.type == "cuda"
    card = torch.cuda.get_device_name() if is_cuda else None
    return {"torch": torch.__version__, "cuda": torch.version.cuda if is_cuda else None, "card": card}


def make_table(options: argparse.Namespace, results: list[Result]) -> Table:
    title = f"GPT-2, {options.layers} x {options.width}, {options.batch} x {options.sequence} tokens"
    caption = f"Medians; ratios are to {CONTENDERS[0].label}."
    table = Table(title=f"{title}, {ACCUMULATION} microsteps a step; rank {RANK} of {WORLD}", caption=caption)
    table.add_column("contender", no_wrap=True)
    for column in ("step, ms", "ratio", "host, ms", "ratio", "peak memory", "ratio"):
        table.add_column(column, justify="right")
    plain = results[0]
    for contender, result in zip(CONTENDERS, results, strict=True):
        cells = [f"{result.wall * 1e3:.1f}", f"{result.wall / plain.wall:.3f}"]
        cells += [f"{result.host * 1e3:.1f}", f"{result.host / plain.host:.3f}"]
        if result.peak_bytes is None or plain.peak_bytes is None:
            cells += ["-", "-"]
        else:
            cells += [format_bytes(result.peak_bytes), f"{result.peak_bytes / plain.peak_bytes:.3f}"]
        table.add_row(contender.label, *cells)
    return table


def append_json(path: Path, options: argparse.Namespace, results: list[Result]) -> None:
    names = ("layers", "width", "sequence", "batch", "vocabulary", "rounds", "steps", "warmup")
    case = {name: getattr(options, name) for name in names}
    with path.open("a") as file:
        for contender, result in zip(CONTENDERS, results, strict=True):
            medians = {"wall_median": result.wall, "host_median": result.host}
            record = {**asdict(contender), **case, **medians, **asdict(result), **versions()}
            file.write(json.dumps(record) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 12, "width": 768, "sequence": 512, "batch": 4, "vocabulary": 50304}
    for name, default in {**sizes, "rounds": 3, "steps": 5, "warmup": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each contender")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    warnings.filterwarnings("ignore")
    if DEVICE.type == "cuda":
        torch.cuda.init()
        torch.cuda.set_device(DEVICE)
    with fake_world():
        results = compare(options)
    console = Console()
    console.print(make_table(options, results))
    found = versions()
    console.print(f"torch {found['torch']}, CUDA {found['cuda'] or '-'}, {found['card'] or 'no card'}", highlight=False)
    if DEVICE.type == "cpu":
        console.print("No CUDA device: steps ran on the CPU, where only host overhead is meaningful (on small models).")
    if options.json is not None:
        append_json(options.json, options, results)


if __name__ == "__main__":
    main()
