"""``mics plan --measure``: the links of the cluster that the command runs on, by all of its ranks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from lightning_mics.cli.code import write_text
from lightning_mics.cli.plan.checks import check_options, given_cluster
from lightning_mics.cli.plan.page import Page, format_count, format_rate
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.hardware import Cluster, cluster_to_yaml
from lightning_mics.plan.settings import Training
from lightning_mics.text import format_bytes, format_number
from lightning_mics.trace import links
from lightning_mics.trace.models import typical_layer
from lightning_mics.trace.optimizers import optimizer_footprint

_Prepared = tuple[tuple[int, int], str, Cluster | None]


def measure(options: argparse.Namespace) -> Cluster | None:
    """Measures with all ranks; returns the cluster on the first one, saved and shown.

    Raises:
        MiCSConfigError: On every rank, if the command was not started by a launcher, an option cannot work, or the
            links cannot be measured.
    """
    _check_launched(options)
    rank = int(os.environ["RANK"])
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)
    try:
        layer, dtype, assumed = _prepare_with_all(options, rank)
        with _tell(rank) as tell:
            measurement = links.measure_cluster(layer=layer, dtype=dtype, assumed=assumed, progress=tell)
    finally:
        dist.destroy_process_group()
    if rank:
        return None
    _save(options, measurement)
    return measurement.cluster if options.nodes is None else measurement.cluster.with_nodes(options.nodes)


def _check_launched(options: argparse.Namespace) -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise MiCSConfigError(
            f"--measure needs a process for each accelerator, and {', '.join(missing)} of their launcher is not set. "
            "Start it on each node with: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 "
            f"--rdzv-backend c10d -m lightning_mics plan --measure --model {options.model}"
        )


def _prepare_with_all(options: argparse.Namespace, rank: int) -> _Prepared:
    """Checks the options, and returns what to measure with.

    On the rank that reads and writes files: its machine may be the only one that has them.
    """
    found: list[Any] = [None]
    if rank == 0:
        try:
            found = [_prepare(options)]
        except MiCSConfigError as error:
            found = [str(error)]
        except Exception as error:  # the others wait for this rank
            found = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise MiCSConfigError(found[0])
    prepared: _Prepared = found[0]
    return prepared


def _prepare(options: argparse.Namespace) -> _Prepared:
    """Returns width and tokens of the model's layers, the dtype, and what to assume of links that do not exist."""
    check_options(options)
    layer = typical_layer(options.model, options.sequence)
    training = Training.in_precision(options.precision, options.optimizer)
    optimizer_footprint(options.optimizer, (), foreach=False)  # refuses what is none before anything is measured
    is_named = options.instance is not None or options.cluster is not None
    return layer, training.param_dtype, given_cluster(options) if is_named else None


@contextmanager
def _tell(rank: int) -> Iterator[Callable[[str], None] | None]:
    """Shows what is measured, on the first rank."""
    if rank:
        yield None
        return
    with Console(stderr=True, highlight=False).status("Measuring ...") as status:
        yield lambda text: status.update(f"Measuring {text} ...")


def _save(options: argparse.Namespace, measurement: links.Measurement) -> None:
    file = options.save_cluster
    write_text(file, cluster_to_yaml(measurement.cluster), force=options.force)
    page = Page(Console(highlight=False, stderr=options.json == "-"))
    _print_measurement(measurement, page)
    page.lines(f"Wrote {file}. Plan with it anywhere: mics plan --cluster {file} --model {options.model}\n")


def _print_measurement(measurement: links.Measurement, page: Page) -> None:
    cluster, node, accelerator = measurement.cluster, measurement.cluster.node, measurement.cluster.node.accelerator
    nodes = format_count(cluster.num_nodes, "node")
    page.lines(f"Measured on {nodes} x {node.num_accelerators} {accelerator.name}", style="bold")
    rows = [
        [
            name,
            format_rate(link.rate),
            f"{format_number(link.latency * 1e6)} us",
            "assumed" if fit is None else f"{fit.error:.0%}",
        ]
        for name, link, fit in (
            ("inside a node, of a rank", node.intra, measurement.intra),
            ("between nodes, of a node", node.inter, measurement.inter),
        )
    ]
    page.table(["link", "rate", "latency", "fits within"], rows)
    rate = max(accelerator.peak_flops.values()) * accelerator.compute_efficiency
    page.say(
        f"A rank computes {format_number(rate / 1e12)} TFLOP/s, copies {format_rate(accelerator.memory_bandwidth)} and "
        f"has {format_bytes(accelerator.memory)}."
    )
