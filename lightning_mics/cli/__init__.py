"""The ``mics`` command."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lightning_mics import __version__
from lightning_mics.errors import MiCSConfigError, MiCSError
from lightning_mics.metrics import format_bytes
from lightning_mics.processes import exit_on_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the ``mics`` command.

    Args:
        arguments: The words after ``mics``; those of the process by default.

    Returns:
        The exit code: 0 for success, 2 for an error that the user can mend.
    """
    parser = argparse.ArgumentParser(prog="mics", description="MiCS: sharded training on ordinary clusters.")
    parser.add_argument("--version", action="version", version=f"lightning-mics {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    words = sys.argv[1:] if arguments is None else arguments
    for name, (summary, configure) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in words:  # the options of others would be imported for nothing
            command.set_defaults(run=configure(command))
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(unknown, next(commands.choices[word] for word in words if word in commands.choices))
    try:
        return options.run(options) or 0
    except MiCSError as error:
        print(f"mics: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmics: stopped; nothing is left behind.", file=sys.stderr)
        return 130


def _refuse(unknown: Sequence[str], command: argparse.ArgumentParser) -> NoReturn:
    """Ends the program with the option of a command that looks most like the first unknown one."""
    near = difflib.get_close_matches(unknown[0].partition("=")[0], command._option_string_actions, n=1)
    hint = f". Did you mean {near[0]}?" if near else f". {command.prog} --help shows all."
    command.exit(2, f"{command.prog}: unrecognized arguments: {' '.join(unknown)}{hint}\n")


def _configure_demo(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of the first run (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data and text (default: 0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave checkpoints and logs in this new folder")
    return _demo


def _demo(options: argparse.Namespace) -> int:
    if options.steps < 1:
        raise MiCSConfigError(f"--steps {options.steps} must be at least 1. Try --steps 120.")
    try:
        from lightning_mics.demo.screen import run_demo
    except ModuleNotFoundError as error:
        raise MiCSError(f"The demo needs {error.name}. Install it with: pip install 'lightning-mics[demo]'") from error
    exit_on_signals()  # by default they end the program without ending its processes
    run_demo(options.steps, options.seed, options.keep)
    return 0


def _configure_consolidate(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    parser.add_argument("checkpoint", help="a sharded checkpoint (a folder), or a full file; a URL such as s3://, too")
    parser.add_argument(
        "out",
        help="what to write: NAME.safetensors (weights), NAME.ckpt (everything), or NAME (Hugging Face folder)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="the checkpoint is your own: it may hold any object, and come from a version that left no checksum",
    )
    return _consolidate


def _consolidate(options: argparse.Namespace) -> None:
    from lightning_mics.checkpoint import consolidate
    from lightning_mics.cli.bar import byte_bar

    trusted = False if options.trust else None
    with byte_bar("reading") as progress:
        written = consolidate(
            options.checkpoint, options.out, force=options.force, progress=progress, weights_only=trusted
        )
    if not isinstance(written, Path):
        print(f"Wrote {written}.")
        return
    size = sum(file.stat().st_size for file in (written.iterdir() if written.is_dir() else [written]))
    print(f"Wrote {written} ({format_bytes(size)}). {_next_step(written)}")


def _next_step(written: Path) -> str:
    if written.is_dir():
        model_class = json.loads((written / "config.json").read_text())["architectures"][0]
        return f"Load it with {model_class}.from_pretrained({str(written)!r})."
    if written.suffix == ".safetensors":
        return f"Load it with safetensors.torch.load_file({str(written)!r})."
    return f"Resume it on one device with Trainer.fit(..., ckpt_path={str(written)!r})."


def _configure_checkpoint(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    from lightning_mics.cli.checkpoint import configure

    return configure(parser)


def _configure_config(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    from lightning_mics.cli.launch import configure

    return configure(parser)


def _configure_convert_config(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    from lightning_mics.cli.convert import configure

    return configure(parser)


def _configure_bench(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    from lightning_mics.bench.cli import configure

    return configure(parser)


def _configure_doctor(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    from lightning_mics.cli.doctor import configure

    return configure(parser)


def _configure_plan(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int | None]:
    from lightning_mics.cli.plan import configure

    return configure(parser)


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Callable[[argparse.Namespace], int | None]]]] = {
    "demo": ("train, save and resume a small GPT-2 on this machine, to see MiCS at work", _configure_demo),
    "checkpoint": ("list, show, verify and compare checkpoints", _configure_checkpoint),
    "consolidate": ("turn a sharded checkpoint into one file or a Hugging Face folder", _configure_consolidate),
    "config": ("write or check a file for accelerate launch --config_file", _configure_config),
    "convert-config": ("turn a DeepSpeed configuration into MiCS settings, with a report", _configure_convert_config),
    "plan": ("predict memory, time and traffic of training a model, and rank what fits", _configure_plan),
    "doctor": ("look for what could spoil a job, on all of its ranks before it starts", _configure_doctor),
    "bench": ("emulate a cluster with slow links on this machine; compare training on it", _configure_bench),
}
