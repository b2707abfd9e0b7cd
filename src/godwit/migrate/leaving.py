"""Which pages stay behind when a tree goes over, to follow once it runs: the source's side of the freeze.

What a thread is about to touch goes along: where its registers point, and what the kernel writes for it. So
does what cannot come later. Of the rest as much goes along as the freeze has room for, smallest runs first:
a few pages here and there are a program's own data, long runs are what it works on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from godwit.engine import missing, ranges
from godwit.engine.ranges import Range, Ranges
from godwit.linux.arch import UserRegs
from godwit.resources.process import ProcessEntry
from godwit.resources.thread import ThreadEntry
from godwit.types import PAGE_SIZE, page_floor

# A freeze has no time for tens of thousands of runs: what lies between near ones stays behind with them. It
# takes some 5 us for a run, 0.2 for a page to be dropped.
_GAP_BYTES: Final = 1 << 16
_DENSE_BYTES: Final = 1 << 20
# Given up before a freeze, where there is time: as much as it takes until so few runs are left for it.
_FEW_RUNS: Final = 500
_DENSE_GAP_BYTES: Final = 1 << 18
_WIDEST_GAP_BYTES: Final = 16 << 20
_WORD: Final = struct.Struct("<Q")
_STACK_T: Final = struct.Struct("<QixxxxQ")
_SIGNAL_FRAME_BYTES: Final = 4 * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Division:
    """The pages of one process at the freeze."""

    along: list[Range]
    behind: list[Range]


def can_stay(process: ProcessEntry) -> list[Range]:
    """Return where pages may come later."""
    return ranges.union((vma.start, vma.end) for vma in process.memory.vmas if missing.may_be_left(vma))


def needed_at_once(process: ProcessEntry) -> list[Range]:
    """Return the pages that threads, or the kernel on their behalf, are about to touch."""
    pages = {page_floor(address) for own in process.threads for address in _addresses(own)}
    stacks = [stack for own in process.threads for stack in _stack_ends(own)]
    return ranges.union([*((page, page + 2 * PAGE_SIZE) for page in pages), *stacks])


def _stack_ends(own: ThreadEntry) -> Iterator[Range]:
    """Yield where a signal's frame would be written: below the stack pointer, or atop the other stack."""
    pointer = UserRegs.from_buffer_copy(own.registers).stack_pointer
    yield max(0, page_floor(pointer) - _SIGNAL_FRAME_BYTES), page_floor(pointer) + PAGE_SIZE
    start, _, length = _STACK_T.unpack(own.altstack)
    if length:
        end = page_floor(start + length + PAGE_SIZE - 1)
        yield max(page_floor(start), end - _SIGNAL_FRAME_BYTES), end


def _addresses(own: ThreadEntry) -> Iterator[int]:
    registers = own.registers[: len(bytes(UserRegs())) // _WORD.size * _WORD.size]
    yield from (word for (word,) in _WORD.iter_unpack(registers))
    if own.rseq is not None:
        yield own.rseq.address
    if own.sleep is not None:
        yield from (value & 0xFFFFFFFFFFFFFFFF for value in own.sleep.arguments)


def dense(written: Ranges) -> list[Range]:
    """Return where so much was written that it is cheaper to leave all of it behind than to look closer."""
    gap_bytes = _DENSE_GAP_BYTES
    found = large(ranges.coalesce(written, gap_bytes))
    while gap_bytes < _WIDEST_GAP_BYTES and len(ranges.subtract(written, found)) > _FEW_RUNS:
        gap_bytes *= 2
        found = large(ranges.coalesce(written, gap_bytes))
    return found


def large(found: Ranges) -> list[Range]:
    """Return the ranges that are worth leaving behind as a whole."""
    return [run for run in found if run[1] - run[0] >= _DENSE_BYTES]


def divide(process: ProcessEntry, dirty: Sequence[Range], wholesale: Ranges, along_pages: int) -> Division:
    """Divide what the destination lacks.

    Args:
        process: Frozen.
        dirty: The runs of its own pages that the destination lacks, outside of `wholesale`.
        wholesale: Ranges of which the destination is to keep nothing.
        along_pages: How many pages may go along that need not.
    """
    stays = can_stay(process)
    at_once = needed_at_once(process)
    behind_all = ranges.subtract(ranges.intersect(wholesale, stays), at_once)
    known = ranges.union([*ranges.union(dirty), *wholesale])
    must = ranges.union([*ranges.subtract(dirty, stays), *ranges.intersect(known, at_once)])
    could = ranges.subtract(ranges.intersect(ranges.union(dirty), stays), at_once)
    room = along_pages * PAGE_SIZE
    along: list[Range] = []
    behind: list[Range] = []
    for run in sorted(could, key=lambda run: run[1] - run[0]):
        room -= run[1] - run[0]
        (along if room >= 0 else behind).append(run)
    near = ranges.coalesce(ranges.union([*behind, *behind_all]), _GAP_BYTES)
    # Joined only over what may stay behind, and not over what goes along.
    left = ranges.subtract(ranges.intersect(near, stays), ranges.union([*at_once, *along]))
    return Division(ranges.union([*must, *along]), left)
