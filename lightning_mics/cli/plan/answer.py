"""Planning as the options of ``mics plan`` ask for it; the answer on the screen, in figures and in files."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_mics.cli.code import write_text
from lightning_mics.cli.plan.figures import draw
from lightning_mics.cli.plan.report import to_html
from lightning_mics.cli.plan.screen import print_planning
from lightning_mics.cli.plan.write import to_json, write_plan
from lightning_mics.config import as_bytes
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.hardware import Cluster
from lightning_mics.plan.scaling import ScalingPoint, default_nodes, weak_scaling
from lightning_mics.plan.search import Planning
from lightning_mics.plan.settings import Recomputation
from lightning_mics.trace.planning import plan


def plan_on(options: argparse.Namespace, cluster: Cluster, asked: Mapping[str, Any]) -> None:
    """Plans for a cluster, and prints and writes what is found.

    Args:
        options: Those of the command.
        cluster: The hardware.
        asked: Those of them that an answer depends on, with their defaults.

    Raises:
        MiCSConfigError: If a setting cannot work, or nothing fits (after what there is to say was printed).
    """
    screen, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    with errors.status(f"Tracing {options.model}, and trying what fits ..."):
        planning = _search(options, cluster)
        scaling = weak_scaling(planning, default_nodes(cluster.num_nodes)) if planning.plans else []
    if options.json == "-":  # alone on the screen
        screen = errors
    else:
        print_planning(planning, scaling, screen, top=options.top, assumed=_assumed(options))
    if options.json is not None:
        _write_json(to_json(planning, scaling, events=options.events), options)
    if options.report is not None:
        page = to_html(
            planning, functools.partial(_command, options, asked), top=options.top, assumed=_assumed(options)
        )
        write_text(options.report, page, force=options.force)
    _ = planning.best  # says why, if nothing fits
    for line in _write(options, planning, scaling):
        screen.print(f"\n{line}", markup=False, soft_wrap=True)


def _search(options: argparse.Namespace, cluster: Cluster) -> Planning:
    limit, shard_size = options.memory_limit, options.shard_size
    return plan(
        options.model,
        cluster,
        sequence_length=options.sequence,
        global_batch=options.global_batch,
        micro_batch=options.micro_batch,
        accumulation=options.accumulation,
        precision=options.precision,
        optimizer=options.optimizer,
        shard_size=None if shard_size == "auto" else shard_size,  # all sizes are tried anyway
        optimizer_shard_size=options.optimizer_shard_size,
        replication_reduce_dtype=options.replication_reduce_dtype,
        replication_gather_dtype=options.replication_gather_dtype,
        master_weights=options.master_weights,
        hierarchical={"auto": None, "true": True, "false": False}[options.hierarchical],
        activation_checkpointing=_recomputation(options.activation_checkpointing),
        activation_checkpointing_offload=options.activation_checkpointing_offload,
        reshard_after_forward=options.reshard_after_forward,
        memory_limit=None if limit is None else as_bytes(limit, "--memory-limit"),
        ranking=options.rank,
        loss_chunks=options.loss_chunks,
        lora_rank=options.lora_rank,
        lora_targets=options.lora_targets,
        frozen=options.freeze,
        base_bits=options.base_bits,
        double_quantization=options.double_quantization,
        attention=options.attention,
        compile_gain=options.compile_gain,
        holds_outputs=options.hold_outputs is not False,
    )


def _recomputation(asked: int | str | None) -> Recomputation | None:
    words: dict[Any, Recomputation] = {"none": False, "all": True, "selective": "selective"}
    if asked is None or (isinstance(asked, int) and asked > 0):
        return asked
    if asked not in words:
        raise MiCSConfigError(
            f"--activation-checkpointing {asked} is unknown. Values that work: all, selective, none, or 2 for every "
            "second block."
        )
    return words[asked]


def _assumed(options: argparse.Namespace) -> set[str]:
    """Returns what was not given."""
    assumed = {"sequence"} if options.sequence is None else set()
    if options.global_batch is None and (options.micro_batch is None or options.accumulation is None):
        assumed.add("batch")
    return assumed


def _command(options: argparse.Namespace, asked: Mapping[str, Any], **changes: Any) -> str:
    """Returns the command that asks the same, or with other values, without what says where the answer goes."""
    values = {name: getattr(options, name) for name in asked} | changes
    if options.measure or options.calibrate:  # what was found is in a file
        found = {"instance": None, "cluster": options.save_cluster, "host": None}
        values |= {"measure": False, "calibrate": False, "save_cluster": None, **found}
    words = ["mics", "plan"]
    for name, value in values.items():
        option = name.replace("_", "-")
        if value is None or value == asked[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _write_json(text: str, options: argparse.Namespace) -> None:
    if options.json == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(options.json), text, force=options.force)


def _write(options: argparse.Namespace, planning: Planning, scaling: list[ScalingPoint]) -> Iterator[str]:
    """Writes figures and files; yields what to say of each."""
    if options.json not in (None, "-"):
        yield f"Wrote {options.json}."
    if options.report is not None:
        yield f"Wrote {options.report}: open it in a browser."
    if options.plot is not None:
        yield f"Drew {', '.join(map(str, draw(planning, scaling, options.plot)))}."
    formats = options.format or ["accelerate"]
    if len(formats) == 1:
        formats = formats * len(options.write)
    for path, kind in zip(options.write, formats, strict=True):
        use = write_plan(planning, path, kind, main_process_ip=options.main_process_ip, force=options.force)
        yield f"Wrote {path}. {use}"
