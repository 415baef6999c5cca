"""What each rank of a benchmark runs; started by torchrun on every node."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_mics.bench.contenders import least_bytes
from lightning_mics.bench.loops import model_spec, train
from lightning_mics.bench.measure import StepClock
from lightning_mics.bench.ranks import device_of, join
from lightning_mics.bench.records import Case, Contender, Measurement, append
from lightning_mics.bench.workload import unit_bytes
from lightning_mics.core.groups import destroy_groups
from lightning_mics.core.resources import ResidentMemory
from lightning_mics.core.waits import timed_waits
from lightning_mics.metrics import Hop
from lightning_mics.processes import end_with_launcher


def main() -> None:
    """Measures what a plan file lists, one after another."""
    end_with_launcher()  # torchrun, which may be killed
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    plan = json.loads(parser.parse_args().plan.read_text())
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    join(plan["hardware"])
    current = Path(plan["current"])
    for number, item in enumerate(plan["measurements"]):
        measurement = Measurement.of(item)
        if dist.get_rank() == 0:
            current.write_text(str(number))
        facts = measure(measurement.case, measurement.contender, plan["warmup"], plan["steps"])
        if dist.get_rank() == 0:
            append(Path(plan["results"]), measurement.record(plan["run"], "ok", **facts))
    if dist.get_rank() == 0:
        current.write_text(str(len(plan["measurements"])))
    dist.barrier()
    destroy_groups()


def measure(case: Case, contender: Contender, warmup: int, steps: int) -> dict[str, Any]:
    """Trains one contender and returns what a record says of it. Collective over the world."""
    run = _run_on_card if device_of(case).type == "cuda" else _run_on_cpu
    clock, facts = run(case, contender, warmup, steps)
    facts |= {
        "step_seconds": clock.step_seconds,
        "losses": _mean_losses(clock, case.accumulation),
        "minimum_bytes": least_bytes(case, contender, *unit_bytes(model_spec(case))),
        "gradient_bytes": _largest(clock.gradient_bytes),
        "state_bytes": _largest(clock.state_bytes),
        "process_bytes": _largest(facts["process_bytes"]),
        "samples": dist.get_world_size() * case.microbatch_size * case.accumulation,
        **_ledger_facts(clock),
    }
    if not case.is_loopback:  # whose counters are those of all nodes together
        facts["sent_bytes"] = _from_each_node(clock.sent_a_step, case.node_size)
    del clock
    gc.collect()
    return facts


def _run_on_cpu(case: Case, contender: Contender, warmup: int, steps: int) -> tuple[StepClock, dict[str, Any]]:
    memory = ResidentMemory()
    clock = StepClock(warmup, steps)
    with timed_waits(clock.note):
        train(case, contender, clock)
    return clock, {"hop_seconds": clock.hop_seconds(), "process_bytes": max(0, memory.peak_growth())}


def _run_on_card(case: Case, contender: Contender, warmup: int, steps: int) -> tuple[StepClock, dict[str, Any]]:
    """Without the time of hops: collectives run beside the host, which only launches them."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    clock = StepClock(warmup, steps, torch.cuda.synchronize)
    train(case, contender, clock)
    return clock, {"process_bytes": torch.cuda.max_memory_allocated()}


def _ledger_facts(clock: StepClock) -> dict[str, Any]:
    if clock.ledger is None:
        return {}
    hops = clock.ledger.by_hop()
    return {
        "ledger_bytes": sum(hops[hop].inter_bytes for hop in Hop) / clock.counted_windows,
        "ledger_calls": {
            hop.value: hops[hop].calls / clock.counted_windows
            for hop in Hop
            if hop is not Hop.REPLICATION_GATHER or hops[hop].calls
        },
    }


def _mean_losses(clock: StepClock, accumulation: int) -> list[float]:
    losses = torch.stack(clock.losses).float()
    dist.all_reduce(losses, op=dist.ReduceOp.AVG)
    return losses.view(-1, accumulation).mean(dim=1).tolist()


def _from_each_node(sent: float, node_size: int) -> list[float]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sent)
    return everyone[::node_size]


def _largest(count: float) -> float:
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(float(count), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


if __name__ == "__main__":
    main()
