"""A model's profile, traced with a sample or estimated without one."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lightning_mics.config import MiCSConfig, Wrap
from lightning_mics.core.checks import check_model
from lightning_mics.core.quantized import is_quantized
from lightning_mics.core.recompute import recomputes
from lightning_mics.core.units import Unit as Modules
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.profile import Amount, ModelProfile, Unit
from lightning_mics.trace.estimate import estimate
from lightning_mics.trace.huggingface import without_idle_mask
from lightning_mics.trace.replay import Counts, Trace
from lightning_mics.trace.run import Twins, run
from lightning_mics.trace.steps import Loss, Sample, steps, tensors_in
from lightning_mics.trace.structure import Key, Structure


def profile_model(
    model: nn.Module,
    sample: Sample | None,
    *,
    wrap: Wrap = "auto",
    param_dtype: str | None = None,
    loss: Loss | None = None,
    name: str | None = None,
    sequence_length: int | None = None,
    device_type: Literal["cuda", "cpu"] = "cuda",
) -> ModelProfile:
    """Measures what a model's units would need, without memory and without a device.

    The model is left as it is. Attention that is computed in one piece counts without scores in memory, also where
    dropout or grouped queries would make a CPU store them; causal attention counts whole in operations.

    Args:
        model: The model, not sharded; its parameters may be on any device, also meta.
        sample: A batch as ``model`` takes it (a mapping is passed as keywords, a list or tuple as arguments). Tensors
            begin with the samples; how many is of no concern. ``None`` estimates from shapes and published formulas.
        wrap: What becomes a unit; see :class:`~lightning_mics.MiCSConfig`.
        param_dtype: Dtype in which parameters are gathered and computed with; ``None`` keeps their own.
        loss: Takes the model and a batch, returns the loss. By default ``training_step(batch, 0)`` where the model has
            one, else the ``loss`` in the model's output (given labels where it takes them beside ``input_ids``), else
            the mean of its outputs.
        name: What to call the model; by default its class.
        sequence_length: Tokens of a sample; by default the sample's own, without one the longest that the model takes.
        device_type: Where it would train. ``"cpu"`` counts what CPU kernels keep, such as dropout masks of full width.

    Returns:
        The profile, with amounts in bytes.

    Raises:
        MiCSConfigError: If the model cannot be sharded, or not run on fake tensors, or is quantized already.
    """
    check_model(model)
    if few := sum(map(is_quantized, model.parameters())):
        raise MiCSConfigError(
            f"{type(model).__name__} has {few} weights of 4 or 8 bits, which cannot be traced. Plan it as it is before "
            "it is quantized, by the name of what makes it: model='module:factory' with base_bits=4 or base_bits=8."
        )
    structure = Structure(model, MiCSConfig(wrap=wrap, param_dtype=param_dtype))
    if sample is None:
        return estimate(structure, name, sequence_length)
    figures, order = _measure(structure, without_idle_mask(model, sample), loss, device_type)
    length = _sequence_length(sample) or sequence_length
    return structure.profile(figures, order, name=name, sequence_length=length, source="trace")


def _sequence_length(sample: Any) -> int | None:
    """Returns the tokens of a sample: the width of its first matrix of whole numbers."""
    matrices = (tensor for tensor in tensors_in(sample) if tensor.dim() == 2 and not tensor.is_floating_point())
    return next((tensor.shape[1] for tensor in matrices), None)


def _measure(
    structure: Structure, sample: Sample, loss: Loss | None, device_type: str
) -> tuple[dict[Key, Unit], list[Modules]]:
    """Returns the figures of all units, and the order of their forward passes."""
    failures: list[Exception] = []
    for twins in (structure.twins, {}) if structure.twins else ({},):
        for step in steps(structure.model, sample, loss):
            try:
                one, two = run(structure, twins, sample, step, device_type, checkpoints=False)
                if twins and not _compute_alike(structure, one):
                    break
                kept = run(structure, twins, sample, step, device_type, checkpoints=True)
                return _expand(structure, twins, _fit(structure, [one, two], kept))
            except MiCSConfigError:
                raise
            except Exception as error:
                failures.append(error)
    reason = f"{type(failures[-1]).__name__}: {str(failures[-1]).strip().partition(chr(10))[0]}"
    raise MiCSConfigError(
        f"{type(structure.model).__name__} cannot be traced ({reason}). "
        "The sample must be what its forward takes, and nothing in it may depend on values. Pass loss= to run it in "
        "another way, or no sample for an estimate from shapes."
    ) from failures[-1]


def _compute_alike(structure: Structure, counts: Trace) -> bool:
    """Returns whether those that stand for others see inputs of one size, as equal layers of one stack may not."""
    return all(len({counts[(member,)].forward_flops for member in group}) == 1 for group in structure.stand_ins)


def _fit(structure: Structure, traces: list[Trace], kept: list[Trace]) -> dict[Key, Unit]:
    """Makes lines of the counts for one and for two samples, in the order of the forward pass."""
    width = structure.compute_dtype.itemsize  # of an element of a gradient

    def line(key: Key, name: str, of: list[Trace] = traces) -> Amount:
        one, two = (max(0, getattr(trace.get(key, Counts()), name)) for trace in of)
        slope = two - one
        if slope > one or slope < 0:  # not a line: what two samples need counts
            return Amount(per_sample=two / 2)
        return Amount(fixed=one - slope, per_sample=slope)

    def is_recomputed(key: Key) -> bool:
        return key is not None and (recomputes(key) or key in structure.around)

    return {
        key: Unit(
            name="",
            params=(),
            forward_flops=line(key, "forward_flops").at(1),
            backward_flops=line(key, "backward_flops").at(1),
            saved=line(key, "saved"),
            checkpoint=line(key, "saved", kept if is_recomputed(key) else traces),
            products=line(key, "products"),
            rest=line(key, "rest"),
            outputs=line(key, "outputs"),
            early_numel=traces[0][key].early_gradients // width if key is None else None,
            forward_extra=line(key, "forward_extra"),
            checkpoint_extra=line(key, "forward_extra", kept),
            backward_extra=line(key, "backward_extra"),
            forward_traffic=line(key, "forward_traffic"),
            backward_traffic=line(key, "backward_traffic"),
            attention_flops=line(key, "attention").at(1),
            masked_flops=line(key, "masked").at(1),
            forward_launches=traces[0][key].forward_launches,
            backward_launches=traces[0][key].backward_launches,
        )
        for key in traces[0]
    }


def _expand(structure: Structure, twins: Twins, figures: dict[Key, Unit]) -> tuple[dict[Key, Unit], list[Modules]]:
    """Gives the members of stacks that did not run the figures of those that stand for them."""
    stack_of = {member: stack for stack in structure.stacks for member in stack} if twins else {}
    order: dict[Modules, None] = {}
    for unit in figures:
        if unit is not None:
            order.update(
                dict.fromkeys((member,) for member in stack_of[unit[0]]) if unit[0] in stack_of else {unit: None}
            )
    order.update(dict.fromkeys(structure.units))
    figures |= {(member,): figures[(twin,)] for member, twin in twins.items()}
    return figures, list(order)
