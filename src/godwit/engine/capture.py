"""From a frozen tree to entries. Pages are enumerated here and read by who sends them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import xxhash

from godwit.engine import clocks
from godwit.engine.freeze import FrozenTree
from godwit.engine.view import KnownSpace, MemoryObject, ProcessView, TreeView, map_file
from godwit.errors import InternalError, Refusal, RefusedError
from godwit.linux import mem, pagemap
from godwit.linux.arch import SYSCALL_INSTRUCTION
from godwit.linux.mman import PROT_WRITE
from godwit.procfs import cpuinfo, fdinfo, maps, timers
from godwit.procfs.source import read_bytes
from godwit.resources import (
    attributes,
    credentials,
    fdtable,
    limits,
    memory,
    objects,
    registry,
    regular,
    signals,
    sleepnotes,
    thread,
)
from godwit.resources import timers as timers_resource
from godwit.resources.base import FileKind, OpenFile
from godwit.resources.fdtable import DescriptorEntry
from godwit.resources.memory import Backing, MemoryEntry, VmaEntry
from godwit.resources.objects import ObjectEntry
from godwit.resources.outline import DemandEntry, OutlineEntry, SpaceEntry
from godwit.resources.pathfile import PathFileEntry
from godwit.resources.process import IdentityEntry, MachineEntry, ProcessEntry, ProcessState, TreeEntry
from godwit.resources.thread import SleepClock, ThreadEntry
from godwit.tracee import calls
from godwit.types import PAGE_SIZE, OwnedFd, Pid


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
                yield from pagemap.scan_private(self.descriptor.number, start, end)
            else:
                yield from objects.data_runs(self.descriptor.number, end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A frozen tree in entries."""

    tree: TreeEntry
    files: tuple[tuple[FileKind, Any], ...]
    sources: tuple[PageSource, ...]

    def close(self) -> None:
        """Close the descriptors of the page sources."""
        _close(self.sources)


def _close(sources: Iterable[PageSource]) -> None:
    for source in sources:
        source.descriptor.close()


_RESIDENT_RUNS: Final = 1024


class _PathTable:
    """The image's table of files known by path."""

    def __init__(self, view: TreeView) -> None:
        self._view = view
        self._index: dict[PathFileEntry, int] = {}

    def index(self, proc_path: str, path: bytes, *, content: bool) -> int:
        return self.place(self._view.path_file(proc_path, path, content=content))

    def place(self, entry: PathFileEntry) -> int:
        return self._index.setdefault(entry, len(self._index))

    def entries(self) -> tuple[PathFileEntry, ...]:
        return tuple(self._index)


def identities(view: TreeView, stopped: frozenset[Pid] = frozenset()) -> tuple[IdentityEntry, ...]:
    """Describe who is in the tree; parents come before children.

    `stopped` are the processes that job control had stopped before a freeze hid it.
    """
    inner = view.inner
    return tuple(_identity(process, inner, stopped) for process in view.processes)


def _identity(process: ProcessView, inner: dict[int, int], stopped: frozenset[Pid]) -> IdentityEntry:
    state = ProcessState.RUNNING
    if process.zombie:
        state = ProcessState.ZOMBIE
    elif process.stat.state == "T" or process.pid in stopped:
        state = ProcessState.STOPPED
    return IdentityEntry(
        pid=process.status.nspid[-1],
        ppid=inner.get(process.stat.ppid, 0),
        pgid=process.status.nspgid[-1],
        sid=process.status.nssid[-1],
        exit_signal=process.stat.exit_signal,
        state=state,
        wait_status=process.stat.exit_code if process.zombie else 0,
        comm=os.fsencode(process.stat.comm),
        tids=tuple(inner[tid] for tid in process.tids),
    )


def machine_now(before: MachineEntry, view: TreeView) -> MachineEntry:
    """Read the clocks anew; the rest of a machine does not change."""
    monotonic_ns, boottime_ns = clocks.seen_by(view.root.pid)
    return replace(before, realtime_ns=time.time_ns(), monotonic_ns=monotonic_ns, boottime_ns=boottime_ns)


