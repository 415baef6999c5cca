"""Runs a script that only knows Accelerate or the transformers Trainer under MiCS.

::

    accelerate launch --config_file mics.yaml -m lightning_mics.run [--report FILE] script.py ARGS
    accelerate launch --config_file mics.yaml -m lightning_mics.run -m package.module ARGS

The script's ``Accelerator`` becomes a :class:`~lightning_mics.accelerate.MiCSAccelerator`, and the ``Trainer`` of
transformers a :class:`~lightning_mics.transformers.MiCSTrainer`, before the script imports them. Two-hop
synchronisation follows the script's own accumulation: ``accelerator.accumulate`` and ``gradient_accumulation_steps``.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import accelerate.accelerator
from accelerate.state import PartialState
from torch import nn

from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin
from lightning_mics.accelerate.backends import backends_for
from lightning_mics.accelerate.plugin import take_over_launch
from lightning_mics.core._torch import uncompiled
from lightning_mics.core.log import inform
from lightning_mics.core.runtime import is_sharded
from lightning_mics.errors import MiCSError
from lightning_mics.imports import after_import
from lightning_mics.metrics import CommLedger, Hop

_TRAINER = "transformers.trainer"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script that the command line names.

    Args:
        arguments: The words after ``lightning_mics.run``; those of the process by default.
    """
    options = _parse(arguments)
    take_over_launch()
    _prepare_state()
    accelerate.Accelerator = accelerate.accelerator.Accelerator = _RunAccelerator
    _take_over_trainers()
    sys.argv = [options.script, *options.arguments]
    try:
        if options.module:
            runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(options.script).resolve().parent)
            runpy.run_path(options.script, run_name="__main__")
    except MiCSError as error:
        inform(f"error: {error}")
        raise
    except SystemExit as ending:
        if ending.code in (None, 0):
            _report(options.report)
        raise
    _report(options.report)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lightning_mics.run", description="Runs an Accelerate or transformers script under MiCS."
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the counts of communication as JSON")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or a module's name with -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments")
    options = parser.parse_args(arguments)
    if not options.module and not Path(options.script).is_file():
        parser.error(f"there is no script {options.script}")
    return options


class _RunAccelerator(MiCSAccelerator):
    """Says what was found, once, and keeps the ledgers of the models it shards."""

    said = False
    ledgers: ClassVar[list[tuple[str, CommLedger]]] = []  # with the class of the model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not _RunAccelerator.said:
            _RunAccelerator.said = True
            if self.topology is None:
                inform("there is one process only, so the script runs as it is")
            elif self.layout is None:
                inform("the script runs under MiCS (shard_size='auto')")
            else:
                inform(f"the script runs under MiCS (shard_size={self.layout.shard_size}), on\n{self.layout}")

    def _shard(self, model: nn.Module, *args: Any) -> None:
        was_sharded = is_sharded(model)
        super()._shard(model, *args)
        if is_sharded(model) and not was_sharded:
            name = type(uncompiled(model)).__name__
            number = sum(other.partition(" ")[0] == name for other, _ in self.ledgers) + 1
            self.ledgers.append((name if number == 1 else f"{name} ({number})", self.ledger(model)))


def _prepare_state() -> None:
    """Makes ``PartialState()``, which a script may create first, heed what ``MiCSAccelerator()`` does.

    That is ``ACCELERATE_USE_CPU``, and the backends that offload needs.
    """
    initialize = PartialState.__init__

    def __init__(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        cpu = cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if kwargs.get("backend") is None and (backends := backends_for(MiCSPlugin(), cpu=cpu)) is not None:
            kwargs["backend"] = backends
        initialize(self, cpu, **kwargs)

    PartialState.__init__ = __init__


def _take_over_trainers() -> None:
    """Makes every Trainer of transformers ours, now or when the script imports it."""
    module = sys.modules.get(_TRAINER)
    if module is None:
        after_import(_TRAINER, _replace_trainer)
        return
    theirs = module.Trainer
    ours = _replace_trainer(module)
    for subclass in theirs.__subclasses__():
        if subclass is not ours:
            subclass.__bases__ = tuple(ours if base is theirs else base for base in subclass.__bases__)
    for holder in list(sys.modules.values()):
        if getattr(holder, "__dict__", {}).get("Trainer") is theirs:
            holder.Trainer = ours  # type: ignore[attr-defined]


def _replace_trainer(module: Any) -> type:
    from lightning_mics.accelerate.trainer import TrainerMethods  # it must not import the module, which is unfinished

    theirs = module.Trainer
    own = {"__module__": _TRAINER, "__doc__": theirs.__doc__, "accelerator_class": _RunAccelerator}
    module.Trainer = type("Trainer", (TrainerMethods, theirs), own)
    return module.Trainer


def _ratio(ledger: CommLedger) -> str:
    """Says what two-hop synchronisation did, or why one of the hops was not there."""
    narrow, wide = ledger.total(Hop.PARTITION_REDUCE).calls, ledger.total(Hop.REPLICATION_REDUCE).calls
    if not narrow and not wide:
        return "no gradients were reduced"
    if ledger.layout.num_replicas == 1:
        return "there is one replica, so that nothing was reduced between replicas"
    if ledger.layout.shard_size == 1:
        return "each rank holds a whole replica (shard_size=1): gradients were reduced between replicas only"
    if not wide:
        return "the replicas' gradients were not reduced: no window came to its end"
    return f"a unit ran {narrow / wide:g} partition reduce-scatter(s) for each all-reduce between replicas"


def _report(path: Path | None) -> None:
    """Prints what was communicated, and writes it where asked."""
    ledgers = _RunAccelerator.ledgers
    if os.environ.get("RANK", "0") != "0" or not ledgers:
        return
    print("\nwhat was communicated (this node's share):")
    for name, ledger in ledgers:
        print(f"{name}, {ledger.layout.num_replicas} replica(s) x {ledger.layout.shard_size} shard(s)\n{ledger}")
        print(_ratio(ledger))
    if path is not None:
        counts = [
            {unit: {hop.name: ledger.total(hop, unit).__dict__ for hop in Hop} for unit in ledger.units()}
            for _, ledger in ledgers
        ]
        path.write_text(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
