"""One rank of a world of 64, on one device: what MiCS costs beside plain FSDP2 on a mesh of the same groups.

python benchmarks/gpu.py gpt2-xl llama-1b --compile --json gpu.jsonl

The process group is PyTorch's fake one: shapes, memory and the host's work are those of a real rank, but no bytes
travel and numbers mean nothing. A collective is a kernel or two on the device. So the tables tell of kernels, streams
and host overhead only; what MiCS saves on the network comes on top. Both are trained in turn, step by step: what drifts
meanwhile is the same for both.

host: until the last kernel of a step is launched. waits: how often the host waited for the device in a step. exposed:
the device's time in a step for which only streams of communication had work.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import tempfile
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
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from lightning_mics import MiCSConfig, defer_replication_sync, mics_shard
from lightning_mics.core._torch import forget_dtensor_meshes
from lightning_mics.core.units import plan_units
from lightning_mics.metrics import format_bytes

WORLD, NODE, RANK = 64, 8, 37
ACCUMULATION = 4
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

Step = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class Workload:
    """A model and the tokens of a microstep, ``[batch, sequence]``."""

    config: Callable[[], PretrainedConfig]
    block: str
    batch: int
    sequence: int


def gpt2(layers: int, width: int, sequence: int) -> PretrainedConfig:
    heads = max(1, width // 64)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=sequence, use_cache=False, **dropout)


def llama(layers: int, width: int, hidden: int) -> PretrainedConfig:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256)}
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": hidden}
    return LlamaConfig(vocab_size=32_000, use_cache=False, **sizes, **heads)


WORKLOADS = {
    "gpt2-xl": Workload(lambda: gpt2(48, 1600, 1024), "GPT2Block", 4, 1024),
    "gpt2-24x1024": Workload(lambda: gpt2(24, 1024, 1024), "GPT2Block", 4, 1024),
    "llama-1b": Workload(lambda: llama(16, 2048, 8192), "LlamaDecoderLayer", 4, 1024),
    "gpt2-tiny": Workload(lambda: gpt2(4, 64, 16), "GPT2Block", 1, 16),
    "llama-tiny": Workload(lambda: llama(2, 128, 256), "LlamaDecoderLayer", 1, 16),
}


@dataclass(frozen=True)
class Contender:
    """A way to shard: MiCS with these settings, or plain FSDP2 on a mesh of the same groups.

    Attributes:
        label: Its name.
        shard_size: Ranks of a partition.
        is_mics: Whether it is MiCS.
        compiles: Whether its blocks are compiled in place, before sharding.
    """

    label: str
    shard_size: int
    is_mics: bool
    compiles: bool = False


def contenders(options: argparse.Namespace) -> list[Contender]:
    """Returns pairs: plain FSDP2, and MiCS."""
    found = []
    for shard_size in options.shard_size:
        for compiles in (False, True) if options.compile else (False,):
            suffix = ", compiled" if compiles else ""
            found.append(
                Contender(f"FSDP2, mesh ({WORLD // shard_size}, {shard_size}){suffix}", shard_size, False, compiles)
            )
            found.append(Contender(f"MiCS, p={shard_size}{suffix}", shard_size, True, compiles))
    return found


@dataclass
class Result:
    """What was measured of a contender, by step."""

    wall_seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    host_waits: int | None = None
    exposed_seconds: float | None = None

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


def build_model(workload: Workload, compiles: bool) -> nn.Module:
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(workload.config())
    if compiles:
        for module in model.modules():
            if type(module).__name__ == workload.block:
                module.compile()
    return model


def accumulate(model: nn.Module, tokens: Tensor) -> None:
    (model(input_ids=tokens, labels=tokens).loss / ACCUMULATION).backward()


def plain_step(model: nn.Module, shard_size: int) -> Step:
    """Shards with FSDP2 in the units of MiCS. It, too, all-reduces once a step."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = plain_mesh((WORLD // shard_size, shard_size))
    for unit in plan_units(model):
        fully_shard(unit[0] if len(unit) == 1 else list(unit), mesh=mesh, mp_policy=policy)
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batches: Sequence[Tensor]) -> None:
        for index, tokens in enumerate(batches):
            sharded.set_requires_all_reduce(index + 1 == len(batches))
            accumulate(model, tokens)
        optimizer.step()
        optimizer.zero_grad()

    return step


def mics_step(model: nn.Module, shard_size: int) -> Step:
    # The self-check would find out that the other ranks are not there.
    config = MiCSConfig(shard_size=shard_size, node_size=NODE, param_dtype="bfloat16", verify=False)
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


