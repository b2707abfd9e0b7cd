"""Processes, mappings and memory objects made at the destination while the program still runs.

They follow it: when threads, mappings or objects change at the source, so they do here, and the pages that
came already stay wherever the mapping under them did.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from godwit.engine import missing, ranges, reshape, space
from godwit.engine import stub as stubs
from godwit.engine.family import Family, adapt, raise_family
from godwit.engine.openpaths import OpenPaths
from godwit.engine.ranges import Range, Ranges
from godwit.engine.stub import Stub, Transfer
from godwit.errors import ImageError
from godwit.linux import clone, mem
from godwit.procfs import maps
from godwit.resources import memory, objects
from godwit.resources.objects import ObjectEntry
from godwit.resources.outline import OutlineEntry, SpaceEntry
from godwit.resources.roots import OURS, Root, at_home
from godwit.tracee.calls import WORKSHOP_BYTES
from godwit.tracee.task import Tracee
from godwit.types import Fd, OwnedFd, Pid


@dataclass(slots=True)
class Groundwork:
    """A tree's processes, empty or with pages. `discard` undoes everything."""

    in_pod: bool
    status_fd: Fd | None = None  # gets (pid, wait status) of what a pod's init reaps
    transfer: Transfer = field(default_factory=Transfer.open)
    family: Family | None = None
    shape: OutlineEntry | None = None
    root: Root = OURS  # where the tree's names begin
    lodging: Path | None = None  # where the root of the pod is mounted, in our mount namespace
    reshaped: bool = False  # mappings were changed since they were made
    postcopy: bool = False  # pages may come later: every process gets a userfaultfd
    uffds: dict[int, OwnedFd] = field(default_factory=dict[int, OwnedFd])  # by the tree's own pid
    left: dict[int, list[Range]] = field(default_factory=dict[int, list[Range]])  # what comes later, by pid
    objects: dict[int, tuple[ObjectEntry, OwnedFd]] = field(
        default_factory=dict[int, tuple[ObjectEntry, OwnedFd]]
    )

    def prepare(self, shape: OutlineEntry) -> None:
        """Make the processes, threads and mappings of a tree, empty.

        May be done again with another outline: what `reshape.surviving` tells then keeps its pages.
        """
        if self.family is not None and self.shape is not None and reshape.adaptable(self.shape, shape):
            self._adapt(shape)
        else:
            self._discard()
            self._spawn(shape)
        self.shape = shape

    def lodge(self, directory: Path) -> None:
        """Have the pod take the mount at `directory`, the files of the tree's home, as its root."""
        self.lodging = directory
        self.root = at_home(directory)

    @property
    def armed(self) -> bool:
        """Whether pages may come later."""
        return bool(self.uffds)

    def _arm(self) -> None:
        assert self.family is not None
        if self.family.founder.inner in self.family.stubs:
            return  # A container's init moves: nobody but the program itself could keep the descriptors.
        for pid, stub in self.family.stubs.items():
            if self.postcopy and pid not in self.uffds:
                self.uffds[pid] = missing.arm(stub)

    def leave(self, index: int, runs: Ranges) -> None:
        """Take note that pages of a process come later. Raises ImageError where they cannot."""
        stub, space_ = self._space(index)
        space.check_runs(space_.vmas, runs)
        missing.check(space_.vmas, runs)
        if stub.inner not in self.uffds:
            raise ImageError("pages are left behind, and that was not agreed on")
        self.left[stub.inner] = ranges.union([*self.left.get(stub.inner, []), *runs])

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Run on the CPU of the stubs: each of their stops then costs a context switch, not a wake-up."""
        before = os.sched_getaffinity(0)
        # The highest: a source on the same machine takes the lowest of its program's.
        os.sched_setaffinity(0, {max(before)})
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def _spawn(self, shape: OutlineEntry) -> None:
        # Whoever is born here inherits our CPU; each thread gets its own in the end.
        with self.beside():
            self._make(shape)

    def _make(self, shape: OutlineEntry) -> None:
        spans = [[(vma.start, vma.end) for vma in space_.vmas] for space_ in shape.spaces]
        seed_task = self._seed(shape)
        try:
            if self.lodging is not None:
                # What is opened from now on is opened as the pod sees it.
                self.root = at_home(Path(f"/proc/{seed_task.pid}/root"))
            own = [(mapping.start, mapping.end) for mapping in maps.read_maps(seed_task.pid)]
            workshop_at = memory.free_range([*spans, own], WORKSHOP_BYTES)
            inner = 1 if self.in_pod else self._seed_pid(shape)
            founder = stubs.seed_stub(inner, seed_task, self.transfer, workshop_at)
        except BaseException:
            stubs.kill(seed_task)
            raise
        self.family = Family(shape.identities, founder)
        raise_family(self.family, in_pod=self.in_pod)
        self._arm()
        with OpenPaths(shape, self.root) as paths:
            self._make_objects(shape)
            by_pid = {identity.pid: identity for identity in shape.identities}
            for space_ in shape.spaces:
                stub = self.family.stubs[space_.pid]
                stubs.clone_threads(stub, by_pid[space_.pid].tids[1:])
                space.clear(stub)
                space.map_all(stub, space_.vmas, paths.open, self.memory_object)
                space.populate(stub, space_.vmas, space_.resident)

    def _seed_pid(self, shape: OutlineEntry) -> int:
        """Choose whom to fork first outside a pod: the root, or a leader it lacks."""
        root = shape.identities[0]
        if root.sid in (root.pid, 0, os.getsid(0)) or _alive(root.sid):
            return root.pid
        return root.sid

    def _seed(self, shape: OutlineEntry) -> Tracee:
        flags = clone.CLONE_NEWPID if self.in_pod else 0
        pids = [] if self.in_pod else [Pid(self._seed_pid(shape))]
        return stubs.make_seed(
            self.transfer,
            pids=pids,
            flags=flags,
            status_fd=self.status_fd if self.in_pod else None,
            root=self.lodging,
            new_session=self.in_pod,
        )

    def _adapt(self, shape: OutlineEntry) -> None:
        """Bring processes, threads, objects and mappings up to date."""
        assert self.family is not None
        assert self.shape is not None
        with self.beside():
            new = adapt(self.family, shape.identities)
            for pid in [pid for pid in self.uffds if pid not in self.family.stubs]:
                self.uffds.pop(pid).close()
            self._arm()
            remade = self._make_objects(shape)
            before = {space_.pid: space_ for space_ in self.shape.spaces}
            with OpenPaths(shape, self.root) as paths:
                for space_ in shape.spaces:
                    if space_.pid in new:
                        stub = self.family.stubs[space_.pid]
                        space.clear(stub)
                        space.map_all(stub, space_.vmas, paths.open, self.memory_object)
                    else:
                        self._reshape(before[space_.pid], shape, space_, paths, remade=remade)

    def _reshape(
        self, old: SpaceEntry, shape: OutlineEntry, new: SpaceEntry, paths: OpenPaths, *, remade: bool
    ) -> None:
        assert self.family is not None
        assert self.shape is not None
        if old.vmas == new.vmas and self.shape.path_files == shape.path_files and not remade:
            return
        change = reshape.reshape(self.shape, old, shape, new)
        if not change.nothing:
            self.reshaped = True
            space.apply(self.family.stubs[new.pid], change, new.vmas, paths.open, self.memory_object)

    def _make_objects(self, shape: OutlineEntry) -> bool:
        """Make and resize memory objects; tell whether one was made anew that was there before."""
        wanted = {entry.object_id: entry for entry in shape.objects}
        remade = False
        for object_id, (entry, made) in list(self.objects.items()):
            now = wanted.get(object_id)
            if now is not None and objects.resized(entry, now, made.number):
                self.objects[object_id] = (now, made)
            elif now != entry:
                remade = remade or now is not None
                objects.discard(*self.objects.pop(object_id))
        for entry in shape.objects:
            if entry.object_id not in self.objects:
                self.objects[entry.object_id] = (entry, objects.restore(entry, self.root))
        return remade

    def memory_object(self, object_id: int) -> OwnedFd:
        """Return a memory object of the tree. Raises ImageError when there is none of that id."""
        try:
            return self.objects[object_id][1]
        except KeyError:
            raise ImageError(f"the image refers to memory object {object_id}, which it lacks") from None

    def write_process_pages(self, index: int, runs: Ranges, data: memoryview | None) -> None:
        """Write pages of a process, zeroes without data.

        `index` counts the address spaces of the outline. Raises ImageError for a foreign address.
        """
        stub, space_ = self._space(index)
        space.check_runs(space_.vmas, runs)
        if data is None:
            space.drop(stub, space_.vmas, runs, zero=True)
        else:
            mem.write_all(stub.pid, stub.workshop.memory, runs, data)

    def drop_process_pages(self, index: int, runs: Ranges) -> None:
        """Give up pages of a process, as if they had never been written."""
        stub, space_ = self._space(index)
        space.check_runs(space_.vmas, runs)
        space.drop(stub, space_.vmas, runs, zero=False)

    def _space(self, index: int) -> tuple[Stub, SpaceEntry]:
        assert self.family is not None
        assert self.shape is not None
        if not 0 <= index < len(self.shape.spaces):
            raise ImageError(f"pages for process {index}, of which there are {len(self.shape.spaces)}")
        space_ = self.shape.spaces[index]
        return self.family.stubs[space_.pid], space_

    def write_object_pages(self, object_id: int, runs: Ranges, data: memoryview | None) -> None:
        """Write pages of a memory object, zeroes without data; what lies beyond its end is dropped."""
        entry, fd = self._object(object_id, runs)
        at = 0
        for start, end in runs:
            length = min(end, entry.size_bytes) - start
            if data is not None:
                objects.write(fd, data[at : at + length], start)
            else:
                # Zeroes that are there, not a hole: SEEK_DATA tells them apart.
                objects.write_zeroes(fd, start, length)
            at += end - start

    def drop_object_pages(self, object_id: int, runs: Ranges) -> None:
        """Punch holes into a memory object."""
        _, fd = self._object(object_id, runs)
        for start, end in runs:
            objects.punch_hole(fd, start, end - start)

    def _object(self, object_id: int, runs: Ranges) -> tuple[ObjectEntry, Fd]:
        if object_id not in self.objects:
            raise ImageError(f"pages for memory object {object_id}, which the image lacks")
        entry, made = self.objects[object_id]
        if any(not 0 <= start < entry.size_bytes for start, _ in runs):
            raise ImageError(f"a page lies beyond the end of memory object {object_id}")
        return entry, made.number

    def _discard(self) -> None:
        """Kill the stubs, children before the pod's init, whose death would wait for them."""
        family, self.family, self.shape = self.family, None, None
        for uffd in self.uffds.values():
            uffd.close()
        self.uffds.clear()
        self.left.clear()
        for entry, made_object in self.objects.values():
            objects.discard(entry, made_object)
        self.objects.clear()
        if family is None:
            return
        made = [*family.stubs.values(), *(stub for stub, _ in family.placeholders.values())]
        if all(stub is not family.founder for stub in made):
            made.append(family.founder)
        for stub in made:
            for task in [*stub.threads.values()][::-1]:
                stubs.kill(task)
            stub.close()


def _alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
