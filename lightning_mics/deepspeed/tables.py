"""What is known about DeepSpeed's fields without looking at their values."""

from __future__ import annotations

AUTO = "auto"
ZERO = "zero_optimization"
TOTAL, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
COMM, GRAD_ACCUM = "communication_data_type", "data_types.grad_accum_dtype"


# Sections that must be objects.
OBJECTS = (
    ZERO,
    f"{ZERO}.offload_optimizer",
    f"{ZERO}.offload_param",
    "optimizer",
    "optimizer.params",
    "scheduler",
    "scheduler.params",
    "bf16",
    "bfloat16",
    "fp16",
    "amp",
    "torch_autocast",
    "data_types",
    "activation_checkpointing",
    "checkpoint",
)

# Fields about which a function above decides.
CALCULATED = (
    TOTAL,
    MICRO,
    STEPS,
    "gradient_clipping",
    COMM,
    GRAD_ACCUM,
    "optimizer.type",
    "scheduler.type",
    "bf16.enabled",
    "bfloat16.enabled",
    "fp16.enabled",
    "amp.enabled",
    "torch_autocast.enabled",
    f"{ZERO}.stage",
    f"{ZERO}.mics_shard_size",
    f"{ZERO}.mics_hierarchical_params_gather",
    f"{ZERO}.zero_hpz_partition_size",
    f"{ZERO}.cpu_offload",
    f"{ZERO}.cpu_offload_param",
    f"{ZERO}.cpu_offload_params",
    f"{ZERO}.offload_optimizer.device",
    f"{ZERO}.offload_param.device",
)

# Which argument of transformers' TrainingArguments fills an "auto".
AUTO_OF_HUGGING_FACE = {
    TOTAL: "the product of the batch settings",
    MICRO: "per_device_train_batch_size",
    STEPS: "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas": "adam_beta1 and adam_beta2",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.total_num_steps": "max_steps",
}

# Fields of zero_optimization whose full names begin with stage3_.
STAGE3 = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "gather_fp16_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)

_UNITS_DECIDE = "Not needed: a unit's parameters are gathered and reduced together. Units are chosen with wrap."
_PREFETCH = "Not needed: the next unit is gathered while one computes. Units are chosen with wrap."
_OVERLAP = "Not needed: collectives always overlap with computation."
_RESHARD = "reshard_after_forward says whether units stay gathered between forward and backward."
_SAVED_WHOLE = "Checkpoints are folders of shards; 'mics consolidate' makes one file, on one CPU."
_ANY_OPTIMIZER = "Not needed: any torch.optim.Optimizer works on the shards."
CHANGED = {
    "managed_gradient_accumulation": "The Trainer or Accelerate counts the microsteps.",
    "steps_per_print": "Trainer(log_every_n_steps=...), or a line of your own in an Accelerate loop.",
    "disable_allgather": "Not needed: how parameters are gathered is not a choice.",
    "prescale_gradients": "Not needed: gradients are averaged over all ranks, in reduce_dtype.",
    "gradient_predivide_factor": "Not needed: gradients are averaged over all ranks, in reduce_dtype.",
    "gradient_allreduce_op": "Always the mean. For the sum multiply the loss by the number of ranks.",
    "dataloader_drop_last": "DataLoader(drop_last=...) in the script.",
    "zero_allow_untested_optimizer": _ANY_OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _ANY_OPTIMIZER,
    "optimizer.legacy_fusion": "Not needed: PyTorch's optimizers have foreach= and fused= instead.",
    "fp16.auto_cast": "precision='16-mixed' casts by autocast, inputs included.",
    "bf16.immediate_grad_update": "Not needed: gradients are reduced as soon as a unit's backward is done.",
    "bf16.bf16_master_weights_and_grads": "Shards stay in float32, unless precision='bf16-true'.",
    "bf16.bf16_optimizer_states": "Optimizer states have the dtype of the shards: bfloat16 with 'bf16-true'.",
    "data_types.param_dtype": "Follows from the precision; param_dtype= in a bare loop.",
    "amp.opt_level": "Apex is replaced by PyTorch's autocast: precision='16-mixed' is like level O1.",
    "torch_autocast.dtype": "Autocast is off in this file, or superseded: the precision decides.",
    "checkpoint.tag_validation": "Not needed: checkpoints have paths, and their parts are checked.",
    "checkpoint.load_universal": "Not needed: every checkpoint opens on other shard sizes and world sizes.",
    "checkpoint.parallel_write": "Not needed: all ranks write, each shard once.",
    "checkpoint.parallel_write.pipeline_stage": "Not needed: all ranks write, each shard once.",
    f"{ZERO}": "shard_size='node', the default: MiCS shards all states.",
    f"{ZERO}.allgather_partitions": _UNITS_DECIDE,
    f"{ZERO}.allgather_bucket_size": _UNITS_DECIDE,
    f"{ZERO}.reduce_bucket_size": _UNITS_DECIDE,
    f"{ZERO}.reduce_scatter": "Gradients are always reduce-scattered inside a partition group.",
    f"{ZERO}.use_multi_rank_bucket_allreduce": _UNITS_DECIDE,
    f"{ZERO}.contiguous_gradients": _UNITS_DECIDE,
    f"{ZERO}.overlap_comm": _OVERLAP,
    f"{ZERO}.grad_hooks": _OVERLAP,
    f"{ZERO}.sub_group_size": "Not needed: the optimizer steps over all shards of a rank.",
    f"{ZERO}.prefetch_bucket_size": _PREFETCH,
    f"{ZERO}.max_live_parameters": _RESHARD,
    f"{ZERO}.max_reuse_distance": _RESHARD,
    f"{ZERO}.module_granularity_threshold": _UNITS_DECIDE,
    f"{ZERO}.use_all_reduce_for_fetch_params": _UNITS_DECIDE,
    f"{ZERO}.allgather_sequential": _UNITS_DECIDE,
    f"{ZERO}.gather_16bit_weights_on_model_save": _SAVED_WHOLE,
    f"{ZERO}.gather_fp16_weights_on_model_save": _SAVED_WHOLE,
    f"{ZERO}.elastic_checkpoint": "Not needed: every checkpoint opens on other shard sizes and world sizes.",
    f"{ZERO}.load_from_fp32_weights": "Not needed: checkpoints hold the shards in their own dtype.",
    f"{ZERO}.ignore_unused_parameters": "Not needed: parameters without a gradient are allowed.",
    f"{ZERO}.enable_sanity_checks": "verify, which is on by default, checks the first window.",
    f"{ZERO}.override_module_apply": "Not needed: build large models on the meta device.",
    f"{ZERO}.leaf_module": "wrap=[...] names the classes that are gathered as one.",
    f"{ZERO}.leaf_module.classes": "wrap=[...] names the classes that are gathered as one.",
    f"{ZERO}.leaf_module.names": "wrap=function chooses the modules that are gathered as one.",
    f"{ZERO}.leaf_module.name_suffixes": "wrap=function chooses the modules that are gathered as one.",
    f"{ZERO}.cpu_offload_use_pin_memory": "Not needed: host memory is pinned wherever there is a GPU.",
    f"{ZERO}.offload_optimizer.pin_memory": "Not needed: host memory is pinned wherever there is a GPU.",
    f"{ZERO}.offload_param.pin_memory": "Not needed: host memory is pinned wherever there is a GPU.",
    "activation_checkpointing.number_checkpoints": "No activation checkpointing in this file.",
    "activation_checkpointing.partition_activations": "No activation checkpointing in this file.",
}

