"""Step times of ways to compile a sharded model, beside eager steps, interleaved step by step.

``torchrun --nproc-per-node 2 benchmarks/compiled.py [--device cuda]`` prints a table of medians on rank 0.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics import MiCSConfig, mics_shard


def eager(model: nn.Module, config: MiCSConfig) -> nn.Module:
    return mics_shard(model, config)


def blocks_in_place(model: nn.Module, config: MiCSConfig) -> nn.Module:
    for block in model.transformer.h:
        block.compile()
    return mics_shard(model, config)


def whole_in_place(model: nn.Module, config: MiCSConfig) -> nn.Module:
    model.compile()
    return mics_shard(model, config)


def regions(model: nn.Module, config: MiCSConfig) -> nn.Module:
    from accelerate.utils import compile_regions

    return mics_shard(compile_regions(model), config)


WAYS: dict[str, Callable[[nn.Module, MiCSConfig], nn.Module]] = {
    way.__name__: way for way in (eager, blocks_in_place, whole_in_place, regions)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--param-dtype", default=None)
    arguments = parser.parse_args()
    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    if arguments.device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=arguments.layers,
            n_embd=arguments.width,
            n_head=arguments.width // 64,
            n_positions=arguments.tokens,
            vocab_size=1024,
            use_cache=False,
        )
    )
    config = MiCSConfig(shard_size=dist.get_world_size(), param_dtype=arguments.param_dtype)
    models = {name: way(copy.deepcopy(model), config) for name, way in WAYS.items()}
    optimizers = {name: torch.optim.SGD(sharded.parameters(), lr=1e-3) for name, sharded in models.items()}
    batch = torch.randint(0, 1024, (arguments.rows, arguments.tokens), device=arguments.device)

    def step(name: str) -> float:
        dist.barrier()
        began = time.perf_counter()
        models[name](input_ids=batch, labels=batch).loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = {name: step(name) for name in WAYS}
    for name in WAYS:
        step(name)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(arguments.steps):
        for name in WAYS:
            times[name].append(step(name))
    if dist.get_rank() == 0:
        print("| way | median step | beside eager | first step |\n| --- | --- | --- | --- |")
        for name in WAYS:
            median = statistics.median(times[name])
            ratio = statistics.median(ours / theirs for ours, theirs in zip(times[name], times["eager"], strict=True))
            print(f"| {name} | {1000 * median:.0f} ms | {ratio:.2f} | {first[name]:.1f} s |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
