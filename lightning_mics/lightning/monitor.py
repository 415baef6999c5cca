"""A callback that shows what training costs: bytes per hop, speed and memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_mics.core.log import inform
from lightning_mics.core.recompute import recomputation_of
from lightning_mics.core.resources import Usage
from lightning_mics.core.runtime import is_sharded, runtime_of
from lightning_mics.core.timing import across_ranks
from lightning_mics.core.waits import timed_waits
from lightning_mics.errors import MiCSConfigError
from lightning_mics.metrics import Hop, Traffic
from lightning_mics.plan.compare import Figures, PlannedRun, Run

_NAMES = {
    Hop.PARTITION_GATHER: "partition_gather",
    Hop.PARTITION_REDUCE: "partition_reduce",
    Hop.REPLICATION_REDUCE: "replication_reduce",
    Hop.REPLICATION_GATHER: "replication_gather",
}
# What a plan calls that which compute waits for.
_WAITS = {
    Hop.PARTITION_GATHER.value: "gather",
    Hop.PARTITION_REDUCE.value: "reduce",
    Hop.REPLICATION_REDUCE.value: "replicate",
}
_MEBI = 2**20


class MiCSMonitor(Callback):
    """Logs, per optimizer step: bytes of each hop, samples or tokens a second, peak memory.

    Metrics go to the Trainer's logger; speed and bytes out of the node also to its progress bar:

    - ``mics/<hop>_intra_mib`` and ``mics/<hop>_inter_mib``: MiB that this rank's node sent inside and out of itself,
      per optimizer step, for ``partition_gather``, ``partition_reduce``, ``replication_reduce`` and
      ``replication_gather`` (none unless optimizer states are divided further);
    - ``mics/inter_mib``: their sum out of the node;
    - ``mics/samples_per_s``, and ``mics/tokens_per_s`` where batches hold ``input_ids``, of the whole world;
    - ``mics/peak_memory_mib``: of this process; device memory on CUDA, resident memory on CPU.

    Args:
        every_n_steps: Log once in so many optimizer steps; by default as often as the Trainer logs.
        prog_bar: Whether to show metrics in the progress bar.
        plan: What ``mics plan --json`` wrote. The second time that it logs, rank 0 says how step, memory, bytes out of
            a node and, on CPUs, exposed communication compare with what was planned.

    Raises:
        MiCSConfigError: If ``every_n_steps`` is not positive, the Trainer's strategy is not MiCS, or ``plan`` has none
            with the settings of the run.
    """

    def __init__(
        self, every_n_steps: int | None = None, prog_bar: bool = True, plan: str | os.PathLike[str] | None = None
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise MiCSConfigError(f"every_n_steps={every_n_steps} must be at least 1. Try every_n_steps=10.")
        self._every_n_steps = every_n_steps
        self._prog_bar = prog_bar
        self._plan = plan
        self._planned: PlannedRun | None = None
        self._usage: Usage | None = None
        self._watch = ExitStack()
        self._begin(0, {})

    def _begin(self, step: int, traffic: dict[Hop, Traffic]) -> None:
        self._step, self._traffic = step, traffic
        self._samples = self._tokens = 0
        self._time = time.monotonic()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Notes what memory is taken before the model is sharded."""
        if self._plan is not None and stage == "fit":
            self._usage = Usage(pl_module, trainer.strategy.root_device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts counting."""
        if not is_sharded(pl_module):
            raise MiCSConfigError(
                f"MiCSMonitor needs Trainer(strategy=MiCSStrategy(...)), not {type(trainer.strategy).__name__}."
            )
        self._begin(trainer.global_step, runtime_of(pl_module).ledger.by_hop())
        if self._plan is not None:
            self._planned = _planned(trainer, pl_module, self._plan)
            self._windows = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, and logs when it is time."""
        samples = extract_batch_size(batch)
        self._samples += samples
        self._tokens += _num_tokens(batch)
        steps = trainer.global_step - self._step
        every: int = self._every_n_steps or trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        if steps < every:
            return
        traffic = runtime_of(pl_module).ledger.by_hop()
        bytes_, shown = self._bytes_per_step(traffic, steps), self._speed(trainer.world_size)
        bytes_["mics/peak_memory_mib"] = _peak_memory(pl_module.device) / _MEBI
        shown["mics/inter_mib"] = sum(value for name, value in bytes_.items() if name.endswith("_inter_mib"))
        if self._planned is not None:
            self._compare(pl_module, self._planned, samples, steps, shown["mics/inter_mib"] * _MEBI)
        pl_module.log_dict(bytes_, batch_size=samples)
        pl_module.log_dict(shown, prog_bar=self._prog_bar, batch_size=samples)
        self._begin(trainer.global_step, traffic)

    def _compare(
        self, pl_module: pl.LightningModule, planned: PlannedRun, micro_batch: int, steps: int, inter_bytes: float
    ) -> None:
        """Compares what was planned with the second window: the first one compiles, allocates and makes states."""
        assert self._usage is not None
        self._windows += 1
        holds_up = pl_module.device.type == "cpu"  # a card's collectives hold up its streams, not this thread
        if self._windows == 1:
            self._usage.restart_peak()
            self._waited = dict.fromkeys(_WAITS.values(), 0.0)
            if holds_up:
                self._watch.enter_context(timed_waits(self._note_wait))
            return
        self._watch.close()
        peak, seconds = self._usage.peak(), (time.monotonic() - self._time) / steps
        waited = sum(self._waited.values())
        memory, seconds, longest = across_ranks([-1.0 if peak is None else peak, seconds, waited], pl_module.device)
        # The parts are those of the rank that waits longest, which are in proportion.
        parts = across_ranks([part * (waited == longest) / steps for part in self._waited.values()], pl_module.device)
        measured = Figures(
            seconds=seconds,
            memory=None if memory < 0 else memory,
            inter_bytes=inter_bytes,
            exposed=dict(zip(self._waited, parts, strict=True)) if holds_up else None,
        )
        inform(planned.compare(micro_batch, measured))
        self._planned = None

    def _note_wait(self, hop: str, seconds: float) -> None:
        self._waited[_WAITS[hop]] += seconds

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stops timing waits, if training ends before there is something to compare."""
        self._watch.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same."""
        self._watch.close()

    def _bytes_per_step(self, traffic: dict[Hop, Traffic], steps: int) -> dict[str, float]:
        metrics = {}
        for hop, total in traffic.items():
            since = total - self._traffic.get(hop, Traffic())
            metrics[f"mics/{_NAMES[hop]}_intra_mib"] = since.intra_bytes / steps / _MEBI
            metrics[f"mics/{_NAMES[hop]}_inter_mib"] = since.inter_bytes / steps / _MEBI
        return metrics

    def _speed(self, world_size: int) -> dict[str, float]:
        seconds = max(time.monotonic() - self._time, 1e-9)
        speed = {"mics/samples_per_s": self._samples * world_size / seconds}
        if self._tokens:
            speed["mics/tokens_per_s"] = self._tokens * world_size / seconds
        return speed


def _planned(trainer: pl.Trainer, pl_module: pl.LightningModule, plan: str | os.PathLike[str]) -> PlannedRun:
    """Returns what was planned for a run, as rank 0 reads it; what is wrong with it is raised on all ranks."""
    runtime = runtime_of(pl_module)
    config, layout = runtime.config, runtime.mesh.layout
    divided = layout.resolve_optimizer_shard_size(config.optimizer_shard_size)
    run = Run(
        world_size=trainer.world_size,
        shard_size=layout.shard_size,
        optimizer_shard_size=divided if divided > layout.shard_size else None,
        accumulation=trainer.accumulate_grad_batches,
        activation_checkpointing=recomputation_of(pl_module, config),
        activation_checkpointing_offload=config.activation_checkpointing_offload,
        reshard_after_forward=config.reshard_after_forward,
        master_weights=config.master_weights if divided > layout.shard_size else "partition",
    )
    found: Any = None
    if trainer.is_global_zero:
        try:
            found = PlannedRun(plan, run)
        except MiCSConfigError as error:
            found = error
    found = trainer.strategy.broadcast(found)
    if isinstance(found, MiCSConfigError):
        raise found
    return found


def _num_tokens(batch: Any) -> int:
    tokens = batch.get("input_ids") if hasattr(batch, "get") else None
    return tokens.numel() if isinstance(tokens, Tensor) else 0


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