def machine(view: TreeView) -> MachineEntry:
    """Describe the machine as the tree's processes see it."""
    hostname, domainname = clocks.names_of(view.root.pid)
    monotonic_ns, boottime_ns = clocks.seen_by(view.root.pid)
    return MachineEntry(
        hostname=hostname,
        domainname=domainname,
        boot_id=clocks.boot_id(),
        realtime_ns=time.time_ns(),
        monotonic_ns=monotonic_ns,
        boottime_ns=boottime_ns,
        page_bytes=PAGE_SIZE,
        cpu_flags=tuple(sorted(cpuinfo.read().flags)),
    )


def collect_files(view: TreeView) -> tuple[tuple[FileKind, Any], ...]:
    """Collect every open file by its kind, in the registry's order."""
    claimed: dict[str, list[OpenFile]] = {}
    for file in view.files:
        claimed.setdefault(registry.kind_of(file).name, []).append(file)
    collected: list[tuple[FileKind, Any]] = []
    for kind in registry.KINDS:
        files = claimed.get(kind.name)
        if not files:
            continue
        try:
            collected += [(kind, entry) for entry in kind.collect(files, view)]
        except OSError as error:
            error.add_note(f"while collecting {len(files)} of kind {kind.name}, first {files[0].where}")
            raise
    return tuple(collected)


def outline(view: TreeView) -> tuple[OutlineEntry, DemandEntry]:
    """Describe a running tree as far as a destination needs it to prepare and to check itself.

    Raises:
        UnsupportedStateError: A process uses a program or a directory that was removed.
    """
    paths = _PathTable(view)
    spaces: list[SpaceEntry] = []
    written: set[int] = set()
    for process in view.processes:
        if process.zombie:
            continue
        with mem.open_memory(process.pid) as memory_fd:
            vmas, vdso = _vmas(process, paths, view, memory_fd)
        _links(process.pid, paths)
        written |= {vma.file for vma in vmas if vma.file >= 0 and vma.shared and vma.may_write}
        spaces.append(
            SpaceEntry(
                pid=process.status.nspid[-1],
                vmas=vmas,
                vdso_digest=xxhash.xxh3_128_digest(vdso),
                resident=_resident(process.pid, vmas),
            )
        )
    entries: list[ObjectEntry] = []
    for found in view.objects.values():
        entry, source = _object(found)
        source.descriptor.close()
        entries.append(entry)
    shape = OutlineEntry(
        identities=identities(view),
        spaces=tuple(spaces),
        path_files=paths.entries(),
        objects=tuple(entries),
    )
    plain = [file for file in view.files if registry.kind_of(file) is regular.KIND]
    return shape, DemandEntry(
        files=tuple(regular.collect(plain, view)),
        written=tuple(sorted(written)),
        limits=tuple(limits.collect(process.pid) for process in view.processes if not process.zombie),
    )


def _resident(pid: Pid, vmas: Sequence[VmaEntry]) -> tuple[tuple[int, int], ...]:
    """List the larger runs of private pages in writable mappings: where the first touch can be spared."""
    runs: list[tuple[int, int]] = []
    with OwnedFd(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)) as descriptor:
        for vma in vmas:
            if not vma.shared and vma.protection & PROT_WRITE and vma.backing is not Backing.KERNEL:
                runs += pagemap.scan_private(descriptor.number, vma.start, vma.end)
                if len(runs) > 2 * _RESIDENT_RUNS:
                    runs = sorted(runs, key=_length)[-_RESIDENT_RUNS:]
    return tuple(sorted(sorted(runs, key=_length)[-_RESIDENT_RUNS:]))


def _length(run: tuple[int, int]) -> int:
    return run[1] - run[0]


def capture(frozen: FrozenTree, view: TreeView, machine_entry: MachineEntry) -> Capture:
    """Read everything but the pages. The tree must be frozen and looked at since.

    Raises:
        UnsupportedStateError: Something cannot be carried after all.
    """
    inner = view.inner
    paths = _PathTable(view)
    stopped = frozenset(task.pid for task in frozen.threads() if task.group_stopped)
    states = identities(view, stopped)
    sources: list[PageSource] = []
    shift_ns = clocks.seen_by(view.root.pid)[0] - time.monotonic_ns()
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(_close, sources)
        processes: list[ProcessEntry] = []
        for process, identity in zip(view.processes, states, strict=True):
            if process.zombie:
                continue
            sleep_clock = SleepClock(frozen.schedulers, shift_ns, _sleep_notes(process))
            entry = _process(frozen, process, identity, paths, inner, view, sleep_clock)
            sources.append(_process_pages(process, entry, len(processes)))
            processes.append(entry)
        found = [_object(item) for item in view.objects.values()]
        sources += [source for _, source in found]
        files = collect_files(view)
        tree = TreeEntry(
            machine=machine_entry,
            identities=states,
            processes=tuple(processes),
            path_files=paths.entries(),
            objects=tuple(entry for entry, _ in found),
            common=tuple(fdtable.collect_common(file, inner, view.inner_groups) for file in view.files),
            locks=tuple(lock for file in view.files for lock in fdtable.collect_locks(file, inner)),
        )
        on_failure.pop_all()
    return Capture(tree=tree, files=files, sources=tuple(sources))


