"""Memory and time of setting a model of 1 GB up from its files, on four ranks together."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pretrained_tools import saved
from torch import nn

from lightning_mics import MiCSConfig, load_pretrained, mics_shard
from lightning_mics.pretrained.huggingface import reading_on_demand
from lightning_mics.testing import WorkerPool

WORLD, ROUNDS, GIB = 4, 5, 2**30


def whole(folder: Path) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


def on_demand(folder: Path) -> nn.Module:
    with reading_on_demand():
        return whole(folder)


def on_meta(folder: Path) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    load_pretrained(model, folder)
    return model


WAYS: dict[str, Callable[[Path], nn.Module]] = {
    "from_pretrained": whole,
    "from_pretrained, on demand": on_demand,
    "load_pretrained": on_meta,
}


def set_up(way: str, folder: Path, shard_size: int) -> tuple[float, int]:
    """Returns the seconds that it takes, and the bytes of this rank's shards."""
    dist.barrier()
    begin = time.perf_counter()
    model = WAYS[way](folder)
    mics_shard(model, MiCSConfig(shard_size=shard_size), device_type="cpu")
    dist.barrier()
    seconds = time.perf_counter() - begin
    size = sum(param.to_local().nbytes for param in model.parameters())  # type: ignore[operator]
    del model
    tidy()
    return seconds, size


def tidy() -> int:
    """Hands freed memory back; returns the process's id."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return os.getpid()


def pss(pids: list[int]) -> int:
    """Returns the bytes that processes take, of which shared pages count once in all."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total


@contextmanager
def peak_of(pids: list[int]) -> Iterator[list[int]]:
    """Yields a list whose last entry becomes the most that processes take together."""
    most, stop = [pss(pids)], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            most.append(max(most[-1], pss(pids)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


@pytest.mark.campaign
def test_memory_and_time_of_a_model_of_1_gb(
    pool: WorkerPool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        **{"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16},
        **{"num_attention_heads": 16, "num_key_value_heads": 16},
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu").bfloat16().float().save_pretrained(tmp_path / "large", max_shard_size="400MB")
    del model
    small = saved(tmp_path, "llama")
    for way in WAYS:  # imports, and what is made once
        pool.run(set_up, way, small, WORLD, world_size=WORLD)
    over: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            pids = pool.run(tidy, world_size=WORLD)
            start = pss(pids)
            with peak_of(pids) as most:
                found = pool.run(set_up, way, tmp_path / "large", WORLD, world_size=WORLD, timeout=300)
            over[way].append((most[-1] - start - sum(size for _, size in found)) / GIB)
            seconds[way].append(max(time for time, _ in found))
    shards = sum(size for _, size in found) / GIB
    lines = [f"shards {shards:.2f} GiB"]
    for way in WAYS:
        lines.append(f"{way}: peak {max(over[way]):+.2f} GiB over shards, {statistics.median(seconds[way]):.1f} s")
    record_property("figures", "; ".join(lines))
    print("\n".join(lines))
    for way in ("from_pretrained, on demand", "load_pretrained"):
        assert max(over[way]) < 0.5
        assert statistics.median(seconds[way]) <= statistics.median(seconds["from_pretrained"])
