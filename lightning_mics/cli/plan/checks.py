"""What was asked of ``mics plan``: refuses what cannot work before any work is done."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_mics.bench.style import require_matplotlib
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.hardware import Cluster, find_host, find_instance, load_cluster
from lightning_mics.topology import check_positive_int

# Endings of a picture; any other path is a folder.
PICTURES = (".png", ".svg")
NEEDS_MATPLOTLIB = "--plot needs matplotlib. Install it with: pip install 'lightning-mics[plan]'"
_EXAMPLES = {"nodes": 2, "top": 2, "global_batch": 8, "micro_batch": 8, "accumulation": 8, "sequence": 8}


def check_options(options: argparse.Namespace) -> None:
    """Refuses options that cannot work.

    Raises:
        MiCSConfigError: If one is missing, wrong, in the way of another, or names a file that cannot be written.
    """
    if options.model is None:
        raise MiCSConfigError("--model is missing. Try --model gpt2-xl; mics plan --list shows all that are known.")
    if options.instance is not None and options.cluster is not None:
        raise MiCSConfigError("--instance and --cluster both describe the nodes. Leave out one of them.")
    if options.instance is None and options.cluster is None and not options.measure:
        raise MiCSConfigError(
            "The hardware is missing. Name a cloud instance (--instance p4d.24xlarge --nodes 2), a file (--cluster "
            "my.yaml), or measure where this runs (--measure). mics plan --list shows all instances that are known."
        )
    if options.save_cluster is not None and not options.measure and not options.calibrate:
        raise MiCSConfigError("--save-cluster writes what --measure and --calibrate find. Add one, or leave it out.")
    if options.events and options.json is None:
        raise MiCSConfigError("--events adds to the JSON. Add --json, or leave it out.")
    for name, example in _EXAMPLES.items():
        if getattr(options, name) is not None:
            check_positive_int(f"--{name.replace('_', '-')}", getattr(options, name), example)
    _check_formats(options)
    _check_outputs(options)


def given_cluster(options: argparse.Namespace) -> Cluster:
    """Returns the hardware that was named.

    Raises:
        MiCSConfigError: If the name is unknown, or the file cannot be read.
    """
    if options.instance is not None:
        cluster = find_instance(options.instance, options.nodes or 1)
    else:
        cluster = load_cluster(options.cluster, options.nodes)
    return cluster if options.host is None else cluster.with_host(find_host(options.host))


def _check_formats(options: argparse.Namespace) -> None:
    formats, files = len(options.format), len(options.write)
    if formats and formats not in (1, files):
        raise MiCSConfigError(
            f"{formats} x --format for {files} x --write: give one --format for all files, or one for each."
        )
    if formats and not files:
        raise MiCSConfigError("--format is that of a file. Add --write mics.yaml, or leave it out.")


def _check_outputs(options: argparse.Namespace) -> None:
    outputs = [("--write", path) for path in options.write]
    if options.json not in (None, "-"):
        outputs.append(("--json", Path(options.json)))
    if options.report is not None:
        outputs.append(("--report", options.report))
    if options.measure or options.calibrate:
        options.save_cluster = options.save_cluster or Path("cluster.yaml" if options.measure else "calibrated.yaml")
        outputs.append(("--save-cluster", options.save_cluster))
    if options.plot is not None:
        outputs.append(("--plot", options.plot))
    seen: set[Path] = set()
    for name, path in outputs:
        if path in seen:
            raise MiCSConfigError(f"{path} is to be written twice. Choose another name for one of them.")
        seen.add(path)
        if name == "--plot":
            _check_plot(path)
        else:
            _check_file(name, path, options.force)


def _check_file(name: str, path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise MiCSConfigError(f"{path} exists. Choose another {name}, or replace it with --force.")
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise MiCSConfigError(f"{path} cannot be written: {why}. Choose another {name}.")


def _check_plot(path: Path) -> None:
    is_picture = path.suffix in PICTURES and not path.is_dir()
    if path.suffix and not is_picture and not path.is_dir():
        raise MiCSConfigError(f"--plot {path}: the ending {path.suffix} is not known. Try {path.with_suffix('.png')}.")
    if is_picture and not path.parent.is_dir():
        raise MiCSConfigError(f"--plot {path}: there is no folder {path.parent}. Make it, or choose another.")
    nearest = next(place for place in (path, *path.parents) if place.exists() or place == path.parents[-1])
    if not is_picture and not nearest.is_dir():
        raise MiCSConfigError(f"--plot {path}: {nearest} is a file, not a folder. Choose another.")
    require_matplotlib(NEEDS_MATPLOTLIB)
