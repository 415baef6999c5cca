"""Fingerprints: 64 bits that tell whether two ranks hold the same bits, at the speed of the memory.

Words of 64 bits are laid out in rows, whose sums and whose columns' sums are kept, modulo 2 ** 64. These few numbers
are scrambled, each by its position, and added up: a flipped bit changes one row and one column, and two values that
change places at least two of either.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_mics.core._torch import local_tensor

_WORD = 8  # bytes
_CHUNK = 2**20  # words, which a CPU's cache holds while they are added up twice
_BATCH = 8 * _CHUNK  # words that are put together where starting work costs more than copying
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # splitmix64's, and the golden ratio


def fingerprint(tensor: Tensor) -> Tensor:
    """Returns a 64-bit fingerprint of a tensor's bits (of the local shard, for a DTensor).

    Equal tensors have equal fingerprints; the position of each value counts.

    Returns:
        A scalar of dtype int64 on the tensor's device, for which nobody has waited.
    """
    return _total([entry for words in _words(tensor) for entry in _entries(words)], tensor.device)


def joint_fingerprint(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns one fingerprint of all tensors together: less work than that of each.

    Returns:
        A scalar of dtype int64 on ``device``, on which the tensors lie.
    """
    words = [part for tensor in tensors for part in _words(tensor)]
    least = 2**13 if device.type == "cpu" else _CHUNK
    return _total([entry for part in _joined(words, least) for entry in _entries(part)], device)


def fingerprints(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the fingerprints of tensors, of shape ``[number of tensors]``, on one device.

    They depend on the order of the tensors, too.
    """
    found = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(index)
    for source, indices in by_device.items():
        prints = _each([tensors[index] for index in indices]).to(device, non_blocking=True)
        if source == device and len(indices) == len(tensors):
            return prints
        found[torch.tensor(indices, device=device)] = prints
    return found


def _each(tensors: Sequence[Tensor]) -> Tensor:
    by_tensor = [[entry for words in _words(tensor) for entry in _entries(words)] for tensor in tensors]
    entries = list(itertools.chain.from_iterable(by_tensor))
    lengths = [sum(map(len, found)) for found in by_tensor]
    if not entries:
        return torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    return torch.stack([part.sum() for part in _scrambled(torch.cat(entries)).split(lengths)])


def _total(entries: Sequence[Tensor], device: torch.device) -> Tensor:
    if not entries:
        return torch.zeros((), dtype=torch.int64, device=device)
    return _scrambled(torch.cat(list(entries))).sum()


def _words(tensor: Tensor) -> Iterator[Tensor]:
    """Yields a tensor's bits as one-dimensional tensors of int64, the last bytes filled up with zeros."""
    local = local_tensor(tensor).detach()
    if local.numel() == 0:
        return
    data = local.contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % _WORD:
        data = data.clone()
    whole = data.numel() // _WORD * _WORD
    if whole:
        yield data[:whole].view(torch.int64)
    if whole < data.numel():
        yield torch.nn.functional.pad(data[whole:], (0, _WORD - data.numel() + whole)).view(torch.int64)


def _entries(words: Tensor) -> Iterator[Tensor]:
    """Yields the numbers that stand for words: themselves, or the sums of their columns and rows."""
    row = 512 if len(words) > 2**16 else 32
    whole = len(words) // row * row if len(words) > 4 * row else 0
    if whole:
        for chunk in words[:whole].split(_CHUNK):
            rows = chunk.view(-1, row)
            yield rows.sum(0)
            yield rows.sum(1)
    if whole < len(words):
        yield words[whole:]


def _joined(words: Sequence[Tensor], least: int) -> Iterator[Tensor]:
    """Yields tensors in their order; those that are shorter than ``least`` are put together."""
    short: list[Tensor] = []
    size = 0
    for part in words:
        is_long = len(part) >= least
        if short and (is_long or size >= _BATCH):
            yield torch.cat(short)
            short, size = [], 0
        if is_long:
            yield part
        else:
            short.append(part)
            size += len(part)
    if short:
        yield torch.cat(short)


def _scrambled(numbers: Tensor) -> Tensor:
    """Returns numbers of which each bit depends on all bits of one and on its position (that of splitmix64)."""
    first, second, third = _ODD
    mixed = (numbers + torch.arange(1, len(numbers) + 1, device=numbers.device) * first) * second
    for odd, shift in ((third, 30), (second, 27)):
        mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * odd
    return mixed ^ (mixed >> 31 & (1 << 33) - 1)
