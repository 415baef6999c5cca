"""What both launchers of ranks share."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

from lightning_mics.core import failures

if TYPE_CHECKING:
    from lightning.fabric.strategies.launchers import _SubprocessScriptLauncher as _Base
else:
    _Base = object


class EndsWithRanks(_Base):
    """Lets the rank that started the others end last, with the error that began it.

    Lightning's own observer kills this rank before it could tell; without processes it has nothing to observe.
    """

    _ranks: tuple[subprocess.Popen[Any], ...] = ()

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self._ranks, self.procs = tuple(self.procs), []
        failures.adopt(list(self._ranks))

    def kill(self, signum: Any) -> None:
        """Sends a signal to the processes that this one has started."""
        for process in self._ranks:
            process.send_signal(signum)
