"""The gathers of a model's units: who is told of them, and which ranks end ``generate`` together for their sake."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_mics.core._torch import UnitParamGroup


class Gathers:
    """The gathers of a model's units, which all ranks of a partition run together.

    Args:
        groups: The parameters of each unit.
        num_ranks: Ranks of a partition.

    Attributes:
        listener: Told the number of a unit before each of its gathers.
        any_unfinished: Asked whether a rank goes on generating, given whether this one does; ``None`` where
            transformers may ask all ranks.
    """

    def __init__(self, groups: Sequence[UnitParamGroup], num_ranks: int) -> None:
        self.groups, self._num_ranks = groups, num_ranks
        self.reset()

    def reset(self) -> None:
        """Forgets a loop that listened."""
        self.listener: Callable[[int], None] | None = None
        self.any_unfinished: Callable[[bool], bool] | None = bool if self._num_ranks == 1 else None

    def telling(self, group: UnitParamGroup, on_gather: Callable[[int], None]) -> Callable[[int], None]:
        """Returns a function that tells the listener of a unit's gather, and ``on_gather`` of its bytes."""
        index = self.groups.index(group)

        def tell(message_bytes: int) -> None:
            on_gather(message_bytes)
            if self.listener is not None:
                self.listener(index)

        return tell
