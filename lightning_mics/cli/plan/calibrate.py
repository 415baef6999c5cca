"""``mics plan --calibrate``: the model's own block on the device at hand, beside what the planner assumed of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_mics.bench.calibration import Calibration, calibrate
from lightning_mics.cli.code import write_text
from lightning_mics.cli.plan.page import Page, format_rate
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.hardware import Accelerator, Cluster, cluster_to_yaml, find_accelerator
from lightning_mics.plan.settings import Training, Variant
from lightning_mics.text import format_bytes, format_number


def calibrated(options: argparse.Namespace, cluster: Cluster) -> Cluster:
    """Measures the model's block; returns the hardware with what was found, saved and shown.

    Raises:
        MiCSConfigError: If the device at hand is another one, or the model cannot be run.
    """
    accelerator = cluster.node.accelerator
    _check_device(accelerator)
    training = Training.in_precision(options.precision, options.optimizer)
    variant = Variant(
        lora_rank=options.lora_rank,
        lora_targets=tuple(options.lora_targets),
        frozen=tuple(options.freeze),
        base_bits=options.base_bits,
        double_quantization=options.double_quantization,
        attention=options.attention,
    )
    with _bar(options.model) as progress:
        found = calibrate(
            options.model,
            training,
            sequence_length=options.sequence,
            variant=variant,
            micro_batch=options.micro_batch or 1,
            device_type=accelerator.device_type,
            progress=progress,
        )
    result = found.applied_to(cluster, training.param_dtype)
    file = options.save_cluster
    write_text(file, cluster_to_yaml(result), force=options.force)
    page = Page(Console(highlight=False, stderr=options.json == "-"))
    _show(found, variant, cluster, training.param_dtype, page)
    page.lines(f"Wrote {file}. Plan with it anywhere: mics plan --cluster {file} --model {options.model}\n")
    return result


def _check_device(accelerator: Accelerator) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MiCSConfigError("--calibrate measures with one process. Start it without torchrun.")
    if accelerator.device_type == "cpu":
        return
    if not torch.cuda.is_available():
        raise MiCSConfigError(
            f"--calibrate runs the model's block on the device at hand, and {accelerator.name} is a card, of which "
            "none is here. Start it on a node of that cluster, or leave it out."
        )
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    here = find_accelerator(name, memory)
    if here is not None and here.name.partition("-")[0] != accelerator.name.partition("-")[0]:
        raise MiCSConfigError(
            f"The card at hand is {name}, and the hardware that was named has {accelerator.name}. Start --calibrate on "
            "a node of that cluster."
        )


@contextmanager
def _bar(model: str) -> Iterator[Callable[[float], None]]:
    console = Console(stderr=True)
    columns = (TextColumn(f"Running a block of {model}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _show(found: Calibration, variant: Variant, cluster: Cluster, dtype: str, page: Page) -> None:
    accelerator, host, unit = cluster.node.accelerator, cluster.node.host, found.unit
    assumed = accelerator.peak_in(dtype) * accelerator.compute_efficiency
    moved = accelerator.memory_bandwidth * accelerator.optimizer_efficiency
    as_it_is = replace(variant, base_bits=None, double_quantization=False)
    words = ", ".join([f"A block ({unit.name})", *as_it_is.words])
    page.lines(f"{words} on {found.device}, {found.micro_batch} samples a pass", style="bold")
    rows = [
        ["both passes, a second", _flops(assumed), _flops(found.rate)],
        ["  forward", "", _flops(found.forward_rate)],
        ["  backward", "", _flops(found.backward_rate)],
        ["host: an operation", _micros(host.launch), _micros(found.host.launch)],
        ["host: FSDP2's part before a pass", _micros(host.unit), _micros(found.host.unit)],
        ["host: a block and microstep, sharded", "", _micros(found.host_seconds)],
        ["kept for the backward pass", format_bytes(found.predicted), format_bytes(found.kept)],
        ["moved by an optimizer step, a second", format_rate(moved), format_rate(found.optimizer_rate)],
    ]
    page.table(["", "assumed", "measured"], rows)
    if variant.base_bits is not None:
        page.say(
            f"The base has its own dtype here. What unpacking its {variant.base_bits} bits takes is planned by the "
            "memory's nominal bandwidth."
        )
    if accelerator.device_type == "cpu":
        page.say("On CPUs the host computes itself: its figures are not used.")


def _flops(rate: float) -> str:
    return f"{format_number(rate / 1e12)} TFLOP" if rate >= 1e11 else f"{format_number(rate / 1e9)} GFLOP"


def _micros(seconds: float) -> str:
    return f"{format_number(seconds * 1e6)} us"
