"""Whole weights for what saves a sharded model its own way: by ``state_dict()``, from a module inside, by pickling.

``save_pretrained`` gets them in every way in. The rest is for models that Accelerate has prepared, whose scripts do not
know MiCS: ``state_dict()`` has shards, into which one may write. It has whole weights while a method of the model runs
whose name says that it saves, and for libraries that save a module they are given. Shards that are pickled become
whole, and whole weights that are loaded become shards.
"""

from __future__ import annotations

import copyreg
import functools
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_mics.checkpoint import state as checkpoints
from lightning_mics.core._torch import plain_name
from lightning_mics.core.class_names import class_of
from lightning_mics.errors import MiCSError

_ATTRIBUTE = "_mics_whole"
# All ranks would write one folder; other methods run on each of them.
_BY_THE_MAIN_PROCESS = ("save_pretrained", "push_to_hub")
_SAVES = re.compile(r"(save|export|dump|serialize|upload|push_to)(_|$)|to_disk$")
_SAVING_LIBRARIES = ("safetensors", "huggingface_hub")

_meshes: weakref.WeakSet[DeviceMesh] = weakref.WeakSet()


class WholeWeights:
    """Who gets whole weights of a sharded model now.

    Args:
        model: The model.
        is_main: Whether this process writes.
        only_pretrained: Whether nothing but ``save_pretrained`` and ``push_to_hub`` is looked after.
    """

    def __init__(self, model: nn.Module, is_main: bool, *, only_pretrained: bool = False) -> None:
        self._is_main = is_main
        self._saving = 0  # how many methods that save are running, one inside the other
        self._given: Mapping[Any, Tensor] | None = None
        self._entries: Callable[[], Any] = lambda: None  # the state that is being made, and first names in it
        self._names: dict[int, str] = {}
        self._removals: list[Callable[[], Any]] = []
        methods = {cls: _saving_methods(cls) for cls in set(map(type, model.modules()))}
        for module in model.modules():
            earlier = module.__dict__.get(_ATTRIBUTE)
            if earlier is not None and earlier._removals:
                earlier._remove()
            module.__dict__[_ATTRIBUTE] = self
            handles = [module.register_state_dict_post_hook(functools.partial(self._after_state_dict))]
            names: Iterable[str] = methods[type(module)]
            if only_pretrained:
                names = [name for name in names if name in _BY_THE_MAIN_PROCESS]
                self._removals += [handle.remove for handle in handles if handle is not None]
                self._removals += [functools.partial(module.__dict__.pop, name, None) for name in names]
            else:
                module.register_load_state_dict_pre_hook(_shard_whole_entries)
            for name in names:
                module.__dict__[name] = self._wrapped(module, name)
        if only_pretrained:
            return
        _meshes.update(param.device_mesh for param in model.parameters() if isinstance(param, DTensor))
        copyreg.pickle(DTensor, _pickle)

    def _remove(self) -> None:
        """Makes room for one that looks after everything."""
        while self._removals:
            self._removals.pop()()

    @contextmanager
    def given(self, model: nn.Module, weights: Mapping[str, Any]) -> Iterator[None]:
        """Hands out weights that have been gathered; nothing inside communicates.

        Args:
            model: The model, or a module inside.
            weights: Its whole weights by name on the main process; none on others.
        """
        params = model.named_parameters(remove_duplicate=False)
        before, self._given = self._given, {p: weights[plain_name(n)] for n, p in params if plain_name(n) in weights}
        try:
            yield
        finally:
            self._given = before

    def _wrapped(self, module: nn.Module, name: str) -> Callable[..., Any]:
        method = getattr(module, name)  # no closure: a copy of a model saves its own weights
        return functools.wraps(method)(functools.partial(self._save_whole, module, name, method))

    def _save_whole(self, module: nn.Module, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name in _BY_THE_MAIN_PROCESS:
            return self._once(module, method, *args, **kwargs)
        self._saving += 1
        try:
            return method(*args, **kwargs)
        finally:
            self._saving -= 1

    def _once(self, module: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a method on the main process, with whole weights; collective, unless these are given."""
        call = f"{class_of(module).__name__}.{method.__name__}"
        if self._given is None:
            weights = {}
            if kwargs.get("state_dict") is None:
                with checkpoints.arrival(call, module.parameters()):
                    weights = checkpoints.model_state(module, full=True)
            with self.given(module, weights):
                return self._once(module, method, *args, **kwargs)
        if not self._is_main:
            return None
        with _no_passes(module, call):
            return method(*args, **kwargs)

    def _after_state_dict(self, module: nn.Module, entries: dict[str, Any], prefix: str, _metadata: Any) -> None:
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        shards = [(prefix + name, param) for name, param in own if isinstance(entries.get(prefix + name), DTensor)]
        gathers = bool(shards) and self._given is None and (self._saving > 0 or _asks_to_save())
        if self._entries() is not entries:
            self._entries, self._names = weakref.ref(entries), {}
        for name, param in shards:
            first = self._names.setdefault(id(param), name)
            if self._given is not None:
                entries[name] = self._given.get(param, entries[name])
            elif first != name and first in entries:
                entries[name] = entries[first]  # tied weights stay one tensor
            elif gathers:
                entries[name] = checkpoints.whole(entries[name], "state_dict of a model that is being saved")


@contextmanager
def _no_passes(model: nn.Module, call: str) -> Iterator[None]:
    """Refuses forward passes of a model that other ranks would have to gather for. Models may catch that.

    sentence-transformers do: they run the model for an example in its card, which is left out then.
    """

    def refuse(module: nn.Module, _inputs: Any) -> None:
        raise MiCSError(
            f"{call} runs {type(module).__name__} on the main process alone, but its ranks gather parameters together. "
            "Run the model before it, on every rank."
        )

    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    alone = all(param.device_mesh.size() == 1 for param in model.parameters() if isinstance(param, DTensor))
    handles = [] if alone else [unit.register_forward_pre_hook(refuse, prepend=True) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def given(model: nn.Module, weights: Mapping[str, Any]) -> Iterator[None]:
    """Hands out weights of a prepared model that have been gathered; nothing inside communicates.

    Args:
        model: The model, or a module inside; of one that was not prepared, nothing is handed out.
        weights: Its whole weights by name on the main process; none on others.
    """
    whole: WholeWeights | None = model.__dict__.get(_ATTRIBUTE)
    if whole is None:
        yield
        return
    with whole.given(model, weights):
        yield


def save_pretrained_whole(model: nn.Module) -> None:
    """Gives ``save_pretrained`` and ``push_to_hub`` of a sharded model, and of models inside of it, whole weights.

    They are collective over the world then, and rank 0 writes.
    """
    WholeWeights(model, dist.get_rank() == 0, only_pretrained=True)


def _saving_methods(cls: type) -> tuple[str, ...]:
    """Returns the names of methods that users, or libraries, gave a class for saving."""
    names = set(dir(cls)) - set(dir(nn.Module)) - set(dir(FSDPModule))
    return tuple(sorted(name for name in names if _SAVES.match(name) and callable(getattr(cls, name, None))))


def _asks_to_save() -> bool:
    """Returns whether a library that saves models asks one for its state."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        home = frame.f_globals.get("__name__", "")
        if home not in (__name__, "torch.nn.modules.module") and frame.f_code.co_name != "state_dict":
            return home.partition(".")[0] in _SAVING_LIBRARIES
        frame = frame.f_back
    return False


def _shard_whole_entries(module: nn.Module, entries: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
        value = entries.get(prefix + name)
        if isinstance(value, Tensor) and not isinstance(value, DTensor):
            entries[prefix + name] = checkpoints.shard_like(value, param)


def _pickle(shard: DTensor) -> Any:
    """Pickles shards of prepared models as whole tensors, which whoever reads them expects; others as they are."""
    is_copy = sys._getframe(1).f_globals.get("__name__") == "copy"
    stays = is_copy or shard.device_mesh not in _meshes
    tensor = shard if stays else checkpoints.whole(shard, "saving a sharded tensor")
    return tensor.__reduce_ex__(2)