class Running:
    """A contender that has been set up and warmed up.

    Args:
        contender: Who it is.
        workload: What it trains.
        warmup: Steps that are not measured.
    """

    def __init__(self, contender: Contender, workload: Workload, warmup: int) -> None:
        before = allocated_bytes()
        model = build_model(workload, contender.compiles)
        self._step = (mics_step if contender.is_mics else plain_step)(model, contender.shard_size)
        vocabulary = model.config.vocab_size
        shape = (ACCUMULATION, workload.batch, workload.sequence)
        self._batches = list(torch.randint(vocabulary, shape, device=DEVICE))
        del model
        for _ in range(warmup):
            self._step(self._batches)
        synchronize()
        gc.collect()
        self._own_bytes = allocated_bytes() - before
        self.result = Result()

    def measure(self) -> None:
        """Adds a step to the result."""
        others = allocated_bytes() - self._own_bytes
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        self._step(self._batches)
        self.result.host_seconds.append(time.perf_counter() - start)
        synchronize()
        self.result.wall_seconds.append(time.perf_counter() - start)
        if DEVICE.type == "cuda":
            self.result.peak_bytes = max(self.result.peak_bytes, torch.cuda.max_memory_allocated() - others)

    def inspect(self) -> None:
        """Counts what would disturb the clock: a step's waits, and its exposed communication."""
        if DEVICE.type != "cuda":
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self._step(self._batches)
            torch.cuda.set_sync_debug_mode("default")
        self.result.host_waits = sum("called a synchronizing CUDA operation" in str(entry.message) for entry in caught)
        synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self._step(self._batches)
            synchronize()
        self.result.exposed_seconds = exposed_seconds(profiler)


def exposed_seconds(profiler: torch.profiler.profile) -> float:
    """Returns the time for which streams had work, but not the one of computation: the one with most of it."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    by_stream: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            by_stream.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    compute = max(by_stream.values(), key=covered)
    everything = [interval for intervals in by_stream.values() for interval in intervals]
    return (covered(everything) - covered(compute)) / 1e6


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Returns the length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def allocated_bytes() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def compare(workload: Workload, options: argparse.Namespace) -> dict[Contender, Result]:
    """Measures all contenders, step by step in turn."""
    running = {contender: Running(contender, workload, options.warmup) for contender in contenders(options)}
    for _ in range(options.steps):
        for entry in running.values():
            entry.measure()
    for entry in running.values():
        entry.inspect()
    return {contender: entry.result for contender, entry in running.items()}


def clean_up() -> None:
    """Frees the last models, which are full of reference cycles."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# --- telling ----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    is_cuda = DEVICE.type == "cuda"
    card = torch.cuda.get_device_name() if is_cuda else None
    return {"torch": torch.__version__, "cuda": torch.version.cuda if is_cuda else None, "card": card}


def make_table(name: str, workload: Workload, results: dict[Contender, Result]) -> Table:
    title = f"{name}, {workload.batch} x {workload.sequence} tokens, {ACCUMULATION} microsteps a step"
    caption = f"Medians of {len(next(iter(results.values())).wall_seconds)} steps; ratios are to FSDP2 above."
    table = Table(title=f"{title}; rank {RANK} of {WORLD}", caption=caption)
    table.add_column("contender", no_wrap=True)
    for column in ("step, ms", "ratio", "host, ms", "ratio", "peak memory", "ratio", "waits", "exposed, ms"):
        table.add_column(column, justify="right")
    plain = next(iter(results.values()))
    for contender, result in results.items():
        plain = plain if contender.is_mics else result
        cells = [f"{result.wall * 1e3:.1f}", f"{result.wall / plain.wall:.3f}"]
        cells += [f"{result.host * 1e3:.1f}", f"{result.host / plain.host:.3f}"]
        cells += (
            [format_bytes(result.peak_bytes), f"{result.peak_bytes / plain.peak_bytes:.3f}"]
            if plain.peak_bytes
            else ["-"] * 2
        )
        cells += ["-" if result.host_waits is None else str(result.host_waits)]
        cells += ["-" if result.exposed_seconds is None else f"{result.exposed_seconds * 1e3:.1f}"]
        table.add_row(contender.label, *cells)
    return table


def append_json(path: Path, name: str, workload: Workload, results: dict[Contender, Result]) -> None:
    case = {"workload": name, "batch": workload.batch, "sequence": workload.sequence, "accumulation": ACCUMULATION}
    with path.open("a") as file:
        for contender, result in results.items():
            medians = {"wall_median": result.wall, "host_median": result.host}
            record = {**asdict(contender), **case, **medians, **asdict(result), **versions()}
            file.write(json.dumps(record) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse checks a default of several words against the choices as one.
    known = ", ".join(WORKLOADS)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"default gpt2-xl llama-1b; known: {known}")
    parser.add_argument("--shard-size", type=int, nargs="+", default=[8], help="ranks of a partition; default 8")
    parser.add_argument("--compile", action="store_true", help="also with blocks compiled in place")
    for name, default in {"steps": 7, "warmup": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each contender")
    options = parser.parse_args()
    options.workloads = options.workloads or ["gpt2-xl", "llama-1b"]
    if unknown := [name for name in options.workloads if name not in WORKLOADS]:
        parser.error(f"unknown workload {unknown[0]!r}; known: {known}")
    return options


def main() -> None:
    options = parse_options()
    warnings.filterwarnings("ignore")
    if DEVICE.type == "cuda":
        torch.cuda.init()
        torch.cuda.set_device(DEVICE)
    console = Console(width=None if Console().is_terminal else 130)
    with fake_world():
        for name in options.workloads:
            results = compare(WORKLOADS[name], options)
            console.print(make_table(name, WORKLOADS[name], results))
            if options.json is not None:
                append_json(options.json, name, WORKLOADS[name], results)
            del results
            clean_up()
    found = versions()
    console.print(f"torch {found['torch']}, CUDA {found['cuda'] or '-'}, {found['card'] or 'no card'}", highlight=False)
    if DEVICE.type == "cpu":
        console.print("No CUDA device: steps ran on the CPU, where only host overhead is meaningful (on small models).")


if __name__ == "__main__":
    main()
