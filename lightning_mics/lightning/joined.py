"""The Trainer's training loop: ranks with different numbers of batches, and loaders that resume at the sample.

Lightning fetches a batch ahead where nobody knows the length, and saves the states of loaders as they are then. Here
they are those behind the batch that was trained on last, and of each rank its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from torch import nn

from lightning_mics import checkpoint as checkpoints
from lightning_mics.core.joined import (
    Microstep,
    UnevenInputs,
    agreed_lengths,
    at_end,
    attendance_of,
    counted_length,
    joined_steps,
    steps_alone,
    windows_of,
)
from lightning_mics.core.runtime import is_sharded
from lightning_mics.errors import CheckpointError, MiCSConfigError

_STATES = "combined_loader"  # where Lightning keeps the states of loaders, in those of its loop


def join_training(trainer: Any) -> None:
    """Has a Trainer's training loop end on all ranks together, and resume at the sample, once its loaders are there."""
    loop = trainer.fit_loop
    if "setup_data" in vars(loop):
        return
    set_up, load = loop.setup_data, loop._load_combined_loader_states
    loaded: list[Any] = []

    def load_states() -> None:
        loaded[:] = loop._combined_loader_states_to_load if loop.restarting else []
        for loader in loop._combined_loader.flattened if loaded else ():
            # Lightning does so later, but a loader that goes on asks its sampler for an order now.
            _set_sampler_epoch(loader, loop.epoch_progress.current.processed)
        load()

    def setup_data() -> None:
        set_up()
        fetcher = loop._data_fetcher
        if fetcher is not None and not hasattr(fetcher, "mics_joined"):
            fetcher.mics_joined = True
            _join(trainer, [*loaded])

    loop.setup_data, loop._load_combined_loader_states = setup_data, load_states


def _join(trainer: Any, loaded: list[Any]) -> None:
    fetcher, combined = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
    uneven_inputs: UnevenInputs = trainer.strategy.config.uneven_inputs
    joins = uneven_inputs != "error" and _lengths_differ(trainer, uneven_inputs)
    if isinstance(fetcher, _DataLoaderIterDataFetcher):
        if joins:
            raise MiCSConfigError(
                f"uneven_inputs={uneven_inputs!r} needs a training_step that takes a batch, and this one takes the "
                "iterator (dataloader_iter). Take a batch, or give all ranks as many.",
                setting="uneven_inputs",
            )
    elif joins or (fetcher.length is None and combined._state_dicts()):
        fetcher.__class__ = _joined(type(fetcher), trainer.lightning_module, uneven_inputs if joins else None)
        fetcher.begin(loaded)


def _lengths_differ(trainer: Any, uneven_inputs: UnevenInputs) -> bool:
    """Returns whether ranks have, or may have, different numbers of batches; tells the loop where all are known."""
    loop = trainer.fit_loop
    lengths = [counted_length(loader) for loader in loop._combined_loader.flattened]
    agreed = agreed_lengths([None if None in lengths else int(loop.max_batches)])
    if agreed is None:
        return True
    ((lowest, highest),) = agreed
    if lowest == highest:
        return False
    loop.max_batches = lowest if uneven_inputs == "shortest" else highest
    interval = trainer.val_check_interval
    if isinstance(interval, float):
        trainer.val_check_batch = max(1, int(loop.max_batches * interval))
    elif isinstance(interval, int):
        trainer.val_check_batch = interval
    return True


def _joined(kind: Any, model: nn.Module, uneven_inputs: UnevenInputs | None) -> type:
    """Returns a kind of fetchers that ends together with those of other ranks, where ``uneven_inputs`` says when.

    It fetches one batch ahead, and knows the states of loaders from before it did.
    """

    class Joined(kind):
        def begin(self, states: list[Any]) -> None:
            """Begins an epoch.

            Args:
                states: Those of the loaders at its beginning; of an epoch that is new they are of no use.
            """
            combined = self.combined_loader
            self._states, self._is_first, self._is_over = states, True, False
            combined._state_dicts = self._states_now
            self._microsteps = self._steps()

        def _steps(self) -> Iterator[Microstep]:
            if uneven_inputs is None:
                yield from steps_alone(self._rest(), self._note)
            else:
                yield from joined_steps(self._rest(), uneven_inputs, attendance_of(model), self._note)

        def _rest(self) -> Iterator[Any]:
            while self.batches:
                yield self.batches.pop(0)
            while self.length is None or self.fetched < self.length:
                try:
                    yield _DataFetcher.__next__(self)
                except StopIteration:
                    return

        def _note(self) -> None:
            """Notes the states before a batch is fetched; before the first Lightning has fetched already."""
            if not self._is_first:
                self._states = copy.deepcopy(self._raw_states())
            self._is_first = False

        def _raw_states(self) -> list[Any]:
            states: list[Any] = type(self.combined_loader)._state_dicts(self.combined_loader)
            return states

        def _states_now(self) -> list[Any]:
            if self._is_over or not self._states:
                return [at_end(state) for state in self._raw_states()] if self._is_over else self._raw_states()
            return self._states

        def __iter__(self) -> Any:
            states = copy.deepcopy(self._states_now())
            super().__iter__()
            self.begin(states)
            return self

        def __next__(self) -> Any:
            step = next(self._microsteps)
            self._weigh(step.weight)
            self.done = self._is_over = step.is_last
            return step.batch

        def teardown(self) -> None:
            self._weigh(1.0)
            super().teardown()

        def _weigh(self, weight: float) -> None:
            for window in windows_of(model) if is_sharded(model) else ():
                window.weigh(weight)

    return Joined


def states_of_ranks(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the states of loaders of all ranks, where a Trainer's checkpoint has this rank's. Collective."""
    own = _loop_state(checkpoint).get(_STATES, [])
    return checkpoints.states_of_ranks({str(index): _Held(state) for index, state in enumerate(own)})


def take_own_states(checkpoint: dict[str, Any]) -> None:
    """Puts this rank's states of loaders where Lightning looks for them, in the place of rank 0's."""
    state = _loop_state(checkpoint)
    if _STATES in state:
        try:
            own = checkpoints.own_states(checkpoint)
            state[_STATES] = state[_STATES] if own is None else list(own.values())
        except CheckpointError as error:
            state[_STATES] = _Refused(state[_STATES], error)


def _loop_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    return found


class _Held:
    """Something of a state that is known."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def state_dict(self) -> Any:
        return self._state


class _Refused(list[Any]):
    """States that nobody needs at the end of an epoch, and that are an error in the middle of one."""

    def __init__(self, states: list[Any], error: CheckpointError) -> None:
        super().__init__(states)
        self._error = error

    def __iter__(self) -> Any:
        raise self._error
