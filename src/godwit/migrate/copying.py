"""The memory of a tree on its way, while the program runs and once it is frozen.

What changed is found by `tracking` for the private pages of processes, and by `sums` for memory objects.
Nothing is ever taken for sent that could not be read or that the destination has lost again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from godwit.engine import pages, ranges, reshape, sums
from godwit.engine.capture import Capture
from godwit.engine.pages import PageSource
from godwit.engine.ranges import Range
from godwit.engine.sums import Sums
from godwit.engine.tracking import Changes, Tracked, Watch, spans_of
from godwit.engine.view import MemoryObject, ProcessView, TreeView
from godwit.linux import pagemap
from godwit.migrate.pagestream import PageStream, in_chunks
from godwit.resources.outline import OutlineEntry
from godwit.types import OwnedFd, Pid
from godwit.wire import frames


@dataclass(slots=True)
class Copying:
    """What the destination has of the tree's memory, and what it lacks."""

    stream: PageStream
    watch: Watch = field(default_factory=Watch)
    _sums: dict[int, Sums] = field(default_factory=dict[int, Sums])
    _objects: dict[int, tuple[object, ...]] = field(default_factory=dict[int, tuple[object, ...]])
    _begun: bool = False

    def close(self) -> None:
        """End the watch over the program."""
        self.watch.close()

    def adapt(self, tree: TreeView, before: OutlineEntry | None, now: OutlineEntry) -> None:
        """Take note that the destination goes from one outline to the next, and what it loses by that."""
        kept = reshape.surviving(before, now) if before is not None else {}
        for process in tree.processes:
            tracked = self.watch.of(process)
            if tracked is not None:
                tracked.covered = ranges.intersect(tracked.covered, kept.get(process.status.nspid[-1], []))
        known = {entry.object_id: (entry.kind, entry.name) for entry in now.objects}
        keep = before is not None and reshape.adaptable(before, now)
        for object_id in list(self._sums):
            if not keep or self._objects.get(object_id) != known.get(object_id):
                del self._sums[object_id]
        self._objects = dict(known)

    def round(self, tree: TreeView, shape: OutlineEntry) -> None:
        """Send what the destination lacks, while the program runs on. The destination has this shape."""
        self.watch.update(tree.root.pid, tree.processes)
        for index, process in enumerate(_living(tree)):
            tracked = self.watch.of(process)
            if tracked is not None:
                self._send_living(index, tracked, tracked.scan(spans_of(process), protect=True))
        sizes = {entry.object_id: entry.size_bytes for entry in shape.objects}
        for found in tree.objects.values():
            if found.object_id in sizes:
                self._send_object(found, sizes[found.object_id])
        self._begun = True

    def written_bytes(self, tree: TreeView) -> int:
        """Estimate what a round would have to send now, memory objects left out."""
        watched = [tracked for process in _living(tree) if (tracked := self.watch.of(process))]
        return sum(tracked.written_bytes() for tracked in watched)

    def last(self, tree: TreeView, captured: Capture) -> None:
        """Send all that the destination lacks of the frozen tree."""
        for index, process in enumerate(_living(tree)):
            changes = self._last_changes(process, captured.sources[index])
            self._drop((index, 0), changes)
            self._send_process(index, process.pid, changes.dirty)
        for source in captured.sources:
            if source.pid is None and source.object_id in self._sums:
                self._send_object_of(source.object_id, source.descriptor, source.spans[0][1])
            elif source.pid is None:
                self._send_whole_object(source)

    def _last_changes(self, process: ProcessView, source: PageSource) -> Changes:
        tracked = self.watch.of(process)
        if tracked is not None:
            return tracked.scan(spans_of(process), protect=False)
        return Changes(list(source.runs()), list(source.spans) if self._begun else [])

    # --- processes ----------------------------------------------------------------------------

    def _send_living(self, index: int, tracked: Tracked, changes: Changes) -> None:
        self._drop((index, 0), changes)

        def read(runs: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
            could, length = pages.read_living(tracked.pid, runs, into)
            if could is not runs:
                # Unmapped since it was found, or not to be read: told again if it is still there.
                tracked.forget(ranges.subtract(runs, could))
            return could, length

        self.stream.send((index, 0), in_chunks(changes.dirty), read)

    def _send_process(self, index: int, pid: Pid, runs: Sequence[Range]) -> None:
        def read(wanted: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
            return wanted, pages.read_frozen(pid, wanted, into)

        self.stream.send((index, 0), in_chunks(runs), read)

    def _drop(self, owner: tuple[int, int], changes: Changes) -> None:
        if self._begun and changes.gone:
            self.stream.drop(owner, ranges.union(changes.gone))

    # --- memory objects -----------------------------------------------------------------------

    def _send_object(self, found: MemoryObject, size_bytes: int) -> None:
        with OwnedFd(os.open(found.proc_path, os.O_RDONLY | os.O_CLOEXEC)) as descriptor:
            self._send_object_of(found.object_id, descriptor, size_bytes)

    def _send_object_of(self, object_id: int, descriptor: OwnedFd, size_bytes: int) -> None:
        known = self._sums.setdefault(object_id, Sums())
        changes = known.scan(descriptor.number, size_bytes, memoryview(self.stream.buffer))
        owner = (frames.OBJECT, object_id)
        gone = ranges.intersect(changes.gone, [(0, size_bytes)])
        if gone:
            self.stream.drop(owner, gone)

        def read(runs: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
            return runs, known.read(descriptor.number, runs, into)

        self.stream.send(owner, sums.groups(changes.dirty, frames.CHUNK_BYTES), read)

    def _send_whole_object(self, source: PageSource) -> None:
        def read(runs: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
            return runs, pages.read_pages(source, runs, into)

        self.stream.send((frames.OBJECT, source.object_id), in_chunks(source.runs()), read)


def _living(tree: TreeView) -> Iterator[ProcessView]:
    """Yield the processes that have an address space, as outlines and trees count them."""
    return (process for process in tree.processes if not process.zombie)


def can_track(pid: Pid) -> bool:
    """Tell whether this kernel can note what a process writes. Stops nothing."""
    with OwnedFd(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)) as table:
        return pagemap.can_scan(table.number)
