"""Ranks that wait for one another for ever: found within seconds, and told as an error that names calls and ranks.

A rank that waits for longer than a moment tells so in the world's store, and looks where those are for which it waits.
Nothing is said while one of them computes, however long: it may still come. Where each of them waits as well, for
something else, or has ended, what they wait for can never end.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist

from lightning_mics.core._torch import break_group, default_store, group_timeout, launched_by_group
from lightning_mics.core.places import Call, Place, Waiting, here, look_around, of_world, waiting
from lightning_mics.errors import MiCSError, SelfCheckError

MOMENT = 0.4  # seconds of a wait that need not be told
FOREIGN_MOMENT = 2.0  # of one in a collective that is not ours, whose rounds are known less well
NOTICE = 30.0  # seconds of a wait after which a line says where everybody is
HEARTBEAT = 10.0  # seconds between two words of a rank that does not wait
_UNEVEN = (
    "If some ranks had fewer batches than others, let all end together (uneven_inputs='shortest' or 'longest'), or "
    "give all of them the same number (drop_last=True, DistributedSampler, even_batches=True, a fixed number of steps)."
)
_TOLD = "mics/told"
_NOT_OURS = ("foreign", "shard")
_KINDS = (dist.TCPStore, dist.FileStore)


def _key(rank: int) -> str:
    return f"mics/place/{rank}"


# What can never end: pure reading of places.


def stuck(places: Mapping[int, Place | None]) -> set[int]:
    """Returns the ranks that can never go on.

    Args:
        places: Where ranks are; ``None`` for those of which nothing is known, which may be anywhere.
    """
    found = {rank for rank, place in places.items() if place is not None and (place.waits or place.has_ended)}
    while True:
        going = {rank for rank in found if _can_go_on(places[rank], places, found)}
        if not going:
            return found
        found -= going


def _can_go_on(place: Place | None, places: Mapping[int, Place | None], found: set[int]) -> bool:
    assert place is not None
    wait = place.waits
    return wait is not None and not place.has_ended and all(_comes(rank, wait, places, found) for rank in wait.ranks)


def _comes(rank: int, wait: Waiting, places: Mapping[int, Place | None], found: set[int]) -> bool:
    """Returns whether a rank has come, or may come yet, to what another one waits for."""
    place = places.get(rank)
    if place is None or rank not in found or place.counts.get(wait.key, 0) >= wait.turn:
        return True
    # What waits behind another call in the thread of communication comes if that can end.
    before = place.thread
    if place.on_thread or before is None or place.has_ended:
        return False
    return before.key != wait.key and all(
        other not in found or (seen := places.get(other)) is None or seen.counts.get(before.key, 0) >= before.turn
        for other in before.ranks
    )


# In words.


def told(places: Iterable[Place]) -> str:
    """Returns where ranks are, those together that are in one place."""
    by_place: dict[str, list[Place]] = {}
    for place in places:
        by_place.setdefault(_words(place), []).append(place)
    return "; ".join(
        f"{_ranks(place.rank for place in group)} {_words(group[0], 'waits' if len(group) == 1 else 'wait')}"
        for group in by_place.values()
    )


def _words(place: Place, verb: str = "waits") -> str:
    at = f" ({place.line})" if place.line else ""
    if place.has_ended:
        return f"ended the process{_after(place)}"
    return f"{verb} in {place.waits.what}{at}{_after(place)}" if place.waits else f"at work{at}{_after(place)}"


def _after(place: Place) -> str:
    return f", after {place.windows} accumulation window{'' if place.windows == 1 else 's'}" if place.windows else ""


def _ranks(ranks: Iterable[int]) -> str:
    numbers = ", ".join(map(str, sorted(ranks)))
    return f"ranks {numbers}" if "," in numbers else f"rank {numbers}"


def verdict(places: Mapping[int, Place]) -> MiCSError:
    """Returns the error of ranks that can never go on."""
    waits = {rank: place.waits for rank, place in places.items() if place.waits is not None}
    everywhere = told(places.values())
    entries = {wait.what: wait for wait in waits.values() if wait.kind == "entry"}
    if entries:
        (what, wait), *_ = entries.items()
        inside = [rank for rank, other in waits.items() if other.what == what]
        missing = [rank for rank in wait.ranks if rank not in inside]
        return MiCSError(
            f"{what} was called on {_ranks(inside)} and not on {_ranks(missing)}, and takes all ranks: {everywhere}. "
            f"Call {what} on every rank, not behind `if is_main_process` or `if rank == 0`: each of them holds a part."
        )
    asking = [rank for rank, wait in waits.items() if wait.kind == "shard"]
    if asking:
        missing = sorted({rank for asker in asking for rank in waits[asker].ranks} - {*asking})
        return MiCSError(
            f"full_tensor() or .item() of a shard was called on {_ranks(asking)} and not on {_ranks(missing)}, and "
            f"takes all ranks of a partition: {everywhere}. Call it on every rank, not behind `if is_main_process` or "
            "`if rank == 0`; to_local() is this rank's part."
        )
    windows = [place.windows for place in places.values()]
    if {wait.kind for wait in waits.values()} <= {"unit", "window"} and len(waits) == len(places):
        hint = f"{_UNEVEN} " if min(windows) != max(windows) else ""
        if len({wait.kind for wait in waits.values()}) > 1:
            hint += "Where gradients have hooks on some ranks only, register them on every rank. "
        return SelfCheckError(
            f"Ranks run different units of the model, and wait for each other for ever: {everywhere}. {hint}Let every "
            "rank of a partition take the same path through the model, make the module that holds the branches (such "
            "as all experts of a layer) one unit with wrap=, or use shard_size=1."
        )
    return MiCSError(
        f"Ranks wait for each other for ever: {everywhere}. {_UNEVEN} A forward pass, also one that only samples or "
        "evaluates, gathers parameters: run it on every rank, not behind `if is_main_process` or `if rank == 0`."
    )


# The watch.


class Watch:
    """Looks, from a thread, whether this rank waits, and whether that can end."""

    def __init__(self) -> None:
        self._beat = 0
        self._spoke = 0.0
        self._start_afresh("")

    def _start_afresh(self, serial: str) -> None:
        self._serial, self._since, self._next, self._noticed = serial, time.monotonic(), 0.0, False
        self._seen: dict[int, Place] = {}

    def tick(self) -> None:
        """Looks once."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        place, now = look_around(self._beat), time.monotonic()
        if place.serial != self._serial:
            self._start_afresh(place.serial)
        if place.waits is None:
            self._speak_sometimes(place, now)
            return
        waited = now - self._since
        is_short = waited < (FOREIGN_MOMENT if place.waits.kind in _NOT_OURS else MOMENT)
        store = None if is_short or now < self._next or here.verdict is not None else default_store(_KINDS)
        if store is None:
            return
        # Patience grows with the wait, and with the number of those that ask.
        self._next = now + max(0.2, min(2.0, waited / 20), len(place.waits.ranks) / 50)
        if (error := told_to_all()) is not None:
            _end_waiting(error, place)
            return
        self._say(store, place)
        places = self._look(store, place)
        lost = self._certain(places)
        if place.rank in lost and (place.waits.kind != "foreign" or _spoils_a_step(places, lost)):
            error = _agree(store, {rank: found for rank, found in places.items() if rank in lost and found})
            _end_waiting(error, place)
        elif waited > NOTICE and not self._noticed:
            self._noticed = True
            _notice(place, places, waited)

    def _speak_sometimes(self, place: Place, now: float) -> None:
        """Tells now and then where a rank is that does not wait; a file would grow for ever."""
        store = default_store() if now - self._spoke > HEARTBEAT else None
        if store is not None:
            self._spoke = now
            self._say(store, place)

    def _say(self, store: dist.Store, place: Place) -> None:
        self._beat += 1
        store.set(_key(place.rank), json.dumps(asdict(place)))

    def _look(self, store: dist.Store, mine: Place) -> dict[int, Place | None]:
        """Returns where those are for which this rank waits, and those for which they do."""
        places: dict[int, Place | None] = {mine.rank: mine}
        ahead = list(mine.waits.ranks) if mine.waits is not None else []
        while ahead:
            rank = ahead.pop()
            if rank in places:
                continue
            places[rank] = place = read_place(store, rank)
            for wait in (place.waits, place.thread) if place is not None else ():
                ahead += wait.ranks if wait is not None else ()
        return places

    def _certain(self, places: Mapping[int, Place | None]) -> set[int]:
        """Returns who can never go on, by places that were told twice without a change."""
        before, self._seen = self._seen, {rank: place for rank, place in places.items() if place is not None}
        held = {
            rank: place
            if place is not None
            and rank in before
            and (place.has_ended or (place.serial == before[rank].serial and place.beat > before[rank].beat))
            else None
            for rank, place in places.items()
        }
        # Who tells more seldom than this rank looks keeps what it said, to be compared later.
        for rank, place in before.items():
            now = self._seen.get(rank)
            if now is not None and now.beat == place.beat and not now.has_ended:
                self._seen[rank] = place
        return stuck(held)


