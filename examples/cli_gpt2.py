"""Pre-trains a GPT-2 with LightningCLI; the strategy is in the YAML file.

python examples/cli_gpt2.py fit --config examples/cli_gpt2.yaml
"""

from __future__ import annotations

from data import byte_loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader
from trainer_gpt2 import GPT2


class StandardLibrary(LightningDataModule):
    """Bytes of Python's standard library."""

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return byte_loader()


if __name__ == "__main__":
    trainer = LightningCLI(GPT2, StandardLibrary, save_config_callback=None, seed_everything_default=0).trainer
    if trainer.is_global_zero and "loss" in trainer.callback_metrics:
        print(f"final loss {trainer.callback_metrics['loss']:.3f}")
