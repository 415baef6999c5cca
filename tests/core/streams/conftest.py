"""The stand-in takes the place of ``torch.cuda``, which must not be needed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def no_card() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
