"""Passes of a fake copy of a model, sharded over one rank."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_mics.core._torch import checkpoint, tree_map_only
from lightning_mics.core.apply import apply_unit
from lightning_mics.core.recompute import recomputes
from lightning_mics.core.units import Unit as Modules
from lightning_mics.trace._torch import copy_as_fake, fake_tensors, one_rank_mesh
from lightning_mics.trace.huggingface import plain_sequences
from lightning_mics.trace.kernels import LikeKernels
from lightning_mics.trace.leaks import refuse_leaks
from lightning_mics.trace.replay import Trace, trace
from lightning_mics.trace.steps import Loss, Sample
from lightning_mics.trace.structure import Structure

# By members of stacks that do not run, those that stand for them.
Twins = Mapping[nn.Module, nn.Module]
# What Lightning hangs on a module; a copy must not log to it.
_TRAINERS = {"_trainer", "_fabric"}


def run(
    structure: Structure, twins: Twins, sample: Sample, step: Loss, device_type: str, *, checkpoints: bool
) -> list[Trace]:
    """Returns what passes with one and with two samples count, without those that twins stand for.

    With activation checkpointing there is no backward pass.

    Raises:
        LeakedTensorsError: If the model keeps tensors of the passes.
    """
    traces, modes = [], []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), one_rank_mesh() as mesh:
        warnings.simplefilter("ignore")
        for samples in (1, 2):
            # Each pass has a copy of its own: of units of several modules the tracker leaves hooks behind.
            with fake_tensors() as mode:
                modes.append(mode)
                root, unit_of = _build(structure, twins, step, mode, mesh, checkpoints)
                with plain_sequences(), LikeKernels(device_type):
                    batch = _resize(sample, samples)
                    sizes = structure.root_sizes()
                    traces.append(trace(root, root.model, unit_of, batch, sizes, backward=not checkpoints))
    refuse_leaks(structure.model, modes)
    return traces


class _Step(nn.Module):
    """A forward pass up to the loss, as a root that FSDP can wrap."""

    def __init__(self, model: nn.Module, step: Loss) -> None:
        super().__init__()
        self.model, self._step = model, step

    def forward(self, batch: Any) -> Tensor:
        return self._step(self.model, batch)


def _build(
    structure: Structure, twins: Twins, step: Loss, mode: Any, mesh: DeviceMesh, checkpoints: bool
) -> tuple[_Step, dict[nn.Module, Modules]]:
    """Returns a sharded fake copy, and which unit its modules belong to."""
    copied, copies = _copy(structure.model, mode, twins)
    unit_of: dict[nn.Module, Modules] = {}
    for unit in structure.units:
        if unit[0] not in twins:
            modules = tuple(copies[module] for module in unit)
            unit_of.update(dict.fromkeys(modules, unit))
            if checkpoints and recomputes(modules) and unit not in structure.around:
                checkpoint(modules[0])
            apply_unit(modules, mesh, structure.config, is_root=False)
    root = _Step(copied, step)
    apply_unit((root,), mesh, structure.config, is_root=True)
    return root, unit_of


def _copy(model: nn.Module, mode: Any, twins: Twins) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Copies a model without its values and without the members of stacks that others stand for."""
    memo: dict[int, Any] = {}
    absent = nn.Module()
    for member in twins:
        memo[id(member)] = absent
    for module in model.modules():
        for name in _TRAINERS:
            memo[id(vars(module).get(name))] = vars(module).get(name)
    left_out = {inner for member in twins for inner in member.modules()}
    kept = [module for module in model.modules() if module not in left_out]
    for tensor in {t: None for m in kept for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]}:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        is_param = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_param else fake
    # Fake tensors that stand for real ones are made by the mode itself, which must not see its own.
    copied = copy_as_fake(model, memo, mode)
    for module in copied.modules():
        _leave_out(module, absent)
        if _TRAINERS.intersection(vars(module)):
            vars(module).update(dict.fromkeys(_TRAINERS), log=_nothing, log_dict=_nothing)
    copied.train()
    return copied, {module: memo[id(module)] for module in model.modules() if id(module) in memo}


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _leave_out(module: nn.Module, absent: nn.Module) -> None:
    children = list(module.children())
    if isinstance(module, nn.ModuleList | nn.Sequential) and absent in children:
        del module[:]
        module.extend(child for child in children if child is not absent)


def _resize(sample: Any, samples: int) -> Any:
    """Returns a fake batch like ``sample`` with another number of samples."""

    def resize(tensor: Tensor) -> Tensor:
        shape = (samples, *tensor.shape[1:]) if tensor.dim() else ()
        return torch.empty(shape, dtype=tensor.dtype, device="cpu")

    return tree_map_only(Tensor, resize, dict(sample) if isinstance(sample, Mapping) else sample)
