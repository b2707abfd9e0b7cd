"""Which pages of a chunk: finding zero ones, and going between their place in it and their addresses.

An extent is the index in the chunk of a first page and of the page after a last one. Extents in a list are
in rising order and do not touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from godwit.types import PAGE_SIZE
from godwit.wire import frames

Extent = tuple[int, int]

# Never written to, and from calloc(3): all of it is the kernel's one page of zeroes.
_ZEROES: Final = bytes(frames.CHUNK_BYTES)


def zero_extents(data: memoryview) -> list[Extent]:
    """Find the pages that are zero. Pages whose first word is not cost 16 ns each."""
    words = data.cast("Q")[:: PAGE_SIZE // 8].tolist()
    if 0 not in words:
        return []
    found: list[Extent] = []
    for first, end in _zero_runs(words):
        # `startswith` is memcmp(3) on the buffers themselves; comparing memoryviews is 20 times slower.
        if _ZEROES.startswith(data[first * PAGE_SIZE : end * PAGE_SIZE]):
            found.append((first, end))
        elif end - first > 1:
            places = range(first * PAGE_SIZE, end * PAGE_SIZE, PAGE_SIZE)
            zero = (at // PAGE_SIZE for at in places if _ZEROES.startswith(data[at : at + PAGE_SIZE]))
            found += extents_of(zero)
    return found


def _zero_runs(words: list[int]) -> list[Extent]:
    if not any(words):
        return [(0, len(words))]
    return extents_of(index for index, word in enumerate(words) if not word)


def extents_of(pages: Iterable[int]) -> list[Extent]:
    """Join page indexes, in rising order, into extents."""
    found: list[Extent] = []
    first = end = -1
    for page in pages:
        if page != end:
            if first >= 0:
                found.append((first, end))
            first = page
        end = page + 1
    if first >= 0:
        found.append((first, end))
    return found


def others(extents: Sequence[Extent], pages: int) -> list[Extent]:
    """Return the extents of the pages that the given ones leave."""
    found: list[Extent] = []
    at = 0
    for first, end in extents:
        if first > at:
            found.append((at, first))
        at = end
    if at < pages:
        found.append((at, pages))
    return found


def count(extents: Iterable[Extent]) -> int:
    """Return how many pages the extents have."""
    return sum(end - first for first, end in extents)


def addresses(runs: Sequence[tuple[int, int]], extents: Iterable[Extent]) -> list[tuple[int, int]]:
    """Return where a chunk's extents lie, as (start, end) by address or offset.

    Args:
        runs: The chunk's, of which the extents are a part.
        extents: In rising order.
    """
    found: list[tuple[int, int]] = []
    left = iter(runs)
    start, run_end, base = 0, 0, 0  # the run at hand, and the index of its first page
    for first, end in extents:
        page = first
        while page < end:
            while page >= base + (run_end - start) // PAGE_SIZE:
                base += (run_end - start) // PAGE_SIZE
                start, run_end = next(left)
            stop = min(end, base + (run_end - start) // PAGE_SIZE)
            found.append((start + (page - base) * PAGE_SIZE, start + (stop - base) * PAGE_SIZE))
            page = stop
    return found