def _process(
    frozen: FrozenTree,
    process: ProcessView,
    identity: IdentityEntry,
    paths: _PathTable,
    inner: dict[int, int],
    view: TreeView,
    sleep_clock: SleepClock,
) -> ProcessEntry:
    pid = process.pid
    leader = frozen.leader(pid)
    with contextlib.ExitStack() as stack:
        stack.callback(leader.restore)
        workshop = stack.enter_context(calls.opened(leader, gadget=_gadget(process, view)))
        batch = workshop.batch(leader)
        layout = memory.collect_layout(batch, process.stat)
        actions = signals.collect(batch, leader.tid)
        clocks_ = timers_resource.collect(batch, timers.read(pid), inner)
        user = credentials.collect(batch, process.status)
        batch.run()
        # Now: the next batch uses the same memory.
        process_layout, process_signals = layout(), actions()
        process_timers, process_user = clocks_(), user()
        threads: list[ThreadEntry] = []
        for tid, task in frozen.tracees[pid].items():
            own = workshop.batch(task)
            answer = thread.collect(task, inner[tid], own, workshop.memory, frozen.reposes[tid], sleep_clock)
            own.run()
            threads.append(answer())
            if task is not leader:
                task.restore()
        vmas, vdso = _vmas(process, paths, view, workshop.memory)
        exe, cwd, root = _links(pid, paths)
        return ProcessEntry(
            identity=identity,
            umask=process.status.umask,
            exe=exe,
            cwd=cwd,
            root=root,
            memory=MemoryEntry(
                vmas=vmas,
                layout=process_layout,
                auxv=read_bytes(pid, "auxv"),
                vdso_digest=xxhash.xxh3_128_digest(vdso),
            ),
            credentials=process_user,
            signals=process_signals,
            timers=process_timers,
            limits=limits.collect(pid),
            threads=tuple(threads),
            descriptors=_descriptors(process, view),
            attributes=attributes.collect(pid, process.status),
        )


def _sleep_notes(process: ProcessView) -> Mapping[int, sleepnotes.Note]:
    notes: dict[int, sleepnotes.Note] = {}
    for mapping in _note_mappings(process):
        with mem.open_memory(process.pid) as memory_fd:
            content = os.pread(memory_fd.number, mapping.length_bytes, mapping.start)
        notes |= sleepnotes.parse(content) or {}
    return notes


def _note_mappings(process: ProcessView) -> list[maps.Mapping]:
    """Return the mappings that a restore left notes in: they are ours, not the program's."""
    found = [mapping for mapping in process.mappings if sleepnotes.may_hold(mapping)]
    if not found:
        return []
    with mem.open_memory(process.pid) as memory_fd:
        return [
            mapping
            for mapping in found
            if sleepnotes.parse(os.pread(memory_fd.number, PAGE_SIZE, mapping.start)) is not None
        ]


def _links(pid: Pid, paths: _PathTable) -> tuple[int, int, int]:
    """Index what /proc/PID/exe, cwd and root lead to; -1 for the root of the mount namespace."""
    exe = _link(pid, "exe", paths, content=True)
    cwd = _link(pid, "cwd", paths, content=False)
    if os.readlink(f"/proc/{pid}/root") == "/":
        return exe, cwd, -1
    return exe, cwd, _link(pid, "root", paths, content=False)


def _link(pid: Pid, name: str, paths: _PathTable, *, content: bool) -> int:
    refusal = _removed(pid, name)
    if refusal is not None:
        raise RefusedError([refusal])
    proc_path = f"/proc/{pid}/{name}"
    return paths.index(proc_path, os.readlink(os.fsencode(proc_path)), content=content)


def removed_links(pid: Pid) -> list[Refusal]:
    """Say which of program, working directory and root were removed under a process."""
    return [refusal for name in ("exe", "cwd", "root") if (refusal := _removed(pid, name)) is not None]