_NVME = "Part of the offload to disk, which MiCS does not have."
_STEPPED_BY_CPU = "cpu_offload=True offloads everything, and steps with PyTorch's optimizer on the CPU."
_PROFILER = "Use torch.profiler, or Trainer(profiler='simple')."
_SCALER = "PyTorch's GradScaler halves the scale at every overflow, and has no lower limit."
_QUANTIZED = "Nothing is quantized on the way. param_dtype='bfloat16' (by the precision) halves the gathered bytes."
NO_COUNTERPART = {
    "sparse_gradients": "Gradients are dense: nn.Embedding(sparse=False).",
    "wall_clock_breakdown": _PROFILER,
    "memory_breakdown": "Use torch.cuda.memory_summary(), or Lightning's DeviceStatsMonitor.",
    "dump_state": "Print the strategy's layout and ledger instead.",
    "graph_harvesting": "No captured graphs.",
    "log_level": "Use Python's logging: logging.getLogger('lightning_mics').setLevel(...).",
    "seq_parallel_communication_data_type": "No sequence parallelism.",
    "use_data_before_expert_parallelism": "No expert parallelism.",
    "use_node_local_storage": "All ranks need to see the same folder: use a shared file system.",
    "checkpoint.use_node_local_storage": "All ranks need to see the same folder: use a shared file system.",
    "checkpoint.writer": "Checkpoints are written by PyTorch's distributed checkpoint.",
    "checkpoint.checkpoint_serialization": "Checkpoints are written by PyTorch's distributed checkpoint.",
    "data_types.buffer_dtype": "Buffers keep their dtype; cast them in the model.",
    "fp16.loss_scale": "No loss scaling without float16.",
    "fp16.initial_scale_power": "No loss scaling without float16.",
    "fp16.loss_scale_window": "No loss scaling without float16.",
    "fp16.hysteresis": _SCALER,
    "fp16.consecutive_hysteresis": _SCALER,
    "fp16.min_loss_scale": _SCALER,
    "fp16.fp16_master_weights_and_grads": "Shards stay in float32 with float16.",
    "bf16.check_grad_overflow": "Steps are not skipped with bfloat16; Trainer(detect_anomaly=True) finds NaN.",
    "torch_autocast.lower_precision_safe_modules": "PyTorch's autocast chooses by operation, not by module.",
    "activation_checkpointing.cpu_checkpointing": "Use torch.autograd.graph.save_on_cpu() around the forward pass.",
    "activation_checkpointing.contiguous_memory_optimization": "PyTorch's allocator manages checkpoints.",
    "activation_checkpointing.synchronize_checkpoint_boundary": "Checkpoints need no synchronisation.",
    "activation_checkpointing.profile": _PROFILER,
    f"{ZERO}.param_persistence_threshold": "Every parameter is sharded; small ones travel with their unit.",
    f"{ZERO}.model_persistence_threshold": "Every parameter is sharded; small ones travel with their unit.",
    f"{ZERO}.round_robin_gradients": _STEPPED_BY_CPU,
    f"{ZERO}.legacy_stage1": "MiCS shards all states.",
    f"{ZERO}.zero_quantized_weights": _QUANTIZED,
    f"{ZERO}.zero_quantized_gradients": _QUANTIZED,
    f"{ZERO}.zero_quantized_nontrainable_weights": _QUANTIZED,
    f"{ZERO}.memory_efficient_linear": "PyTorch's own Linear is used.",
    f"{ZERO}.pipeline_loading_checkpoint": "Checkpoints are read in parallel by all ranks.",
    f"{ZERO}.log_trace_cache_warnings": "There is no trace of parameters to warn about.",
    f"{ZERO}.save_muon_momentum_buffer_in_memory": _NVME,
    f"{ZERO}.offload_optimizer.nvme_path": _NVME,
    f"{ZERO}.offload_optimizer.buffer_count": _NVME,
    f"{ZERO}.offload_optimizer.fast_init": _NVME,
    f"{ZERO}.offload_optimizer.pipeline_read": _NVME,
    f"{ZERO}.offload_optimizer.pipeline_write": _NVME,
    f"{ZERO}.offload_optimizer.ratio": _STEPPED_BY_CPU,
    f"{ZERO}.offload_optimizer.super_offload": _STEPPED_BY_CPU,
    f"{ZERO}.offload_optimizer.cpuadam_cores_perc": _STEPPED_BY_CPU,
    f"{ZERO}.offload_param.nvme_path": _NVME,
    f"{ZERO}.offload_param.buffer_count": _NVME,
    f"{ZERO}.offload_param.buffer_size": _NVME,
    f"{ZERO}.offload_param.max_in_cpu": _NVME,
}

