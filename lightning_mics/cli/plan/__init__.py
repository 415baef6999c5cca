"""``mics plan``: what a model needs on a cluster, and how to train it there, before there is a cluster."""

from __future__ import annotations

import argparse
import functools
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mics.errors import MiCSConfigError
from lightning_mics.text import int_or_word

if TYPE_CHECKING:
    from lightning_mics.plan.hardware import Cluster

FORMATS = ("accelerate", "lightning", "mics")
_EXAMPLES = """examples:
  mics plan --model gpt2-xl --instance p4d.24xlarge --nodes 2 --global-batch 256
  mics plan --model config.json --cluster my.yaml --plot figures --write mics.yaml
  mics plan --model llama-3-8b --instance p4d.24xlarge --nodes 8 --report plan.html
  torchrun --nproc-per-node 8 -m lightning_mics plan --measure --model gpt2-xl
"""


def configure(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    """Adds the options of ``mics plan`` to its parser; returns what runs it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    _add_model_options(parser)
    _add_hardware_options(parser)
    _add_fixed_options(parser)
    asked = vars(parser.parse_args([]))
    _add_output_options(parser)
    asked["rank"] = parser.get_default("rank")
    return functools.partial(_run, asked)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to train").add_argument
    add("--model", metavar="MODEL", help="a known name, a Hugging Face config.json, or MODULE:FACTORY")
    add(
        "--sequence",
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens of a sample (default: the longest that the model takes)",
    )
    add("--precision", default="bf16-mixed", help="as Lightning names it (default: %(default)s)")
    add(
        "--optimizer",
        default="AdamW",
        metavar="NAME",
        help="a class of torch.optim, or AdamW8bit (default: %(default)s)",
    )
    add("--global-batch", type=int, metavar="N", help="samples of an optimizer step, of all ranks")
    add("--micro-batch", type=int, metavar="N", help="samples of a rank in a microstep")
    add("--accumulation", type=int, metavar="N", help="microsteps of an optimizer step")
    about = "logits are computed in N pieces of a micro-batch, as fused cross-entropy does it (default: at once)"
    add("--loss-chunks", type=int, metavar="N", help=about)
    add("--lora-rank", type=int, metavar="R", help="train adapters of this rank (LoRA); the rest is frozen")
    about = "names or patterns of layers that get adapters (default: all linear ones but the head)"
    add("--lora-targets", nargs="+", default=[], metavar="NAME", help=about)
    add("--freeze", nargs="+", default=[], metavar="NAME", help="names or patterns of parameters that are not trained")
    about = "4 or 8: bits of frozen linear layers (QLoRA), as bitsandbytes keeps them (default: those of the model)"
    add("--base-bits", type=int, metavar="BITS", help=about)
    add("--double-quantization", action="store_true", help="with --base-bits 4: scales are quantized, too")
    add("--attention", metavar="NAME", help="attention of transformers, for example eager (default: its own choice)")
    about = "how many times as fast blocks compute because they are compiled (default: %(default)s, not compiled)"
    add("--compile-gain", type=float, default=1.0, metavar="X", help=about)
    about = (
        "whether the loop holds the model's outputs, as outputs = model(...) does, model(...).loss not (default: yes)"
    )
    add("--hold-outputs", action=argparse.BooleanOptionalAction, help=about)


def _add_hardware_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("hardware").add_argument
    add("--instance", metavar="NAME", help="a cloud instance, for example p4d.24xlarge")
    add("--cluster", type=Path, metavar="FILE", help="a YAML file that describes the nodes and their links")
    add("--measure", action="store_true", help="measure the links of this cluster; start it by torchrun on all nodes")
    about = "run the model's own block on the device at hand for up to a minute, and plan with what it takes"
    add("--calibrate", action="store_true", help=about)
    about = "where --measure and --calibrate write what they find (default: cluster.yaml, calibrated.yaml)"
    add("--save-cluster", type=Path, metavar="FILE", help=about)
    add("--host", metavar="NAME", help="what launches the devices' work: ordinary (default) or fast")
    add("--nodes", type=int, metavar="N", help="number of nodes (default: what the file says, else 1)")
    add("--memory-limit", metavar="SIZE", help='what a rank may use, for example "36 GiB" (default: all of its memory)')
    add("--list", action="store_true", help="show known models and hardware, and do nothing else")


def _add_fixed_options(parser: argparse.ArgumentParser) -> None:
    about = "Each value that works is tried, unless it is given."
    add, switch = parser.add_argument_group("settings to fix", about).add_argument, argparse.BooleanOptionalAction
    add("--shard-size", type=int_or_word, metavar="N", help="ranks of a partition group, 'node' or 'world'")
    about_states = "ranks that divide optimizer states: 'partition', 'world', or a multiple of the shard size"
    add("--optimizer-shard-size", type=int_or_word, metavar="N", help=about_states)
    about_wire = "16-bit dtype in which replicas exchange gradients (default: that of their reduction)"
    add("--replication-reduce-dtype", metavar="DTYPE", help=about_wire)
    about_rows = "16-bit dtype of the precision, in which rows that others stepped on are fetched (default: their own)"
    add("--replication-gather-dtype", metavar="DTYPE", help=about_rows)
    about_masters = "where optimizer states are divided: 'owners' keeps shards in 16 bits, float32 beside the states"
    add("--master-weights", choices=("partition", "owners"), help=about_masters)
    add("--hierarchical", choices=("auto", "true", "false"), default="auto", help="two-stage collectives across nodes")
    about = (
        "compute blocks again in the backward pass: all, N for every Nth, or selective (not matrix products, attention)"
    )
    add("--activation-checkpointing", nargs="?", const="all", type=int_or_word, metavar="HOW", help=about)
    add("--no-activation-checkpointing", dest="activation_checkpointing", action="store_const", const="none")
    about_offload = "keep what recomputed blocks need in host memory until the backward pass"
    add("--activation-checkpointing-offload", action="store_true", help=about_offload)
    add("--reshard-after-forward", action=switch, help="free blocks between forward and backward")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--top", type=int, default=10, metavar="N", help="rows of the ranked table (default: %(default)s)")
    about = "advice: among plans that are as fast as can be told, the one that sends least out of a node (default)"
    add("--rank", choices=("advice", "throughput"), default="advice", help=about)
    add("--plot", type=Path, metavar="PATH", help="draw figures: one PNG or SVG file, or a folder of PNG files")
    about_report = "one page to pass around: an HTML file that needs no network"
    add("--report", type=Path, nargs="?", const=Path("plan.html"), metavar="FILE", help=about_report)
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
        help="write the best plan (default: mics.yaml); may be repeated",
    )
    add(
        "--format",
        choices=FORMATS,
        action="append",
        default=[],
        help="of what --write writes: for accelerate launch (default), LightningCLI or MiCSConfig; one for all, or one "
        "for each --write",
    )
    add("--main-process-ip", metavar="HOST", help="address of machine 0 for the file for accelerate launch")
    add("--force", action="store_true", help="replace files that exist")


def _run(asked: Mapping[str, Any], options: argparse.Namespace) -> int | None:
    """Runs the command; ``asked`` is what an answer depends on, by option, with its defaults."""
    if options.list:
        from lightning_mics.cli.plan.known import print_known

        print_known()
        return None
    with _few_collections():
        return _answer(options, asked)


def _answer(options: argparse.Namespace, asked: Mapping[str, Any]) -> int | None:
    try:
        cluster = _cluster(options)
    except MiCSConfigError:
        if options.measure and int(os.environ.get("RANK", "0")):
            return 2  # all ranks raise it; the first one speaks
        raise
    if cluster is not None:
        from lightning_mics.cli.plan.answer import plan_on

        plan_on(options, cluster, asked)
    return None


@contextmanager
def _few_collections() -> Iterator[None]:
    """Imports and traces make many objects that stay; looking through them again and again took a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _cluster(options: argparse.Namespace) -> Cluster | None:
    """Returns the hardware; ``None`` on ranks that have only measured."""
    if options.measure and options.calibrate:
        raise MiCSConfigError(
            "--measure needs all ranks, and --calibrate one process. Measure first, then --calibrate --cluster "
            "cluster.yaml."
        )
    if options.measure:
        from lightning_mics.cli.plan.measure import measure

        return measure(options)
    from lightning_mics.cli.plan.checks import check_options, given_cluster

    check_options(options)
    if not options.calibrate:
        return given_cluster(options)
    from lightning_mics.cli.plan.calibrate import calibrated

    return calibrated(options, given_cluster(options))
