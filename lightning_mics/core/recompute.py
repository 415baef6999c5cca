"""Which blocks recompute their activations in the backward pass, and that nobody else recomputes them, too."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_mics.config import MiCSConfig, chooses_modules
from lightning_mics.core._torch import (
    before_checkpoints,
    checkpoint,
    is_checkpointed,
    keep_products,
    outside_graphs,
    repeated_by_another,
    uncompiled,
    waits_on_host,
    will_recompute,
)
from lightning_mics.core.units import Unit, chosen_modules, outermost_of
from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import Recomputation

_FLAGS = ("gradient_checkpointing", "grad_checkpointing")  # of transformers and diffusers, and of timm
_BLOCKS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_ONE_OF_THEM = (
    "It would be computed twice. Use one of them: activation_checkpointing=False, or no checkpoint() in the model "
    "(gradient_checkpointing_disable() with transformers)."
)


def recomputes(unit: Unit) -> bool:
    """Returns whether activation checkpointing applies to a unit: to blocks, not to single layers."""
    return len(unit) == 1 and any(uncompiled(unit[0]).children())


def blocks_to_recompute(
    model: nn.Module, units: Sequence[Unit], config: MiCSConfig, entries: Sequence[nn.Module] = ()
) -> list[nn.Module]:
    """Returns the modules that recompute their activations in the backward pass, none inside another.

    Args:
        model: The model, not sharded yet.
        units: Its units, without the root.
        config: The settings; ``activation_checkpointing`` counts.
        entries: Modules that are units because they are called on their own; only names choose them.

    Raises:
        MiCSConfigError: If there is none, or if the model recomputes one of them itself.
    """
    how = config.activation_checkpointing
    if config.activation_checkpointing_offload and how in (False, "selective"):
        raise MiCSConfigError(
            "activation_checkpointing_offload=True moves inputs of recomputed blocks to host memory, but "
            + ("'selective' keeps the results of products on the device. " if how else "no block is recomputed. ")
            + "Use it with activation_checkpointing=True, or with classes of blocks.",
            setting="activation_checkpointing_offload",
        )
    if not how:
        return []
    if chooses_modules(how):
        blocks = chosen_modules(model, how, "activation_checkpointing")
    else:
        blocks = outermost_of([unit[0] for unit in units if recomputes(unit) and unit[0] not in entries])
    if not blocks:
        raise MiCSConfigError(
            f"activation_checkpointing={how!r}, but no unit of the model is a block whose activations could be "
            "recomputed. Name the blocks, as in activation_checkpointing=['Block'], or use False.",
            setting="activation_checkpointing",
        )
    blocks = blocks[::how] if isinstance(how, int) else blocks
    _refuse_both(model, blocks)
    return blocks


def planned_recomputation(model: nn.Module, units: Sequence[Unit], config: MiCSConfig) -> Recomputation | None:
    """Returns what a plan calls the blocks that recompute; ``None`` for a choice that no plan knows."""
    how = config.activation_checkpointing
    if not chooses_modules(how):
        return cast("Recomputation", how)
    return True if _are_all(blocks_to_recompute(model, units, config), units) else None


def recomputation_of(model: nn.Module, config: MiCSConfig) -> object:
    """Returns what a plan calls the blocks of a sharded model that recompute; the setting where no plan knows it."""
    how = config.activation_checkpointing
    if not chooses_modules(how):
        return how
    units: list[Unit] = [
        (module,) for module in model.modules() if isinstance(module, FSDPModule) and module is not model
    ]
    return True if _are_all([module for module in model.modules() if module in _BLOCKS], units) else how


def _are_all(blocks: Sequence[nn.Module], units: Sequence[Unit]) -> bool:
    """Returns whether blocks are those that ``activation_checkpointing=True`` chooses."""
    return set(blocks) == set(outermost_of([unit[0] for unit in units if recomputes(unit)]))


def checkpoint_activations(blocks: Sequence[nn.Module], config: MiCSConfig, device_type: str) -> None:
    """Makes blocks recompute their activations in the backward pass.

    Args:
        blocks: The blocks, not sharded yet.
        config: The settings; ``activation_checkpointing`` and ``activation_checkpointing_offload`` count.
        device_type: Where they compute.
    """
    offloads = config.activation_checkpointing_offload and device_type != "cpu"
    options = {"context_fn": keep_products} if config.activation_checkpointing == "selective" else {}
    for block in blocks:
        block.register_forward_pre_hook(_refuse_outside)
        if offloads:
            waits_on_host(block, device_type)
        checkpoint(block, **options)
        _BLOCKS.add(block)
    if blocks:
        before_checkpoints(_refuse_inside)


def _refuse_both(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Refuses blocks of which the model says that it recomputes them, what is in them, or what they are in."""
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        itself = is_checkpointed(module) or any(getattr(module, flag, None) is True for flag in _FLAGS)
        if itself and not inside.isdisjoint(module.modules()):
            raise MiCSConfigError(
                f"activation_checkpointing= recomputes {_names(blocks)}, and the model's {type(module).__name__} "
                f"recomputes activations itself. {_ONE_OF_THEM}",
                setting="activation_checkpointing",
            )


def _names(blocks: Sequence[nn.Module]) -> str:
    return ", ".join(sorted({type(uncompiled(block)).__name__ for block in blocks}))


@outside_graphs
def _refuse_outside(block: nn.Module, args: Any) -> None:
    """Refuses a block that someone else repeats in the backward pass."""
    if repeated_by_another(block):
        raise MiCSConfigError(
            f"activation_checkpointing= recomputes {_names([block])}, and a checkpoint() around it recomputes it, too. "
            f"{_ONE_OF_THEM}",
            setting="activation_checkpointing",
        )


@outside_graphs
def _refuse_inside() -> None:
    """Refuses a call of ``checkpoint()`` inside a block that recomputes."""
    running = [block for block in _BLOCKS if will_recompute(block)] if torch.is_grad_enabled() else []
    if running:
        raise MiCSConfigError(
            f"activation_checkpointing= recomputes {_names(running)}, and a checkpoint() inside recomputes a part of "
            f"it, too. {_ONE_OF_THEM}",
            setting="activation_checkpointing",
        )
