"""What code that looks up class names sees of a sharded model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from works import works

from lightning_mics import MiCSConfig, mics_shard
from lightning_mics.testing import WorkerPool


class Registered(nn.Module):
    """Keeps a register of its subclasses, as some libraries of models do."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        assert cls.__name__ not in Registered.known
        Registered.known[cls.__name__] = cls


class Block(Registered):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)  # type: ignore[no-any-return]


class Net(nn.Sequential):
    pass


def names() -> None:
    model = Net(Block(), Block(), nn.Linear(4, 4))
    shown = repr(model)
    mics_shard(model, MiCSConfig(shard_size=2, wrap=["Block"]))
    assert repr(model) == shown
    for module, cls in ((model, Net), (model[0], Block), (model[1], Block)):
        assert isinstance(module, FSDPModule) and isinstance(module, cls)
        found = type(module)
        assert module._get_name() == found.__name__ == found.__qualname__ == cls.__name__
        assert (found.__module__, found.__doc__) == (cls.__module__, cls.__doc__)
        assert str(found) == str(cls)
        assert type(found() if cls is Block else module[:2]) is cls  # what it makes is no sharded module
    blank = type(model[0]).__new__(type(model[0]))
    assert type(blank) is Block and not hasattr(blank, "_parameters")  # without __init__, as for any class
    assert Registered.known["Block"] is Block
    model(torch.ones(2, 4)).sum().backward()
    theirs = fully_shard(Block())
    assert type(theirs).__name__ == "FSDPBlock"  # FSDP2's class is left alone


@works("Model kinds", "Code that looks up class names (`type(model).__name__`, `repr`)")
def test_names_stay_those_of_the_user(pool: WorkerPool) -> None:
    pool.run(names, world_size=2)
