"""Pages that both sides of a stream keep, so that equal ones need not be sent again.

The source says in which slots the destination is to keep the pages of a PACKED frame, and names the slots in
COPIES frames later on. Which pages are kept, and which slot is used again, is its affair alone; so is the
search for equal pages, which is exact: xxh3 finds a candidate and memcmp(3) decides. Whoever makes pages of
one hash on purpose spoils a chance, and no page. The destination keeps what it is told, and checks the
numbers.

A copy costs 0.6 us at the source and 0.2 at the destination, a new page that is kept 1.2 and 0.5, and at
first as much again for the memory; a page on a link of 1 Gbit/s takes 33 us. Most programs have hardly any
copies within reach, so they are looked for in 4 MiB of every 32, and on only while the link needs longer for
what was found.
"""

from __future__ import annotations

import struct
from typing import Final

from xxhash import xxh3_64_intdigest

from godwit.errors import ImageError
from godwit.types import PAGE_SIZE
from godwit.wire import frames
from godwit.wire.codecs import rate
from godwit.wire.extents import Extent

KEPT_BYTES: Final = 12 << 20
SLOTS: Final = KEPT_BYTES // PAGE_SIZE
CHUNK_PAGES: Final = frames.CHUNK_BYTES // PAGE_SIZE
_SEARCH_S_PER_PAGE: Final = 1e-6  # both sides together
_LOOK_CHUNKS: Final = 4
_REST_CHUNKS: Final = 28
# A small program is over before the search for copies begins: it would mostly fetch memory to keep pages in.
_FIRST_REST_CHUNKS: Final = 12


def pays(copies: int, pages: int, link_bytes_per_s: float | None) -> bool:
    """Tell whether finding so many copies among so many pages took less time than sending them."""
    return copies * PAGE_SIZE / rate(link_bytes_per_s) > pages * _SEARCH_S_PER_PAGE


class Watch:
    """Says for which chunks to look for copies: now and then, and on while it pays."""

    def __init__(self) -> None:
        self._looking = False
        self._left = _FIRST_REST_CHUNKS
        self._pages = 0
        self._copies = 0

    def next(self, link_bytes_per_s: float | None) -> bool:
        """Tell whether to look at the next chunk."""
        if self._left == 0:
            tired = self._looking and not pays(self._copies, self._pages, link_bytes_per_s)
            self._looking = not tired and pays(1, 1, link_bytes_per_s)
            self._left = _LOOK_CHUNKS if self._looking else _REST_CHUNKS
            self._pages = self._copies = 0
        self._left -= 1
        return self._looking

    def found(self, copies: int, pages: int) -> None:
        """Note what came of looking at a chunk."""
        self._copies += copies
        self._pages += pages


class SentPages:
    """What the destination keeps, seen from the source."""

    def __init__(self) -> None:
        self._pages = bytearray()
        self._slot_of: dict[int, int] = {}  # by hash
        self._hash_in: list[int] = []  # by slot
        self._next = 0

    def match(self, data: memoryview, extents: list[Extent]) -> tuple[int, list[int], list[tuple[int, int]]]:
        """Sort pages into new ones, which are kept from now on, and copies of kept ones.

        Returns:
            The first slot of the new pages, which take one after the other; their indexes in the chunk; and
            the copies, as (index in the chunk, slot), which hold once the new pages are kept.
        """
        pages = [page for first, end in extents for page in range(first, end)]
        hashes = [xxh3_64_intdigest(data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) for page in pages]
        first_slot = self._make_room(len(pages))
        if len(set(hashes)) == len(pages) and self._slot_of.keys().isdisjoint(hashes):
            self._keep_all(data, extents, hashes, first_slot)
            return first_slot, pages, []
        fresh: list[int] = []
        copies: list[tuple[int, int]] = []
        for page, digest in zip(pages, hashes, strict=True):
            view = data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            slot = self._slot_of.get(digest, -1)
            if slot >= 0 and self._pages.startswith(view, slot * PAGE_SIZE):
                copies.append((page, slot))
            else:
                self._keep(view, digest, first_slot + len(fresh))
                fresh.append(page)
        return first_slot, fresh, copies

    def _make_room(self, pages: int) -> int:
        """Forget what is in the next slots, and return the first of them."""
        first = self._next if self._next + pages <= SLOTS else 0
        for slot in range(first, min(first + pages, len(self._hash_in))):
            if self._slot_of.get(self._hash_in[slot]) == slot:
                del self._slot_of[self._hash_in[slot]]
        self._next = first
        return first

    def _keep_all(self, data: memoryview, extents: list[Extent], hashes: list[int], first_slot: int) -> None:
        slot = first_slot
        for first, end in extents:
            self._pages[slot * PAGE_SIZE : (slot + end - first) * PAGE_SIZE] = data[
                first * PAGE_SIZE : end * PAGE_SIZE
            ]
            slot += end - first
        self._hash_in[first_slot:slot] = hashes
        self._slot_of.update(zip(hashes, range(first_slot, slot), strict=True))
        self._next = slot

    def _keep(self, page: memoryview, digest: int, slot: int) -> None:
        self._pages[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE] = page
        self._hash_in[slot : slot + 1] = [digest]
        self._slot_of[digest] = slot
        self._next = slot + 1


class KeptPages:
    """What the destination keeps."""

    def __init__(self) -> None:
        self._pages = bytearray()
        self._copied = bytearray()

    def keep(self, first_slot: int, pages: memoryview) -> None:
        """Put pages into slots, one after the other.

        Raises:
            ImageError: There are no such slots, or there is a gap before them.
        """
        start, end = first_slot * PAGE_SIZE, first_slot * PAGE_SIZE + len(pages)
        if end > KEPT_BYTES or start > len(self._pages):
            raise ImageError(
                f"a PACKED frame would keep {len(pages)} bytes of pages from slot {first_slot} on"
            )
        self._pages[start:end] = pages

    def copies(self, slots: memoryview) -> memoryview:
        """Return the pages in the slots, valid until the next call.

        Args:
            slots: At most CHUNK_PAGES numbers of 32 bits.

        Raises:
            ImageError: Nothing is kept in one of them.
        """
        if not self._copied:
            self._copied = bytearray(frames.CHUNK_BYTES)
        numbers = struct.unpack(f"<{len(slots) // 4}I", slots)
        filled = len(self._pages) // PAGE_SIZE
        if max(numbers, default=-1) >= filled:
            raise ImageError(f"a COPIES frame names slot {max(numbers)}, where {filled} are filled")
        into = memoryview(self._copied)
        with memoryview(self._pages) as kept:
            for at, slot in enumerate(numbers):
                start = slot * PAGE_SIZE
                into[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] = kept[start : start + PAGE_SIZE]
        return into[: len(numbers) * PAGE_SIZE]
