"""``from_pretrained`` of transformers, with weights that are read when they are needed.

It builds its models on the meta device and then sets what it finds in files; of safetensors files it is given unread
tensors here. Everything else is its own: names, conversions, ties, new heads, its report.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_mics.core._torch import realize
from lightning_mics.core.log import inform
from lightning_mics.imports import after_import
from lightning_mics.pretrained.files import tensors_of

_MODELS = "transformers.modeling_utils"
_ARGUMENTS = ["model", "state_dict", "checkpoint_files", "load_config"]

_in_context: ContextVar[bool] = ContextVar("_in_context", default=False)
_state: dict[str, Any] = {"everywhere": lambda: False, "installed": False}
_said: set[str] = set()


@contextmanager
def reading_on_demand() -> Iterator[None]:
    """Lets ``from_pretrained`` leave weights unread inside this context."""
    _install()
    token = _in_context.set(True)
    try:
        yield
    finally:
        _in_context.reset(token)


def read_on_demand(when: Callable[[], bool]) -> None:
    """Lets ``from_pretrained`` leave weights unread outside a context too, whenever ``when()`` says so."""
    _state["everywhere"] = when
    _install()


def _install() -> None:
    if not _state["installed"]:
        _state["installed"] = True
        after_import(_MODELS, _take_over)
        _read_for_ddp()


def _read_for_ddp() -> None:
    """Has DDP find weights that are read: it keeps hold of parameters before it asks for values."""
    init = DistributedDataParallel.__init__

    @functools.wraps(init)
    def reading(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        for param in module.parameters():
            realize(param)
        init(self, module, *args, **kwargs)

    DistributedDataParallel.__init__ = reading  # type: ignore[method-assign]


def _take_over(module: Any) -> None:
    theirs = module.PreTrainedModel._load_pretrained_model
    if list(inspect.signature(theirs).parameters)[: len(_ARGUMENTS)] != _ARGUMENTS:
        _say("this version of transformers loads weights in another way than is known here")
        return

    def load(
        model: nn.Module, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        files = [] if state_dict is not None else [Path(file) for file in checkpoint_files or ()]
        if (_in_context.get() or _state["everywhere"]()) and files and _can_wait(model, files, load_config):
            state_dict = tensors_of(files)
        result = theirs(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        for buffer in model.buffers():
            realize(buffer)
        return result

    module.PreTrainedModel._load_pretrained_model = staticmethod(load)


def _can_wait(model: nn.Module, files: Sequence[Path], load_config: Any) -> bool:
    """Returns whether weights can be left unread; says so once where that is what a user may expect."""
    if any(file.suffix != ".safetensors" for file in files):
        _say(f"{files[0].name} is no safetensors file (model.save_pretrained writes those)")
        return False
    if getattr(load_config, "hf_quantizer", None) is not None:
        _say("weights are quantized while they are loaded")
        return False
    devices = {str(device) for device in (getattr(load_config, "device_map", None) or {}).values()}
    if len(devices) > 1 or "disk" in devices:
        _say("device_map= spreads the model")
        return False
    return not any(isinstance(param, DTensor) for param in model.parameters())


def _say(why: str) -> None:
    if why not in _said:
        _said.add(why)
        inform(f"from_pretrained loads all weights on every rank: {why}.")
