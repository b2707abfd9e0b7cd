"""Which stretches of a memory object have changed: by their content.

A memory object is written through mappings, but also with write(2), truncated and punched, by every
process that has it; its content tells. xxh3 over what preadv(2) gives: 0.2 s for a GiB.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import xxhash

from godwit.engine import ranges
from godwit.engine.ranges import Range, Ranges
from godwit.engine.tracking import Changes
from godwit.resources import objects
from godwit.types import Fd

BLOCK_BYTES: Final = 1 << 16
_UNKNOWN: Final = -1  # the digest of a block of which the destination has something, but not what was read


@dataclass(slots=True)
class Sums:
    """What the destination has of one memory object: digests of what was sent, block by block."""

    _digests: dict[Range, int] = field(default_factory=dict[Range, int])
    # Of nobody's choosing: who knew it could write a block that looks unchanged.
    _seed: int = field(default_factory=lambda: secrets.randbits(64))

    def scan(self, descriptor: Fd, size_bytes: int, buffer: memoryview) -> Changes:
        """Tell what differs from what was sent. The buffer, of a block at least, is overwritten."""
        blocks = list(_blocks(descriptor, size_bytes))
        dirty: list[Range] = []
        for start, end in blocks:
            known = self._digests.get((start, end))
            if known is None or known != self._digest(descriptor, start, buffer[: end - start]):
                dirty.append((start, end))
        gone = ranges.subtract(ranges.union(self._digests), ranges.union(blocks))
        there = set(blocks)
        self._digests = {block: digest for block, digest in self._digests.items() if block in there}
        return Changes(dirty, gone)

    def read(self, descriptor: Fd, runs: Sequence[Range], into: memoryview) -> int:
        """Read blocks that `scan` has found, to be sent, one after the other; return the bytes read."""
        at = 0
        for start, end in runs:
            length = end - start
            # The digest is of what is sent: the program may write between the scan and this.
            self._digests[start, end] = self._digest(descriptor, start, into[at : at + length])
            at += length
        return at

    def resize(self, before_bytes: int, now_bytes: int) -> None:
        """Take note that the destination goes from one size to another.

        It cuts off what lies beyond its size, of what comes too: a file that grows is read here as it is,
        and the digest is of more than could be kept there.
        """
        if before_bytes == now_bytes:
            return
        for block in self._digests:
            if block[1] > min(before_bytes, now_bytes):
                self._digests[block] = _UNKNOWN

    def _digest(self, descriptor: Fd, start: int, into: memoryview) -> int:
        got = os.preadv(descriptor, [into], start)
        if got < len(into):
            into[got:] = bytes(len(into) - got)
        return xxhash.xxh3_64_intdigest(into, self._seed)


def _blocks(descriptor: Fd, size_bytes: int) -> Iterator[Range]:
    """Yield the data of an object in pieces that never cross a block's boundary."""
    for start, end in objects.data_runs(descriptor, size_bytes):
        at = start
        while at < end:
            beyond = min(end, (at // BLOCK_BYTES + 1) * BLOCK_BYTES)
            yield at, beyond
            at = beyond


def groups(blocks: Ranges, limit_bytes: int) -> Iterator[list[Range]]:
    """Put whole blocks together to chunks of at most so many bytes."""
    group: list[Range] = []
    room = limit_bytes
    for block in blocks:
        if block[1] - block[0] > room:
            yield group
            group, room = [], limit_bytes
        group.append(block)
        room -= block[1] - block[0]
    if group:
        yield group
