"""Planning for a model: :func:`plan`, which :mod:`lightning_mics.plan` offers under its own name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_mics.config import MiCSConfig
from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.batch import divide_batch
from lightning_mics.plan.hardware import Cluster, find_instance, load_cluster
from lightning_mics.plan.profile import ModelProfile
from lightning_mics.plan.search import Choices, Planning, search
from lightning_mics.plan.settings import MasterWeights, Recomputation, Training, Variant
from lightning_mics.topology import OptimizerShardSize, ShardSize, check_positive_int
from lightning_mics.trace import profile_model
from lightning_mics.trace.losses import ChunkedLoss
from lightning_mics.trace.models import build_model
from lightning_mics.trace.optimizers import optimizer_footprint
from lightning_mics.trace.structure import dtype_name
from lightning_mics.trace.variants import apply_variant


def plan(
    model: str | os.PathLike[str] | nn.Module | ModelProfile,
    cluster: Cluster | str | os.PathLike[str],
    *,
    num_nodes: int | None = None,
    sample: Any = None,
    sequence_length: int | None = None,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    accumulation: int | None = None,
    precision: str = "bf16-mixed",
    optimizer: str = "AdamW",
    shard_size: ShardSize | None = None,
    hierarchical: bool | None = None,
    activation_checkpointing: Recomputation | None = None,
    activation_checkpointing_offload: bool = False,
    reshard_after_forward: bool | None = None,
    memory_limit: float | None = None,
    ranking: str = "advice",
    optimizer_shard_size: OptimizerShardSize | None = None,
    replication_reduce_dtype: str | None = None,
    replication_gather_dtype: str | None = None,
    master_weights: MasterWeights | None = None,
    loss_chunks: int | None = None,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] = (),
    frozen: Sequence[str] = (),
    base_bits: int | None = None,
    double_quantization: bool = False,
    attention: str | None = None,
    compile_gain: float = 1.0,
    holds_outputs: bool = True,
) -> Planning:
    """Predicts memory, time and traffic of training a model, and ranks what fits.

    Args:
        model: A built-in name (``"gpt2-xl"``), the path of a Hugging Face configuration, ``"module:factory"``, a module
            (of which only shapes are used; it may be on the meta device), or a profile.
        cluster: Hardware from :func:`find_instance` or :func:`load_cluster`, the name of a cloud instance, or the path
            of a YAML file.
        num_nodes: Number of nodes; by default what ``cluster`` says, one for the name of an instance.
        sample: A batch of one sample or more, if ``model`` is a module; without it activations follow a formula,
            or are left out where none is known.
        sequence_length: Tokens of a sample; by default the longest that the model takes (8,192 if it could take more).
        global_batch: Samples of an optimizer step, of all ranks.
        micro_batch: Samples of a rank in a microstep.
        accumulation: Microsteps of an optimizer step.
        precision: One of Lightning's names: ``"bf16-mixed"``, ``"bf16-true"``, ``"16-mixed"``, ``"32-true"`` ...
        optimizer: Name of a class in ``torch.optim``.
        shard_size: Fixes the partition size; all that work are tried by default.
        hierarchical: Fixes whether collectives across nodes run in two stages.
        activation_checkpointing: Fixes which blocks are computed again in the backward pass: ``False`` for none,
            ``True`` for all, a number for every so-many-th, ``"selective"`` for all but matrix products and attention.
        activation_checkpointing_offload: Whether what blocks that are computed again keep waits in host memory.
        reshard_after_forward: Fixes whether blocks are freed after the forward pass.
        memory_limit: Bytes that a rank may use; by default the accelerator's memory.
        ranking: ``"advice"`` or ``"throughput"``; see :class:`~lightning_mics.plan.search.Choices`.
        optimizer_shard_size: Fixes over how many ranks optimizer states are divided; by default those of the partition,
            all where that does not fit, and with masters there all or those of eight partitions where that is faster.
        replication_reduce_dtype: Dtype in which replicas exchange gradients; by default that of the reduction.
        replication_gather_dtype: Dtype in which what others have stepped on is fetched; by default that of the shards.
        master_weights: Fixes where float32 values of parameters are if optimizer states are divided over more ranks:
            ``"partition"``, or ``"owners"``, which keeps shards in 16 bits; by default the second where the precision
            allows it.
        loss_chunks: Pieces in which a fused cross-entropy computes a micro-batch's logits; by default all at once.
        lora_rank: Rank of adapters (LoRA), beside which everything else is frozen.
        lora_targets: Names or patterns of the layers that get adapters; by default all linear ones but the head.
        frozen: Names or patterns of parameters that are not trained.
        base_bits: Bits of weights of linear layers that are not trained (QLoRA): 4 or 8, as bitsandbytes keeps them.
        double_quantization: Whether the scales of a base of 4 bits are quantized, too.
        attention: Name of the attention in transformers, for example ``"eager"``; by default its own choice.
        compile_gain: How many times as fast blocks compute because they are compiled.
        holds_outputs: Whether the training loop holds the model's outputs, as ``outputs = model(...)`` does.

    Returns:
        The ranked plans, what does not fit, and other ways to train to compare with.

    Raises:
        MiCSConfigError: If a name is unknown or numbers contradict each other. That nothing fits is not an error
            here; ``Planning.best`` raises it.

    Example::

        best = plan("gpt2-xl", "p4d.24xlarge", num_nodes=16, global_batch=1024).best
        print(best.candidate.shard_size, best.memory.total, best.time.seconds)
    """
    hardware = _hardware(cluster, num_nodes)
    config = MiCSConfig(
        replication_reduce_dtype=replication_reduce_dtype,
        replication_gather_dtype=replication_gather_dtype,
        master_weights=master_weights or "partition",
    )
    names = ("replication_reduce_dtype", "replication_gather_dtype")
    wires = {name: dtype_name(wire) for name in names if (wire := getattr(config, name)) is not None}
    variant = Variant(
        loss_chunks=loss_chunks,
        lora_rank=lora_rank,
        lora_targets=tuple(lora_targets),
        frozen=tuple(frozen),
        base_bits=base_bits,
        double_quantization=double_quantization,
        attention=attention,
    )
    if not compile_gain > 0:
        raise MiCSConfigError(f"compile_gain={compile_gain!r} must be positive. Try compile_gain=1.15.")
    training = replace(
        Training.in_precision(precision, optimizer),
        **wires,
        variant=variant,
        compile_gain=compile_gain,
        holds_outputs=holds_outputs,
    )
    if master_weights == "owners" and not training.has_masters:
        raise MiCSConfigError(
            f"master_weights='owners' has nothing to act on in {precision}: float32 is kept beside shards in 16 "
            "bits with precision='bf16-mixed' or '16-mixed'.",
            setting="master_weights",
        )
    optimizer_footprint(optimizer, (), foreach=False)  # refuses what is none before anything is traced
    if shard_size is not None:
        shard_size = hardware.topology.resolve_shard_size(shard_size)
    if hierarchical is not None and not isinstance(hierarchical, bool):
        raise MiCSConfigError(f"hierarchical={hierarchical!r} is not one of None, True, False.")
    if sequence_length is not None:
        check_positive_int("sequence_length", sequence_length, 1024)
    if memory_limit is not None and not memory_limit > 0:
        raise MiCSConfigError(f"memory_limit={memory_limit!r} must be positive. Try memory_limit=40 * 2**30.")
    choices = Choices(
        batches=divide_batch(hardware.world_size, global_batch, micro_batch, accumulation),
        shard_sizes=None if shard_size is None else [shard_size],
        optimizer_shard_size=optimizer_shard_size,
        master_weights=master_weights,
        hierarchical=hierarchical,
        activation_checkpointing=activation_checkpointing,
        activation_checkpointing_offload=activation_checkpointing_offload,
        reshard_after_forward=reshard_after_forward,
        memory_limit=memory_limit,
        ranking=ranking,
    )
    device_type = hardware.node.accelerator.device_type
    profile = profile_of(model, sample, sequence_length, training.param_dtype, device_type, variant)
    if profile.trainable_numel == 0:
        raise MiCSConfigError(f"{profile.name} has no parameter that is trained, so there is nothing to plan.")
    return search(profile, hardware, training, choices)


def _hardware(cluster: Cluster | str | os.PathLike[str], num_nodes: int | None) -> Cluster:
    if isinstance(cluster, str):
        return find_instance(cluster, 1 if num_nodes is None else num_nodes)
    if isinstance(cluster, os.PathLike):
        return load_cluster(cluster, num_nodes)
    return cluster if num_nodes is None else cluster.with_nodes(num_nodes)


def profile_of(
    model: Any, sample: Any, sequence_length: int | None, param_dtype: str, device_type: str, variant: Variant
) -> ModelProfile:
    """Returns the profile of what :func:`plan` takes as a model, in a dtype and on a kind of device."""
    name = None
    if isinstance(model, str | os.PathLike):
        model, sample, name = build_model(model, sequence_length=sequence_length, attention=variant.attention)
        apply_variant(model, variant)
    elif replace(variant, loss_chunks=None) != Variant():
        raise MiCSConfigError(
            f"{', '.join(variant.words)}: only a model that is named is changed. Change your own before you pass it."
        )
    if isinstance(model, ModelProfile):
        return model
    return profile_model(
        model,
        sample,
        param_dtype=None if param_dtype == "float32" else param_dtype,
        loss=None if variant.loss_chunks is None else ChunkedLoss(variant.loss_chunks),
        name=name,
        sequence_length=sequence_length,
        device_type="cpu" if device_type == "cpu" else "cuda",
    )
