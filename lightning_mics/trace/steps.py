"""Ways from a model and a batch to a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mics.core._torch import tree_leaves

Sample = Mapping[str, Any] | Sequence[Any] | Tensor
Loss = Callable[[Any, Any], Tensor]


def tensors_in(batch: Any) -> list[Tensor]:
    """Returns the tensors of a batch; mappings of any kind, as tokenizers return them, are looked into."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch: a mapping as keywords, a list or tuple as arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple):
        return model(*batch)
    return model(batch)


def steps(model: nn.Module, sample: Sample, loss: Loss | None) -> Iterator[Loss]:
    """Yields ways to a loss, the likeliest first; only ``loss`` if there is one."""
    if loss is not None:
        yield loss
        return
    if callable(getattr(model, "training_step", None)):
        yield lambda module, batch: _loss_in(module.training_step(batch, 0))
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    if isinstance(sample, Mapping) and "labels" not in sample and "input_ids" in sample and takes_labels:
        yield lambda module, batch: _loss_in(module(**batch, labels=batch["input_ids"]))
    yield lambda module, batch: _loss_in(call_model(module, batch))
    if isinstance(sample, list | tuple) and len(sample) > 1:
        yield lambda module, batch: _loss_in(module(batch[0]))


def _loss_in(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else _mean(output)


def mean_of_outputs(model: nn.Module, batch: Any) -> Tensor:
    """Calls a model and returns the sum of the means of its outputs, also where they hold a loss."""
    return _mean(call_model(model, batch))


def _mean(output: Any) -> Tensor:
    tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if not tensors:
        raise ValueError("its output has nothing that needs a gradient")
    if len(tensors) > 1:
        return torch.stack([tensor.float().mean() for tensor in tensors]).sum()
    return tensors[0] if tensors[0].dim() == 0 else tensors[0].float().mean()
