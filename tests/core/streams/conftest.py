"""The stand-in takes the place of ``torch.cuda``, which must not be needed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def no_card() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")


_MISPLACED = "expected all tensors to be on the same device"
_TRIES = 3


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Repeats a test in which the stand-in took a tensor of the device for one of the host.

    It does so in about one of a hundred tests, for a reason that is not known, and such a run says nothing. What really
    mixes devices does so each time.
    """
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    for attempt in range(_TRIES):
        try:
            pyfuncitem.obj(**arguments)
        except Exception as error:
            if _MISPLACED not in str(error) or attempt + 1 == _TRIES:
                raise
        else:
            break
    return True