def _spoils_a_step(places: Mapping[int, Place | None], lost: set[int]) -> bool:
    """Returns whether ranks that are lost wait inside a step, so that nobody can mend it by coming later."""
    kinds = {place.waits.kind for rank, place in places.items() if rank in lost and place and place.waits}
    return "entry" not in kinds and kinds != {"foreign"}


def read_place(store: dist.Store, rank: int) -> Place | None:
    """Returns where a rank has told to be."""
    return Place.read(json.loads(store.get(_key(rank)))) if store.check([_key(rank)]) else None


def _agree(store: dist.Store, places: dict[int, Place]) -> MiCSError:
    """Returns the error of ranks that are lost, in the words of whoever of them found it first."""
    error = verdict(places)
    mark = "/".join(["mics/verdict", *(f"{rank}-{places[rank].serial}" for rank in sorted(places))])
    first = store.compare_set(mark, "", json.dumps([type(error).__name__, str(error)]))
    if _spoils_a_step(places, set(places)):  # the job ends; who loses connections, or waits, finds the reason here
        store.set(_TOLD, first.decode())
    return _error(first)


def _end_waiting(error: MiCSError, mine: Place) -> None:
    """Ends this rank's wait with an error."""
    calls = [call for call in (here.waits, here.runs) if isinstance(call, Call)]
    groups = {id(group): group for call in calls for group in call.groups}
    if mine.main is not None and mine.main.kind in _NOT_OURS and mine.main.key in (launched := launched_by_group()):
        groups[0] = launched[mine.main.key][0]
    if look_around().serial != mine.serial:
        return
    here.verdict = error
    for tell in here.breakers:
        tell(error)
    for group in groups.values():
        break_group(group)


