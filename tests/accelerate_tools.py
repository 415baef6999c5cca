"""What tests of the Accelerate adapters share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mics.accelerate import MiCSAccelerator, MiCSPlugin
from lightning_mics.testing import worker_device


def make_accelerator(
    gradient_accumulation_steps: int = 1, settings: dict[str, Any] | None = None, **accelerator: Any
) -> MiCSAccelerator:
    """Returns a fresh accelerator in a pool worker, as in a process of its own."""
    forget_accelerate()
    os.environ["ACCELERATE_USE_CPU"] = str(worker_device().type == "cpu").lower()
    return MiCSAccelerator(
        mics_plugin=MiCSPlugin(**(settings or {})),
        gradient_accumulation_steps=gradient_accumulation_steps,
        **accelerator,
    )


def forget_accelerate() -> None:
    """Drops what Accelerate keeps for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def carried(path: Path, *words: str) -> dict[str, str]:
    """Returns the environment that Accelerate's launcher gives to the processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(path), *words, "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.use_fsdp, "only this goes through torchrun on a machine without GPUs"
    return {**prepare_multi_gpu_env(arguments), "nproc_per_node": arguments.nproc_per_node}


def loader_of(rows: Tensor, batch_size: int) -> DataLoader[Tensor]:
    """Accelerate gives process ``r`` of ``n`` the batches ``r``, ``r + n`` and so on."""
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]


def lora(model: nn.Module) -> Any:
    """Adds LoRA adapters to a GPT-2, with values that are not zero."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0))
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    return adapted
