"""What Ray Train needs of the Trainer of transformers: a callback that reports its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.train
from ray.train.huggingface.transformers import prepare_trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightning_mics import checkpoint as checkpoints
from lightning_mics.errors import MiCSConfigError
from lightning_mics.ray.storage import report_saved

__all__ = ["RayTrainReportCallback", "prepare_trainer"]


class RayTrainReportCallback(TrainerCallback):
    """Reports each checkpoint of a :class:`~lightning_mics.transformers.MiCSTrainer`, with what was logged so far.

    With ``TrainingArguments(output_dir=run_path("trainer"))`` of :func:`lightning_mics.ray.run_path` checkpoints lie in
    Ray's storage already, and are reported where they are. From elsewhere rank 0 copies them there (Ray's own callback
    has every rank copy all of it).
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks who deletes checkpoints.

        Raises:
            MiCSConfigError: If both would.
        """
        if args.save_total_limit is not None and _lies_in_storage(Path(str(args.output_dir))):
            raise MiCSConfigError(
                f"save_total_limit={args.save_total_limit} would delete checkpoints that Ray lists. Leave it out, and "
                f"use RunConfig(checkpoint_config=CheckpointConfig(num_to_keep={args.save_total_limit})) of Ray.",
                setting="save_total_limit",
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reports a checkpoint that was saved. Collective over the world."""
        checkpoints.wait_for_checkpoints()
        metrics = {name: value for log in state.log_history for name, value in log.items()}
        folder = Path(str(args.output_dir)).absolute() / f"checkpoint-{state.global_step}"
        if _lies_in_storage(folder):
            report_saved(metrics, ray.train.Checkpoint(folder, _storage().storage_filesystem))
        else:
            is_first = ray.train.get_context().get_world_rank() == 0
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint(folder) if is_first else None)


def _storage() -> Any:
    return ray.train.get_context().get_storage()


def _lies_in_storage(folder: Path) -> bool:
    storage = _storage()
    is_local = storage.storage_filesystem.type_name == "local"
    return is_local and folder.resolve().is_relative_to(Path(storage.experiment_fs_path).resolve())
