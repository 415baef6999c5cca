"""``mics plan``: what a model needs on a cluster, and how to train it there, before there is a cluster."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import check_positive_int

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_mics.plan.hardware import Cluster
    from lightning_mics.plan.scaling import ScalingPoint
    from lightning_mics.plan.search import Planning
    from lightning_mics.trace.links import Measurement

_FORMATS = ("accelerate", "lightning", "mics")  # as in plan.write, which takes long to load
_EXAMPLES = """examples:
  mics plan --model gpt2-xl --instance p4d.24xlarge --nodes 2 --global-batch 256
  mics plan --model config.json --cluster my.yaml --plot figures --write mics.yaml
  torchrun --nproc-per-node 8 -m lightning_mics plan --measure --model gpt2-xl
"""


def configure(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    """Adds the options of ``mics plan`` to its parser; returns what runs it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    _add_model_options(parser)
    _add_hardware_options(parser)
    _add_fixed_options(parser)
    _add_output_options(parser)
    return _plan


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to train").add_argument
    add("--model", metavar="MODEL", help="a known name, a Hugging Face config.json, or MODULE:FACTORY")
    add("--sequence", type=int, metavar="N", help="tokens of a sample (default: the longest that the model takes)")
    add("--precision", default="bf16-mixed", help="as Lightning names it (default: %(default)s)")
    add("--optimizer", default="AdamW", metavar="NAME", help="a class of torch.optim (default: %(default)s)")
    add("--global-batch", type=int, metavar="N", help="samples of an optimizer step, of all ranks")
    add("--micro-batch", type=int, metavar="N", help="samples of a rank in a microstep")
    add("--accumulation", type=int, metavar="N", help="microsteps of an optimizer step")


def _add_hardware_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hardware")
    add = group.add_argument
    add("--instance", metavar="NAME", help="a cloud instance, for example p4d.24xlarge")
    add("--cluster", type=Path, metavar="FILE", help="a YAML file that describes the nodes and their links")
    add("--measure", action="store_true", help="measure the links of this cluster; start it by torchrun on all nodes")
    add("--save-cluster", type=Path, metavar="FILE", help="where --measure writes them (default: cluster.yaml)")
    add("--nodes", type=int, metavar="N", help="number of nodes (default: what the file says, else 1)")
    add("--memory-limit", metavar="SIZE", help='what a rank may use, for example "36 GiB" (default: all of its memory)')
    add("--list", action="store_true", help="show known models and hardware, and do nothing else")


def _add_fixed_options(parser: argparse.ArgumentParser) -> None:
    about = "Each value that works is tried, unless it is given."
    add, switch = parser.add_argument_group("settings to fix", about).add_argument, argparse.BooleanOptionalAction
    add("--shard-size", type=_int_or_word, metavar="N", help="ranks of a partition group, 'node' or 'world'")
    add("--hierarchical", choices=("auto", "true", "false"), default="auto", help="two-stage collectives across nodes")
    add("--activation-checkpointing", action=switch, help="compute blocks again in the backward pass")
    add("--reshard-after-forward", action=switch, help="free blocks between forward and backward")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--top", type=int, default=10, metavar="N", help="rows of the ranked table (default: %(default)s)")
    add("--plot", type=Path, metavar="PATH", help="draw figures: one PNG or SVG file, or a folder of PNG files")
    add("--json", nargs="?", const="-", metavar="FILE", help="everything as JSON, into a file or alone on the screen")
    add("--events", action="store_true", help="put the events of a step into the JSON, too")
    add(
        "--write",
        type=Path,
        nargs="?",
        const=Path("mics.yaml"),
        action="append",
        default=[],
        metavar="FILE",
        help="write the fastest plan (default: mics.yaml); may be repeated",
    )
    add(
        "--format",
        choices=_FORMATS,
        action="append",
        default=[],
        help="of what --write writes: for accelerate launch (default), LightningCLI or MiCSConfig; one for all, or one "
        "for each --write",
    )
    add("--main-process-ip", metavar="HOST", help="address of machine 0 for the file for accelerate launch")
    add("--force", action="store_true", help="replace files that exist")


