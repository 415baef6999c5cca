"""Cross-entropy of a head that computes few logits at a time, as fused kernels do it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_mics.errors import MiCSConfigError


class ChunkedLoss:
    """Takes a model of Hugging Face and a batch, returns the loss.

    Args:
        chunks: Pieces in which a micro-batch's logits are computed.
    """

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Computes it in the place of the head.

        Raises:
            MiCSConfigError: If the model has no head, or the batch no tokens.
        """
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None or not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise MiCSConfigError(
                f"loss_chunks={self._chunks} needs a language model of Hugging Face with a head, and a batch with "
                f"'input_ids'; {type(model).__name__} is none, or its batch has none. A model that returns its own "
                "loss is traced as it is."
            )
        inputs, found = {key: value for key, value in batch.items() if key != "labels"}, []
        labels = batch.get("labels", batch["input_ids"])

        def instead(hidden: Tensor) -> Tensor:
            found.append(_FusedLoss.apply(hidden, head.weight, head.bias, labels, self._chunks))
            return found[-1]

        with _in_place_of(head, instead):
            model(**inputs)
        return found[-1]


@contextmanager
def _in_place_of(module: nn.Module, forward: Any) -> Iterator[None]:
    """Makes a module compute something else, inside of its hooks."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class _FusedLoss(torch.autograd.Function):
    """Turns logits into gradients while they are there; the head's gradient is summed over the chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunks: int) -> Tensor:
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        row_grads = torch.empty_like(rows)
        weight_grad = torch.zeros_like(weight) if weight.requires_grad else None
        bias_grad = None if bias is None or not bias.requires_grad else torch.zeros_like(bias)
        total = torch.zeros((), dtype=torch.float32)
        pieces = (tensor.chunk(chunks) for tensor in (rows, targets, row_grads))
        for part, expected, grad in zip(*pieces, strict=True):
            logs = functional.linear(part, weight, bias).float().log_softmax(-1)
            total += functional.nll_loss(logs, expected, reduction="sum")
            logs.exp_().scatter_add_(1, expected.unsqueeze(1), logs.new_full((len(part), 1), -1.0))
            wrong = logs.div_(len(rows)).to(part.dtype)
            del logs
            grad.copy_(wrong @ weight)
            if weight_grad is not None:
                torch.addmm(weight_grad, wrong.T, part, out=weight_grad)
            if bias_grad is not None:
                bias_grad.add_(wrong.sum(0))
            del wrong
        ctx.save_for_backward(row_grads.view_as(hidden), weight_grad, bias_grad)
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(saved if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors), None, None