def _removed(pid: Pid, name: str) -> Refusal | None:
    proc_path = f"/proc/{pid}/{name}"
    target = os.readlink(proc_path)
    # A file really called so has its names; a removed directory has none.
    if not target.endswith(" (deleted)") or os.stat(proc_path).st_nlink > 0:
        return None
    return Refusal(
        what=f"{name} {target}",
        where=f"pid {pid}",
        why="it was removed while the program uses it",
        remedy="put it back, or restart the program from its new version",
    )


def _descriptors(process: ProcessView, view: TreeView) -> tuple[DescriptorEntry, ...]:
    found: list[DescriptorEntry] = []
    for fd in sorted(process.links):
        file = view.file_at(process.pid, fd)
        if file is None:
            raise InternalError(f"descriptor {fd} of pid {process.pid} was not looked at")
        # The flag belongs to the descriptor: two descriptors of one file may differ.
        flags = fdinfo.read(process.pid, fd).flags
        found.append(DescriptorEntry(fd=fd, file_id=file.file_id, close_on_exec=bool(flags & os.O_CLOEXEC)))
    return tuple(found)


def _gadget(process: ProcessView, view: TreeView) -> int:
    """Return the address of a system call instruction in a vdso looked at before; 0 if unknown."""
    known = view.memory.spaces.get(process.pid)
    at = known.vdso.find(SYSCALL_INSTRUCTION) if known is not None else -1
    for mapping in process.mappings if at >= 0 else ():
        if mapping.path == "[vdso]":
            return mapping.start + at
    return 0


def _vmas(
    process: ProcessView, paths: _PathTable, view: TreeView, memory_fd: OwnedFd
) -> tuple[tuple[VmaEntry, ...], bytes]:
    """Describe the mappings; what was described before is taken from memory while it stays the same."""
    known = view.memory.spaces.get(process.pid)
    if known is None or known.mappings is not process.mappings:
        known = _describe_space(process, view, memory_fd)
        if all(vma.backing is not Backing.OBJECT for vma in known.vmas):
            # Objects are numbered anew at each look.
            view.memory.spaces[process.pid] = known
    places = [paths.place(entry) for entry in known.files]
    vmas = tuple(vma if vma.file < 0 else replace(vma, file=places[vma.file]) for vma in known.vmas)
    return vmas, known.vdso


def _describe_space(process: ProcessView, view: TreeView, memory_fd: OwnedFd) -> KnownSpace:
    vmas: list[VmaEntry] = []
    files: dict[PathFileEntry, int] = {}
    vdso = b""
    ours = {mapping.start for mapping in _note_mappings(process)}
    for mapping in process.mappings:
        if mapping.path == "[vsyscall]" or mapping.start in ours:
            continue
        if mapping.path == "[vdso]":
            vdso = os.pread(memory_fd.number, mapping.length_bytes, mapping.start)
        file, object_id = -1, 0
        found = view.object_of(process.pid, mapping)
        if found is not None:
            object_id = found.object_id
        elif mapping.inode and not memory.kernel_owned(mapping):
            proc_path = map_file(process.pid, mapping)
            # What looks like an escape in maps may be part of a name.
            path = os.fsencode(mapping.path)
            if b"\\" in path or b"\n" in path:
                path = os.readlink(os.fsencode(proc_path))
            entry = view.path_file(proc_path, path, content=not _written(mapping))
            file = files.setdefault(entry, len(files))
        vmas.append(memory.entry_of(mapping, file=file, object_id=object_id))
    return KnownSpace(mappings=process.mappings, vmas=tuple(vmas), files=tuple(files), vdso=vdso)


def _written(mapping: maps.Mapping) -> bool:
    return mapping.shared and "mw" in mapping.flags


def _process_pages(process: ProcessView, entry: ProcessEntry, index: int) -> PageSource:
    """Tell where the pages lie that belong to the process alone."""
    descriptor = OwnedFd(os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC))
    spans = tuple(
        (vma.start, vma.end)
        for vma in entry.memory.vmas
        if not vma.shared and vma.backing is not Backing.KERNEL
    )
    return PageSource(pid=process.pid, object_id=0, process=index, descriptor=descriptor, spans=spans)


def _object(found: MemoryObject) -> tuple[ObjectEntry, PageSource]:
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