def _int_or_word(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _plan(options: argparse.Namespace) -> int | None:
    from rich.console import Console

    if options.list:
        _print_known(Console(highlight=False))
        return None
    if not options.measure:
        _check(options)
        _plan_on(options, _given_cluster(options))
        return None
    return _plan_measured(options)


def _plan_measured(options: argparse.Namespace) -> int | None:
    """Measures with all ranks; the first one plans and speaks, the others are silent."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        _check_launched(options)
        cluster = _measure(options, rank)
    except MiCSConfigError:
        if rank:
            return 2
        raise
    if cluster is not None:
        _plan_on(options, cluster)
    return None


# What was asked for.


def _check(options: argparse.Namespace) -> None:
    """Refuses what cannot work before any work is done."""
    if options.model is None:
        raise MiCSConfigError("--model is missing. Try --model gpt2-xl; mics plan --list shows all that are known.")
    if options.instance is not None and options.cluster is not None:
        raise MiCSConfigError("--instance and --cluster both describe the nodes. Leave out one of them.")
    if options.instance is None and options.cluster is None and not options.measure:
        raise MiCSConfigError(
            "The hardware is missing. Name a cloud instance (--instance p4d.24xlarge --nodes 2), a file (--cluster "
            "my.yaml), or measure where this runs (--measure). mics plan --list shows all instances that are known."
        )
    for name in ("nodes", "top"):
        if getattr(options, name) is not None:
            check_positive_int(f"--{name}", getattr(options, name), 2)
    if options.save_cluster is not None and not options.measure:
        raise MiCSConfigError("--save-cluster writes what --measure finds. Add --measure, or leave it out.")
    if options.events and options.json is None:
        raise MiCSConfigError("--events adds to the JSON. Add --json, or leave it out.")
    for name in ("global_batch", "micro_batch", "accumulation", "sequence"):
        if getattr(options, name) is not None:
            check_positive_int(f"--{name.replace('_', '-')}", getattr(options, name), 8)
    _check_outputs(options)


def _check_outputs(options: argparse.Namespace) -> None:
    if options.format and len(options.format) not in (1, len(options.write)):
        raise MiCSConfigError(
            f"{len(options.format)} x --format for {len(options.write)} x --write: give one --format for all files, or "
            "one for each."
        )
    if options.format and not options.write:
        raise MiCSConfigError("--format is that of a file. Add --write mics.yaml, or leave it out.")
    outputs = [("--write", path) for path in options.write]
    if options.json not in (None, "-"):
        outputs.append(("--json", Path(options.json)))
    if options.measure:
        options.save_cluster = options.save_cluster or Path("cluster.yaml")
        outputs.append(("--save-cluster", options.save_cluster))
    for place, (name, path) in enumerate(outputs):
        if path in [other for _, other in outputs[:place]]:
            raise MiCSConfigError(f"{path} is to be written twice. Choose another name for one of them.")
        _check_output(name, path, options.force)
    if options.plot is not None:
        if options.plot in [path for _, path in outputs]:
            raise MiCSConfigError(f"{options.plot} is to be written twice. Choose another name for one of them.")
        _check_plot(options.plot)


def _check_output(name: str, path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise MiCSConfigError(f"{path} exists. Choose another {name}, or replace it with --force.")
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise MiCSConfigError(f"{path} cannot be written: {why}. Choose another {name}.")


def _check_plot(path: Path) -> None:
    from lightning_mics.plan.figures import SUFFIXES, require_matplotlib

    is_picture = path.suffix in SUFFIXES and not path.is_dir()
    if path.suffix and not is_picture and not path.is_dir():
        raise MiCSConfigError(f"--plot {path}: the ending {path.suffix} is not known. Try {path.with_suffix('.png')}.")
    if is_picture and not path.parent.is_dir():
        raise MiCSConfigError(f"--plot {path}: there is no folder {path.parent}. Make it, or choose another.")
    nearest = next(place for place in (path, *path.parents) if place.exists() or place == path.parents[-1])
    if not is_picture and not nearest.is_dir():
        raise MiCSConfigError(f"--plot {path}: {nearest} is a file, not a folder. Choose another.")
    require_matplotlib()


def _given_cluster(options: argparse.Namespace) -> Cluster:
    from lightning_mics.plan.hardware import find_instance, load_cluster

    if options.instance is not None:
        return find_instance(options.instance, options.nodes or 1)
    return load_cluster(options.cluster, options.nodes)


def _check_launched(options: argparse.Namespace) -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise MiCSConfigError(
            f"--measure needs a process for each accelerator, and {', '.join(missing)} of their launcher is not set. "
            "Start it on each node with: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 "
            f"--rdzv-backend c10d -m lightning_mics plan --measure --model {options.model}"
        )


def _measure(options: argparse.Namespace, rank: int) -> Cluster | None:
    """Measures with all ranks; returns the cluster on the first one, saved and shown."""
    import torch
    import torch.distributed as dist

    from lightning_mics.trace.links import measure_cluster

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)
    try:
        layer, dtype, assumed = _prepare_with_all(options, rank)
        with _tell(rank) as tell:
            measurement = measure_cluster(layer=layer, dtype=dtype, assumed=assumed, progress=tell)
    finally:
        dist.destroy_process_group()
    if rank:
        return None
    _save_measured(options, measurement)
    return measurement.cluster if options.nodes is None else measurement.cluster.with_nodes(options.nodes)


def _prepare_with_all(options: argparse.Namespace, rank: int) -> tuple[tuple[int, int], str, Cluster | None]:
    """Checks the options, and returns what to measure with.

    On the rank that reads and writes files: its machine may be the only one that has them.

    Raises:
        MiCSConfigError: On every rank.
    """
    import torch.distributed as dist

    found: list[Any] = [None]
    if rank == 0:
        try:
            _check(options)
            found = [_prepare(options)]
        except MiCSConfigError as error:
            found = [str(error)]
        except Exception as error:  # the others wait for this rank
            found = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise MiCSConfigError(found[0])
    prepared: tuple[tuple[int, int], str, Cluster | None] = found[0]
    return prepared


def _prepare(options: argparse.Namespace) -> tuple[tuple[int, int], str, Cluster | None]:
    """Returns width and tokens of the model's layers, the dtype, and what to assume of links that do not exist."""
    from lightning_mics.plan.precision import training_for
    from lightning_mics.trace.models import typical_layer

    layer = typical_layer(options.model, options.sequence)
    dtype = training_for(options.precision, options.optimizer).param_dtype
    is_named = options.instance is not None or options.cluster is not None
    return layer, dtype, _given_cluster(options) if is_named else None


@contextmanager
def _tell(rank: int) -> Iterator[Callable[[str], None] | None]:
    """Shows what is measured, on the first rank."""
    from rich.console import Console

    if rank:
        yield None
        return
    with Console(stderr=True, highlight=False).status("Measuring ...") as status:
        yield lambda text: status.update(f"Measuring {text} ...")


def _save_measured(options: argparse.Namespace, measurement: Measurement) -> None:
    from rich.console import Console

    from lightning_mics.cli.code import write_text
    from lightning_mics.plan.hardware import cluster_to_yaml
    from lightning_mics.plan.screen import print_measurement

    write_text(options.save_cluster, cluster_to_yaml(measurement.cluster), force=options.force)
    console = Console(highlight=False, stderr=options.json == "-")
    print_measurement(measurement, console)
    use = f"Wrote {options.save_cluster}. Plan with it anywhere: mics plan --cluster {options.save_cluster}"
    console.print(f"{use} --model {options.model}\n", markup=False, soft_wrap=True)


# The answer.


def _plan_on(options: argparse.Namespace, cluster: Cluster) -> None:
    from rich.console import Console

    from lightning_mics.plan.scaling import default_nodes, weak_scaling

    errors = Console(stderr=True, highlight=False)
    with errors.status(f"Tracing {options.model}, and trying what fits ..."):
        planning = _search(options, cluster)
        scaling = weak_scaling(planning, default_nodes(cluster.num_nodes)) if planning.plans else []
    is_alone = options.json == "-"
    if not is_alone:
        _print(options, planning, scaling)
    _write_json(options, planning, scaling)
    _ = planning.best  # says why, if nothing fits
    console = errors if is_alone else Console(highlight=False)
    for line in _write(options, planning, scaling):
        console.print(line, markup=False, soft_wrap=True)


def _search(options: argparse.Namespace, cluster: Cluster) -> Planning:
    from lightning_mics.config import as_bytes
    from lightning_mics.plan import plan

    limit, shard_size = options.memory_limit, options.shard_size
    if shard_size == "auto":  # all sizes are tried anyway
        shard_size = None
    return plan(
        options.model,
        cluster,
        sequence_length=options.sequence,
        global_batch=options.global_batch,
        micro_batch=options.micro_batch,
        accumulation=options.accumulation,
        precision=options.precision,
        optimizer=options.optimizer,
        shard_size=None if shard_size is None else cluster.topology.resolve_shard_size(shard_size),
        hierarchical={"auto": None, "true": True, "false": False}[options.hierarchical],
        activation_checkpointing=options.activation_checkpointing,
        reshard_after_forward=options.reshard_after_forward,
        memory_limit=None if limit is None else as_bytes(limit, "--memory-limit"),
    )


def _print(options: argparse.Namespace, planning: Planning, scaling: list[ScalingPoint]) -> None:
    from rich.console import Console

    from lightning_mics.plan.screen import print_planning

    assumed = {"sequence"} if options.sequence is None else set()
    if options.global_batch is None and (options.micro_batch is None or options.accumulation is None):
        assumed.add("batch")
    print_planning(planning, scaling, Console(highlight=False), top=options.top, assumed=assumed)


def _write_json(options: argparse.Namespace, planning: Planning, scaling: list[ScalingPoint]) -> None:
    from lightning_mics.cli.code import write_text
    from lightning_mics.plan.write import to_json

    if options.json is None:
        return
    text = to_json(planning, scaling, events=options.events)
    if options.json == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(options.json), text, force=options.force)


def _write(options: argparse.Namespace, planning: Planning, scaling: list[ScalingPoint]) -> Iterator[str]:
    """Writes figures and files; yields what to say of each."""
    if options.json not in (None, "-"):
        yield f"\nWrote {options.json}."
    if options.plot is not None:
        from lightning_mics.plan.figures import draw

        yield f"\nDrew {', '.join(map(str, draw(planning, scaling, options.plot)))}."
    from lightning_mics.plan.write import write_plan

    kinds = (options.format or list(_FORMATS[:1])) * max(1, len(options.write))
    for path, kind in zip(options.write, kinds, strict=False):
        use = write_plan(planning, path, kind, main_process_ip=options.main_process_ip, force=options.force)
        yield f"\nWrote {path}. {use}"


def _print_known(console: Console) -> None:
    from lightning_mics.plan.hardware import find_instance, known_names
    from lightning_mics.plan.screen import print_instances, print_names
    from lightning_mics.trace.models import known_models

    print_names("Models (--model)", known_models(), console)
    print_instances([find_instance(name, 1).node for name in known_names("instances")], console)
    for section in ("accelerators", "fabrics", "networks"):
        print_names(f"{section.capitalize()}, for a file (--cluster)", known_names(section), console)
