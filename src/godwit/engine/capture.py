"""From a frozen tree to entries. Pages are enumerated here and read by who sends them."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from godwit.engine import clocks, layout, pages
from godwit.engine.freeze import FrozenTree
from godwit.engine.pages import PageSource
from godwit.engine.view import ProcessView, TreeView
from godwit.errors import InternalError
from godwit.linux import mem
from godwit.procfs import cpuinfo, fdinfo, timers
from godwit.procfs.source import read_bytes
from godwit.resources import (
    attributes,
    credentials,
    fdtable,
    limits,
    memory,
    registry,
    regular,
    signals,
    thread,
)
from godwit.resources import timers as timers_resource
from godwit.resources.base import FileKind, OpenFile
from godwit.resources.fdtable import DescriptorEntry
from godwit.resources.memory import MemoryEntry
from godwit.resources.objects import ObjectEntry
from godwit.resources.outline import DemandEntry, OutlineEntry, SpaceEntry
from godwit.resources.process import IdentityEntry, MachineEntry, ProcessEntry, ProcessState, TreeEntry
from godwit.resources.thread import SleepClock, ThreadEntry
from godwit.tracee import calls
from godwit.types import PAGE_SIZE, Pid


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A frozen tree in entries."""

    tree: TreeEntry
    files: tuple[tuple[FileKind, Any], ...]
    sources: tuple[PageSource, ...]

    def close(self) -> None:
        """Close the descriptors of the page sources."""
        pages.close_all(self.sources)


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


def written_files(view: TreeView) -> frozenset[tuple[int, int]]:
    """Return (device, inode) of the files with a name that the tree has open for writing."""
    return frozenset(
        (file.device, file.inode)
        for file in view.files
        if registry.kind_of(file) is regular.KIND
        and file.info.flags & os.O_ACCMODE != os.O_RDONLY
        and not regular.nameless(file)
    )


def outline(view: TreeView, *, resident: bool = True) -> tuple[OutlineEntry, DemandEntry]:
    """Describe a running tree as far as a destination needs it to prepare and to check itself.

    With `resident` it is told where memory is going to be needed.

    Raises:
        UnsupportedStateError: A process uses a program or a directory that was removed.
    """
    paths = layout.PathTable(view)
    spaces: list[SpaceEntry] = []
    written: set[int] = set()
    for process in view.processes:
        if process.zombie:
            continue
        with mem.open_memory(process.pid) as memory_fd:
            vmas, vdso = layout.vmas_of(process, paths, view, memory_fd)
        layout.links(process.pid, paths)
        written |= {vma.file for vma in vmas if vma.file >= 0 and vma.shared and vma.may_write}
        spaces.append(
            SpaceEntry(
                pid=process.status.nspid[-1],
                vmas=vmas,
                vdso_digest=xxhash.xxh3_128_digest(vdso),
                resident=pages.resident(process.pid, vmas) if resident else (),
            )
        )
    entries: list[ObjectEntry] = []
    for found in view.objects.values():
        entry, source = pages.of_object(found)
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


def capture(frozen: FrozenTree, view: TreeView, machine_entry: MachineEntry) -> Capture:
    """Read everything but the pages. The tree must be frozen and looked at since.

    Raises:
        UnsupportedStateError: Something cannot be carried after all.
    """
    inner = view.inner
    paths = layout.PathTable(view)
    stopped = frozenset(task.pid for task in frozen.threads() if task.group_stopped)
    states = identities(view, stopped)
    sources: list[PageSource] = []
    shift_ns = clocks.seen_by(view.root.pid)[0] - time.monotonic_ns()
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(pages.close_all, sources)
        processes: list[ProcessEntry] = []
        for process, identity in zip(view.processes, states, strict=True):
            if process.zombie:
                continue
            sleep_clock = SleepClock(frozen.schedulers, shift_ns, layout.sleep_notes(process))
            entry = _process(frozen, process, identity, paths, inner, view, sleep_clock)
            sources.append(pages.of_process(process, entry, len(processes)))
            processes.append(entry)
        found = [pages.of_object(item) for item in view.objects.values()]
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
    paths: layout.PathTable,
    inner: dict[int, int],
    view: TreeView,
    sleep_clock: SleepClock,
) -> ProcessEntry:
    pid = process.pid
    leader = frozen.leader(pid)
    with contextlib.ExitStack() as stack:
        stack.callback(leader.restore)
        workshop = stack.enter_context(calls.opened(leader, gadgets=view.gadgets_of(process)))
        batch = workshop.batch(leader)
        break_ = memory.collect_layout(batch, process.stat)
        actions = signals.collect(batch, leader.tid)
        clocks_ = timers_resource.collect(batch, timers.read(pid), inner)
        user = credentials.collect(batch, process.status)
        batch.run()
        # Now: the next batch uses the same memory.
        process_layout, process_signals = break_(), actions()
        process_timers, process_user = clocks_(), user()
        threads: list[ThreadEntry] = []
        for tid in process.tids:
            task = frozen.tracees[pid][tid]
            own = workshop.batch(task)
            answer = thread.collect(task, inner[tid], own, workshop.memory, frozen.reposes[tid], sleep_clock)
            own.run()
            threads.append(answer())
            if task is not leader:
                task.restore()
        vmas, vdso = layout.vmas_of(process, paths, view, workshop.memory)
        exe, cwd, root = layout.links(pid, paths)
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
