"""States of models and optimizers, by parameter name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mics.checkpoint import ranks
from lightning_mics.core._torch import plain_name, tree_leaves
from lightning_mics.core._torch import shard_like as shard_like
from lightning_mics.core.apart import on_all_ranks
from lightning_mics.core.class_names import class_of
from lightning_mics.core.slices import empty_state
from lightning_mics.errors import CheckpointError

# Lightning validates, and then saves, in inference mode, in which DTensors cannot be detached.
_outside_inference_mode = torch.inference_mode(False)


@_outside_inference_mode
def model_state(model: nn.Module, *, full: bool = False) -> dict[str, Any]:
    """Returns a model's parameters and buffers by name.

    Args:
        model: A sharded or plain model.
        full: Whether to return whole tensors in host memory, on rank 0 only (the others get none); collective then.
            Otherwise each rank gets its shards, which share memory with the model.
    """
    with arrival("model_state(full=True)", model.parameters() if full else ()):
        state = get_model_state_dict(model)
        return _gathered_state(model, state) if full else state


def _gathered_state(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Gathers a state on rank 0. What is one parameter under several names is one tensor again, and travels once."""
    owners = parameters_by_name(model)
    by_owner: dict[Any, Any] = {}
    whole: dict[str, Any] = {}
    for name, value in state.items():
        owner = owners.get(name, name)
        if owner not in by_owner:
            by_owner[owner] = _on_first_rank(value)
        whole[name] = by_owner[owner]
    return whole if ranks.rank() == 0 else {}


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a model by all of their names in its state."""
    return {plain_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}


def is_extra_state(name: Any, value: Any) -> bool:
    """Returns whether an entry of a state is what a module's ``get_extra_state`` returned, unless that is a tensor."""
    return isinstance(name, str) and name.rpartition(".")[2] == "_extra_state" and not isinstance(value, Tensor)


def huggingface_metadata(model: nn.Module) -> dict[str, Any]:
    """Returns what a checkpoint must remember for ``from_pretrained``: the configuration and the name prefix."""
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(module, "_no_split_modules") and hasattr(config, "to_json_string"):
            described = json.loads(config.to_json_string())
            described["architectures"] = [class_of(module).__name__]
            return {"hf_config": json.dumps(described, indent=2), "hf_prefix": f"{name}." if name else ""}
    return {}


def trained_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Returns an optimizer's parameters by name, in the order of its groups.

    Raises:
        CheckpointError: If a parameter is not the model's.
    """
    names = {param: plain_name(name) for name, param in model.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(param not in names for param in params):
        raise CheckpointError(
            f"{type(optimizer).__name__} holds parameters that {type(model).__name__} does not have. Create the "
            "optimizer after the model was sharded."
        )
    return {names[param]: param for param in params}


@_outside_inference_mode
def optimizer_state(model: nn.Module, optimizer: Optimizer, *, full: bool = False) -> dict[str, Any]:
    """Returns an optimizer's states.

    Parameters that never had a gradient have no state, and get none.

    Args:
        model: The model whose parameters it trains.
        optimizer: The optimizer.
        full: Whether to return whole tensors in host memory, on rank 0 only (the others get none), keyed by position
            as PyTorch's optimizers key them, with ``names`` in that order; collective then. Otherwise each rank gets
            its shards, keyed by parameter name.

    Raises:
        CheckpointError: If a parameter is not the model's.
    """
    names = list(trained_parameters(model, optimizer))
    plain = optimizer.state_dict()
    if full:
        # Every rank takes part in gathering; only rank 0 keeps the result.
        with arrival("optimizer_state(full=True)", tree_leaves(plain["state"])):
            states = {index: _on_first_rank(state) for index, state in plain["state"].items()}
        return {**plain, "state": states, "names": names} if ranks.rank() == 0 else {}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in plain["param_groups"]]
    return {"state": {names[index]: state for index, state in plain["state"].items()}, "param_groups": groups}


def _on_first_rank(value: Any) -> Any:
    """Gathers whatever shards there are in a value; rank 0 gets them in host memory. Collective."""
    if isinstance(value, DTensor):
        return gathered(value)
    if isinstance(value, Tensor):
        return _on_host(value.detach())
    if isinstance(value, dict):
        return {key: _on_first_rank(entry) for key, entry in value.items()}
    return value


def arrival(what: str, values: Iterable[Any]) -> AbstractContextManager[None]:
    """Returns a context that all ranks must come to, if shards among the values cannot be gathered without them.

    Args:
        what: The call, as users write it.
        values: What is to be gathered.
    """
    gathers = any(isinstance(value, DTensor) and value.device_mesh.size() > 1 for value in values)
    return on_all_ranks(what) if gathers else nullcontext()


@_outside_inference_mode
def whole(shard: DTensor, what: str = "gathering a shard") -> Tensor:
    """Returns the whole of a shard, in host memory and without padding. Collective.

    Args:
        shard: The shard.
        what: The call that needs it, as users write it.
    """
    with arrival(what, [shard]):
        return _on_host(_full(shard))


def _full(shard: DTensor) -> Tensor:
    # Offloaded shards travel through the mesh's device.
    return cast(DTensor, shard.detach().to(shard.device_mesh.device_type)).full_tensor()


def _on_host(tensor: Tensor) -> Tensor:
    # Gathered from uneven shards it is a view of padded memory, which safetensors refuse.
    tensor = tensor.cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def gathered(shard: DTensor) -> Tensor | None:
    """Returns the whole of a shard on rank 0, in host memory; ``None`` on the others. Collective."""
    full = _full(shard)
    return _on_host(full) if ranks.rank() == 0 else None


@_outside_inference_mode
def empty_like(param: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns memory for a state: divided as ``param``'s states are if it has its shape, else in host memory."""
    if size == param.shape:
        return empty_state(param, dtype)
    return torch.empty(size, dtype=dtype)