_CURRICULUM = "Choose the data in the script: a sampler or a dataset of your own."
_MONITOR = "Use a logger of Lightning, or a tracker of Accelerate (log_with=...)."
_INFERENCE = "MiCS is for training only."
NO_COUNTERPART_SECTIONS = {
    "aio": _NVME,
    "amp": "Apex is replaced by PyTorch's autocast, which has no such options.",
    "autotuning": "Start with the smallest shard_size whose shards fit into memory, and measure.",
    "bfloat16": "An old name of bf16; what it sets beyond the precision has no counterpart.",
    "comet": _MONITOR,
    "comms_logger": "communication_ledger(model) counts what crosses which link; MiCSMonitor logs it.",
    "compile": "Call torch.compile(model) in the script.",
    "compression_training": "No compression. Use torch.ao or a package for it on the trained weights.",
    "csv_monitor": _MONITOR,
    "curriculum_learning": _CURRICULUM,
    "data_efficiency": _CURRICULUM,
    "datastates_ckpt": "Checkpoints are written by PyTorch's distributed checkpoint.",
    "eigenvalue": "Compute them in the script, on one device.",
    "elasticity": "Restart on another number of ranks: checkpoints reshard. torchrun --nnodes=MIN:MAX restarts.",
    "expert_parallel": "No expert parallelism; experts are sharded like all other modules.",
    "flops_profiler": "Use torch.utils.flop_counter.FlopCounterMode, or Lightning's ThroughputMonitor.",
    "hybrid_engine": _INFERENCE,
    "inference": _INFERENCE,
    "moe": "No expert parallelism; experts are sharded like all other modules.",
    "nebula": "Checkpoints are written by PyTorch's distributed checkpoint.",
    "pipeline": "No pipeline parallelism; a larger shard_size fits larger models.",
    "progressive_layer_drop": "Drop layers in the model's forward.",
    "quantize_training": "No quantization in training. Use torch.ao or a package for it.",
    "sparse_attention": "Use an attention of PyTorch: scaled_dot_product_attention, or flex_attention.",
    "tensor_parallel": "No tensor parallelism; a larger shard_size fits larger models.",
    "tensorboard": _MONITOR,
    "timers": _PROFILER,
    "wandb": _MONITOR,
    "weight_quantization": _INFERENCE,
    f"{ZERO}.zenflow": _STEPPED_BY_CPU,
    f"{ZERO}.zeropp_loco_param": _QUANTIZED,
}
