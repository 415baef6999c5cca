"""``shard_size="auto"``: the smallest partition whose ranks have enough memory, predicted before anything is sharded.

Nothing is measured or tried out. The model's figures come from a pass on fake tensors, the states from the optimizer's
class, the memory from the device. Ranks exchange what they predict and decide alike: by the rank that needs most, and
by the one that has least. After the first optimizer steps the prediction is compared with what training takes, once.
"""

from __future__ import annotations

from lightning_mics.auto.check import MemoryCheck, compare
from lightning_mics.auto.choice import AutoChoice, choose_shard_size
from lightning_mics.auto.sample import Sample, random_states_kept, sample_of

__all__ = ["AutoChoice", "MemoryCheck", "Sample", "choose_shard_size", "compare", "random_states_kept", "sample_of"]