def _error(told_first: bytes) -> MiCSError:
    kind, words = json.loads(told_first)
    return SelfCheckError(words) if kind == "SelfCheckError" else MiCSError(words)


def told_to_all() -> MiCSError | None:
    """Returns the error that has ended a step on some ranks, and with it the job."""
    store = default_store(_KINDS)
    return _error(store.get(_TOLD)) if store is not None and store.check([_TOLD]) else None


def _notice(mine: Place, places: Mapping[int, Place | None], waited: float) -> None:
    wait = mine.waits
    assert wait is not None
    missing = [rank for rank in wait.ranks if (p := places.get(rank)) is None or p.counts.get(wait.key, 0) < wait.turn]
    known = [place for rank in missing if (place := places.get(rank)) is not None]
    silent = [rank for rank in missing if places.get(rank) is None]
    words = "; ".join(filter(None, [told(known), f"of {_ranks(silent)} nothing is known" if silent else ""]))
    line = f"rank {mine.rank} has waited {waited:.0f} s: it {_words(mine)}. Missing are {_ranks(missing)}: {words}"
    print(f"lightning-mics: {line}", file=sys.__stderr__, flush=True)


def announce_end() -> None:
    """Tells others that this process ends, as it should."""
    store = default_store()
    if store is not None and dist.get_world_size() > 1:
        place = look_around(has_ended=True)
        store.set(_key(place.rank), json.dumps(asdict(place)))


def ended_ranks() -> dict[int, Place]:
    """Returns which ranks have ended as they should, as far as the store knows."""
    store, found = default_store(), {}
    if store is not None:
        for rank in range(dist.get_world_size()):
            place = read_place(store, rank)
            if place is not None and place.has_ended:
                found[rank] = place
    return found


def left_behind(ended: Mapping[int, Place]) -> MiCSError:
    """Returns the error of a rank whose peers have ended."""
    mine = look_around()
    at = f" ({mine.line})" if mine.line else ""
    return MiCSError(f"{told(ended.values())}, and rank {mine.rank}{at}{_after(mine)}, needs it. {_UNEVEN}")


# Entries outside of a step.


@contextmanager
def on_all_ranks(what: str) -> Iterator[None]:
    """Waits, before something that takes all ranks, until they all have come to it. Also decorates a function.

    Nothing travels but a number in the world's store. Inside of another such entry it does nothing.

    Args:
        what: The call, as users write it.

    Raises:
        MiCSError: If other ranks can never come.
    """
    depth = here.depth
    depth.value = getattr(depth, "value", 0) + 1
    try:
        if depth.value == 1:
            meet(what)
        yield
    finally:
        depth.value -= 1


def meet(what: str) -> None:
    """Waits until all ranks have come to something; see :func:`on_all_ranks`."""
    store = default_store(_KINDS) if dist.is_available() else None
    if store is None or dist.get_world_size() == 1:
        return
    entries, size = of_world().entries, dist.get_world_size()
    if what not in entries:
        entries[what] = Call("entry", what, range(size))
    call = entries[what]
    with waiting(call):
        key = f"mics/entry/{what}/{call.begun}"
        if store.add(key, 1) == size:
            store.set(f"{key}/all", "")
            return
        try:
            _poll(lambda: store.check([f"{key}/all"]), call)
        except MiCSError:
            store.add(key, -1)
            call.begun -= 1
            raise


def _poll(is_there: Callable[[], bool], call: Call) -> None:
    start = time.monotonic()
    limit = group_timeout(dist.group.WORLD, torch.device("cpu"))  # type: ignore[arg-type]
    while not is_there():
        if here.verdict is not None:
            error, here.verdict = here.verdict, None
            raise error
        waited = time.monotonic() - start
        if limit is not None and waited > limit.total_seconds():
            raise MiCSError(
                f"{call.what} waited {waited:.0f} s, the timeout of the process group, for ranks that did not call it. "
                f"Call {call.what} on every rank, or raise the timeout if ranks may be so far apart."
            )
        time.sleep(min(0.1, 0.001 + waited / 10))
