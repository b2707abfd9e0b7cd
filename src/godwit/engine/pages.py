"""Where the pages of a tree lie, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from godwit.engine.view import MemoryObject, ProcessView
from godwit.linux import mem, pagemap
from godwit.linux.mman import PROT_WRITE
from godwit.resources import objects
from godwit.resources.memory import Backing, VmaEntry
from godwit.resources.objects import ObjectEntry
from godwit.resources.process import ProcessEntry
from godwit.types import OwnedFd, Pid

_RESIDENT_RUNS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSource:
    """Where pages are read from: a process's memory, or a memory object."""

    pid: Pid | None  # None: an object
    object_id: int
    process: int  # index into the tree's processes
    descriptor: OwnedFd  # pagemap of a process; the object's file
    spans: tuple[tuple[int, int], ...]  # (start, end) by address or by offset: where pages may be

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of the pages to carry, in order. A large process has too many to keep."""
        for start, end in self.spans:
            if self.pid is not None:
                yield from self.runs_within(start, end)
            else:
                yield from objects.data_runs(self.descriptor.number, end)

    def runs_within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the pages to carry of a range of a process."""
        return pagemap.scan_private(self.descriptor.number, start, end)


def close_all(sources: Iterable[PageSource]) -> None:
    """Close the descriptors of page sources."""
    for source in sources:
        source.descriptor.close()


def resident(pid: Pid, vmas: Sequence[VmaEntry]) -> tuple[tuple[int, int], ...]:
    """List the larger runs of private pages in writable mappings: where the first touch can be spared."""
    runs: list[tuple[int, int]] = []
    with OwnedFd(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)) as descriptor:
        for vma in vmas:
            # Over an object or file, a page made too early would hide what is still to come into it.
            if not vma.shared and vma.protection & PROT_WRITE and vma.backing is Backing.ANONYMOUS:
                runs += pagemap.scan_private(descriptor.number, vma.start, vma.end)
                if len(runs) > 2 * _RESIDENT_RUNS:
                    runs = sorted(runs, key=_length)[-_RESIDENT_RUNS:]
    return tuple(sorted(sorted(runs, key=_length)[-_RESIDENT_RUNS:]))


def _length(run: tuple[int, int]) -> int:
    return run[1] - run[0]


def spans_of(vmas: Sequence[VmaEntry]) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the mappings whose pages may belong to the process alone."""
    return tuple((vma.start, vma.end) for vma in vmas if not vma.shared and vma.backing is not Backing.KERNEL)


def of_process(process: ProcessView, entry: ProcessEntry, index: int) -> PageSource:
    """Tell where the pages lie that belong to the process alone."""
    descriptor = OwnedFd(os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC))
    spans = spans_of(entry.memory.vmas)
    return PageSource(pid=process.pid, object_id=0, process=index, descriptor=descriptor, spans=spans)


def of_object(found: MemoryObject) -> tuple[ObjectEntry, PageSource]:
    """Describe a memory object, and tell where its pages are."""
    descriptor = OwnedFd(os.open(found.proc_path, os.O_RDONLY | os.O_CLOEXEC))
    entry = objects.collect(found.object_id, found.kind, found.name, descriptor.number)
    spans = ((0, entry.size_bytes),)
    return entry, PageSource(
        pid=None, object_id=found.object_id, process=-1, descriptor=descriptor, spans=spans
    )


def read_pages(source: PageSource, runs: Sequence[tuple[int, int]], into: memoryview) -> int:
    """Read whole runs one after another into the buffer; return the bytes read.

    The last page of an object may lie beyond its end: it reads as zeroes.
    """
    total = sum(end - start for start, end in runs)
    if source.pid is not None:
        return mem.read_all(source.pid, runs, into[:total])
    at = 0
    for start, end in runs:
        length = end - start
        got = os.preadv(source.descriptor.number, [into[at : at + length]], start)
        into[at + got : at + length] = bytes(length - got)
        at += length
    return at


def read_frozen(pid: Pid, runs: Sequence[tuple[int, int]], into: memoryview) -> int:
    """Read whole runs of a stopped process, one after another; return the bytes read."""
    return mem.read_all(pid, runs, into[: sum(end - start for start, end in runs)])


def read_living(
    pid: Pid, runs: Sequence[tuple[int, int]], into: memoryview
) -> tuple[Sequence[tuple[int, int]], int]:
    """Read runs of a running process; return those that could be read (the very same list: all), and bytes.

    It may unmap what it likes meanwhile, and end.
    """
    try:
        return runs, read_frozen(pid, runs, into)
    except OSError:
        could: list[tuple[int, int]] = []
        at = 0
        for run in runs:
            try:
                at += read_frozen(pid, [run], into[at:])
            except OSError:
                continue
            could.append(run)
        return could, at


def chunks(
    runs: Iterable[tuple[int, int]], limit_bytes: int, limit_runs: int
) -> Iterator[list[tuple[int, int]]]:
    """Cut runs into groups of at most `limit_bytes` (a multiple of the page size) and `limit_runs`."""
    group: list[tuple[int, int]] = []
    room = limit_bytes
    for run_start, end in runs:
        start = run_start
        while start < end:
            stop = min(end, start + room)
            group.append((start, stop))
            room -= stop - start
            start = stop
            if room == 0 or len(group) == limit_runs:
                yield group
                group, room = [], limit_bytes
    if group:
        yield group
