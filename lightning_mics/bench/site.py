"""Where the ranks of a benchmark compute: the CPUs, or the cards of this machine; and what joins them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_mics.bench.conditions import counted
from lightning_mics.bench.namespaces import missing_requirements
from lightning_mics.bench.records import LOOPBACK, SHAPED
from lightning_mics.bench.sharing import ServiceError, process_service
from lightning_mics.errors import MiCSError

_PATIENCE = 60.0
_DRIVER = Path("/proc/driver/nvidia/version")
# Ranks that are hosts of their own by what they say may share a card, and then talk through the network only.
_NCCL = {
    "NCCL_NET": "Socket",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_DEBUG": "WARN",
}
# In a process of its own: one that holds a card without the service would take turns with those of the service.
_PROBE = """
import json, torch
cards = range(torch.cuda.device_count())
names = [torch.cuda.get_device_name(card) for card in cards]
for card in cards:
    torch.ones(1, device=f"cuda:{card}").item()
nccl = ".".join(map(str, torch.cuda.nccl.version())) if names else None
print(json.dumps({"names": names, "versions": {"CUDA": torch.version.cuda, "NCCL": nccl}}))
"""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where ranks compute and what joins them; CPUs of emulated nodes by default.

    Attributes:
        hardware: What a case says of it: ``device``, ``card``, ``cards``, ``sharing`` (``"MPS"``, ``"time slices"`` or
            ``"none"``) and ``links`` (``"shaped"`` or ``"loopback"``); nothing for CPUs.
        versions: Of what drives the cards.
        environment: Variables of the ranks.
        notes: What to know about its times, in sentences.
    """

    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_loopback(self) -> bool:
        """Whether ranks talk over this machine's loopback instead of the links of an emulated cluster."""
        return self.hardware.get("links") == LOOPBACK


@contextmanager
def open_site(device: str, world_size: int) -> Iterator[Site]:
    """Yields the site for a device, and keeps what it needs running meanwhile.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        world_size: Most ranks that will compute at once. If there are more than cards, they share these through CUDA's
            multi-process service where it works, else in time slices.

    Raises:
        MiCSError: If there is no card to compute on.
    """
    if device == "cpu":
        yield Site()
        return
    with ExitStack() as stack:
        notes = []
        try:
            service = stack.enter_context(process_service())
            cards, sharing = probe(service), "MPS"
        except ServiceError as error:
            stack.close()
            service, cards, sharing = {}, probe({}), "time slices"
            notes.append(
                f"CUDA's multi-process service does not work here ({error}), so ranks of one card take turns in time "
                "slices of milliseconds: these times mean little."
            )
        if world_size <= len(cards.names):
            stack.close()
            service, sharing, notes = {}, "none", []
        yield _site(cards, service, sharing, notes)


@dataclass(frozen=True)
class Cards:
    """The cards of this machine: their names, and versions of what drives them."""

    names: list[str]
    versions: dict[str, str]


def probe(service: Mapping[str, str]) -> Cards:
    """Computes something on each card, in a process of its own.

    Args:
        service: Variables that lead to the multi-process service, or none.

    Raises:
        ServiceError: If it fails through the service.
        MiCSError: If it fails without, or there is no card.
    """
    kind = ServiceError if service else MiCSError
    command, environment = [sys.executable, "-c", _PROBE], {**os.environ, **service}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise kind(f"a program on this machine's cards does not end within {_PATIENCE:g} s") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise kind(f"a program cannot compute on this machine's cards: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["names"]:
        raise kind("--device cuda needs an NVIDIA card, and PyTorch sees none. Leave it out to compute on CPUs.")
    versions = {name: version for name, version in found["versions"].items() if version}
    driver = re.search(r"\d{3}\.\d+(\.\d+)?", _DRIVER.read_text()) if _DRIVER.exists() else None
    return Cards(found["names"], {**versions, **({"driver": driver[0]} if driver else {})})


def _site(cards: Cards, service: Mapping[str, str], sharing: str, notes: list[str]) -> Site:
    card = " and ".join(dict.fromkeys(cards.names))
    missing = missing_requirements()
    if missing is not None:
        notes = [
            *notes,
            f"No links are emulated here: {missing} All ranks talk over loopback, which is as fast between nodes as "
            "inside of one, so what MiCS saves between nodes does not show. Bytes are not counted.",
        ]
    how = "" if sharing == "none" else f", shared by ranks ({sharing})"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(cards.names)))))
    return Site(
        hardware={
            "device": "cuda",
            "card": card,
            "cards": len(cards.names),
            "sharing": sharing,
            "links": SHAPED if missing is None else LOOPBACK,
        },
        versions=cards.versions,
        environment={**_NCCL, **service, "CUDA_VISIBLE_DEVICES": visible},
        notes=(f"Ranks compute on {counted(len(cards.names), 'card')} ({card}){how}.", *notes),
    )
