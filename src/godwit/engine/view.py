"""What a process tree holds, as /proc tells it: the value that plan and capture both start from.

The same look is taken twice, while the program runs and again once it is frozen. What is dear to
find out (content of files, who else holds a pipe, smaps) is remembered in between.
"""

from __future__ import annotations

import errno
import functools
import os
import stat as stat_module
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from godwit.engine import freeze, openfiles
from godwit.errors import NoProcessError
from godwit.procfs import holders, maps, stat, status, tasks
from godwit.procfs.holders import MEMFD
from godwit.procfs.maps import DELETED, Mapping
from godwit.procfs.stat import TaskStat
from godwit.procfs.status import TaskStatus
from godwit.resources import pathfile, regular
from godwit.resources.base import OpenFile
from godwit.resources.memory import VmaEntry
from godwit.resources.objects import ObjectKind
from godwit.resources.pathfile import PathFileEntry
from godwit.tracee.gadgets import Gadgets
from godwit.types import Fd, OwnedFd, Pid, Tid

Result = TypeVar("Result")
_LOOKS = 20
# EIO: memory of an address space that an exec has replaced.
_VANISHED = (errno.ENOENT, errno.ESRCH, errno.EBADF, errno.EIO)
_TRACKED = "uw"  # of VmFlags: userfaultfd write protection
_SHARED_ANONYMOUS = "/dev/zero (deleted)"


class MappingsChangedError(Exception):
    """A look would take long: mappings have changed since the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessView:
    """One process as /proc shows it."""

    pid: Pid
    stat: TaskStat
    status: TaskStatus
    tids: tuple[Tid, ...]  # leader first
    mappings: tuple[Mapping, ...]
    links: dict[Fd, str]

    @property
    def zombie(self) -> bool:
        """It has ended and waits to be reaped."""
        return self.stat.state in "ZX" and len(self.tids) == 1

    @property
    def leaderless(self) -> bool:
        """Its first thread has ended, and others live on."""
        return self.stat.state in "ZX" and len(self.tids) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryObject:
    """A memory object found through a descriptor or a mapping."""

    object_id: int
    kind: ObjectKind
    name: bytes
    proc_path: str  # opening this leads to it
    key: tuple[int, int]  # device, inode


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSpace:
    """An address space as it was described once, good for as long as its mappings stay."""

    mappings: tuple[Mapping, ...]
    vmas: tuple[VmaEntry, ...]  # `file` indexes `files`
    files: tuple[PathFileEntry, ...]
    vdso: bytes
    gadgets: Gadgets | None  # for calls made inside; None without a vdso


@dataclass(slots=True)
class Memory:
    """What one look leaves for the next of the same move."""

    smaps: dict[Pid, tuple[Mapping, ...]] = field(default_factory=dict[Pid, tuple[Mapping, ...]])
    path_files: dict[tuple[object, ...], PathFileEntry] = field(
        default_factory=dict[tuple[object, ...], PathFileEntry]
    )
    spaces: dict[Pid, KnownSpace] = field(default_factory=dict[Pid, KnownSpace])
    outside: dict[str, tuple[tuple[Pid, Fd], ...]] | None = None
    neighbours: frozenset[Pid] = frozenset()  # processes that are known to share nothing with the tree
    # (device, inode) of files brought along.
    carried: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])
    # By (device, inode): a memory object keeps its number from look to look.
    object_ids: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    tracked: bool = False  # writes are noted, by us
    may_walk: bool = True  # smaps may be read: it takes 27 ms for a GiB
    closes_connections: bool = False  # TCP connections may break
    movers: frozenset[Pid] = frozenset()  # who holds duplicates only for the sake of the move


def of_mover(*, closes_connections: bool) -> Memory:
    """Return a new memory for the process that carries out a move."""
    return Memory(closes_connections=closes_connections, movers=frozenset({Pid(os.getpid())}))


class TreeView:
    """A process tree and its open files. Satisfies `resources.base.Tree`."""

    def __init__(self, processes: Sequence[ProcessView], memory: Memory) -> None:
        self.processes = tuple(processes)
        self.memory = memory
        self._pids = frozenset(process.pid for process in processes)
        self._files = openfiles.group(processes)
        self._by_slot = {holder: file for file in self._files for holder in file.holders}
        self.objects = _memory_objects(self)

    @property
    def root(self) -> ProcessView:
        """The process that the user named."""
        return self.processes[0]

    @property
    def private_bytes(self) -> int:
        """How much memory its processes have of their own, about: as smaps said when it was read."""
        return sum(
            mapping.anonymous_bytes + mapping.swap_bytes
            for process in self.processes
            for mapping in process.mappings
        )

    @property
    def files(self) -> Sequence[OpenFile]:
        """All open files of the tree."""
        return self._files

    @property
    def pids(self) -> frozenset[Pid]:
        """All processes of the tree, in the caller's pid namespace."""
        return self._pids

    @functools.cached_property
    def inner(self) -> dict[int, int]:
        """Our id of each process and thread of the tree to the tree's own."""
        known: dict[int, int] = {}
        for process in self.processes:
            known[process.pid] = process.status.nspid[-1]
            if len(process.status.nspid) == 1:
                known.update((tid, tid) for tid in process.tids)
            else:
                for tid in process.tids[1:]:
                    known[tid] = status.read_inner(process.pid, tid)
        return known

    @property
    def inner_groups(self) -> dict[int, int]:
        """Our number of each process group of the tree to the tree's own."""
        return {process.stat.pgrp: process.status.nspgid[-1] for process in self.processes}

    @property
    def closes_connections(self) -> bool:
        """The user allows TCP connections to break: the program finds them reset."""
        return self.memory.closes_connections

    def file_at(self, pid: Pid, fd: Fd) -> OpenFile | None:
        """Return what a process of the tree has open under a number."""
        return self._by_slot.get((pid, fd))

    def outside_holders(self, inode_link: str) -> Sequence[tuple[Pid, Fd]]:
        """Return who, not being of the tree, has something open whose link reads `inode_link`."""
        if self.memory.outside is None:
            self.memory.outside = holders.list_nameless(self._pids | self.memory.movers)
        slots = self.memory.outside.get(inode_link, ())
        return [(pid, fd) for pid, fd in slots if holders.is_outsider(pid, self._pids)]

    def memory_object_id(self, device: int, inode: int) -> int:
        """Return the number of the memory object that is this file's content. KeyError: none is."""
        return self.objects[device, inode].object_id

    def has_object(self, device: int, inode: int) -> bool:
        """Tell whether this file's content goes along as a memory object."""
        return (device, inode) in self.objects

    def object_of(self, pid: Pid, mapping: Mapping) -> MemoryObject | None:
        """Return the memory object that a mapping maps, if any."""
        carried = bool(self.memory.carried and mapping.shared and mapping.inode)
        if not carried and object_kind(mapping) is None:
            return None
        found = os.stat(map_file(pid, mapping))
        return self.objects.get((found.st_dev, found.st_ino))

    def gadgets_of(self, process: ProcessView) -> Gadgets | None:
        """Return what was found for making calls inside, if the mappings are still those."""
        known = self.memory.spaces.get(process.pid)
        return known.gadgets if known is not None and known.mappings is process.mappings else None

    def path_file(self, proc_path: str, path: bytes, *, content: bool) -> PathFileEntry:
        """Describe a file with a name, reached through a link in /proc; answers are remembered."""
        found = os.stat(proc_path)
        regular_file = stat_module.S_ISREG(found.st_mode)
        content = content and regular_file
        key = (path, content, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        entry = self.memory.path_files.get(key)
        if entry is None:
            flags = os.O_RDONLY | os.O_NOCTTY if content else os.O_PATH
            with OwnedFd(os.open(proc_path, flags | os.O_CLOEXEC)) as fd:
                entry = pathfile.describe(fd.number, path, content=content, root=_root_of(proc_path))
            self.memory.path_files[key] = entry
        return entry


def _root_of(proc_path: str) -> str:
    """Return where, in our view, the paths of the process begin whose link this is."""
    _, proc, pid, *_ = proc_path.split("/")
    root = f"/{proc}/{pid}/root"
    # In a changed root, the paths that links show do not begin there.
    return root if os.readlink(root) == "/" else ""


def settled(root: Pid, memory: Memory, and_then: Callable[[TreeView], Result]) -> tuple[TreeView, Result]:
    """Look at a running tree and derive something from what was seen, before it changes.

    A process, thread or descriptor that goes away in between makes both begin again. A tree that changes all
    the time is stopped for the length of one look.

    Raises:
        NoProcessError: The root is gone.
        BusyError: It cannot be stopped either.
    """
    for _ in range(_LOOKS):
        try:
            tree = look(root, memory)
            return tree, and_then(tree)
        except OSError as vanished:
            if vanished.errno not in _VANISHED:
                raise
            memory.outside = None
    with freeze.frozen(root):
        tree = look(root, memory)
        return tree, and_then(tree)


def look(root: Pid, memory: Memory) -> TreeView:
    """Look at a process and all its descendants.

    Raises:
        NoProcessError: The root is gone.
        FileNotFoundError, ProcessLookupError: Part of it went away meanwhile.
    """
    processes: list[ProcessView] = []
    waiting = [root]
    while waiting:
        pid = waiting.pop(0)
        try:
            process = _look_at(pid, memory)
            children = () if process.zombie else tasks.children(pid)
        except ProcessLookupError:
            if pid == root:
                raise NoProcessError(f"there is no process {root}", remedy="look it up with ps") from None
            continue
        processes.append(process)
        waiting += children
    return TreeView(processes, memory)


def _look_at(pid: Pid, memory: Memory) -> ProcessView:
    task_stat = stat.read(pid)
    tids = tasks.list_tids(pid)
    if task_stat.state in "ZX":
        # The kernel shows nothing more by the id of a thread that has ended, even of a living process.
        return ProcessView(
            pid=pid, stat=task_stat, status=status.read(pid), tids=tids or (Tid(pid),), mappings=(), links={}
        )
    found = status.read(pid)
    return ProcessView(
        pid=pid,
        stat=task_stat,
        status=found,
        tids=(Tid(pid), *sorted(tid for tid in tids if tid != Tid(pid))),
        mappings=_mappings(pid, memory, found.vm_lck_bytes),
        links=tasks.open_fds(pid),
    )


def _mappings(pid: Pid, memory: Memory, locked_bytes: int) -> tuple[Mapping, ...]:
    """Read the mappings with their flags, from the last reading where nothing has changed since."""
    known = memory.smaps.get(pid)
    if known is not None:
        now = maps.read_maps(pid)
        locked = sum(mapping.length_bytes for mapping in known if "lo" in mapping.flags)
        same = [_shape(mapping) for mapping in now] == [_shape(mapping) for mapping in known]
        if same and locked == locked_bytes:
            return known
        if not memory.may_walk:
            raise MappingsChangedError(f"pid {pid} has other mappings than a moment ago")
    found = maps.read_smaps(pid)
    if memory.tracked:
        # A range of the program's own userfaultfd would have been refused before we began.
        found = tuple(replace(mapping, flags=mapping.flags - {_TRACKED}) for mapping in found)
    memory.smaps[pid] = found
    return found


def _shape(mapping: Mapping) -> tuple[object, ...]:
    return (mapping.start, mapping.end, mapping.perms, mapping.offset, mapping.inode, mapping.path)


def _memory_objects(tree: TreeView) -> dict[tuple[int, int], MemoryObject]:
    found: dict[tuple[int, int], MemoryObject] = {}
    for kind, name, proc_path in (*_objects_of_files(tree), *_objects_of_mappings(tree)):
        status_ = os.stat(proc_path)
        key = (status_.st_dev, status_.st_ino)
        if key not in found:
            number = tree.memory.object_ids.setdefault(key, len(tree.memory.object_ids) + 1)
            found[key] = MemoryObject(
                object_id=number, kind=kind, name=os.fsencode(name), proc_path=proc_path, key=key
            )
    return found


def _objects_of_files(tree: TreeView) -> Iterator[tuple[ObjectKind, str, str]]:
    for file in tree.files:
        name = file.link.removesuffix(DELETED)
        if file.link.startswith(MEMFD):
            yield ObjectKind.MEMFD, name[len(MEMFD) :], file.proc_path()
        elif stat_module.S_ISREG(file.mode) and regular.claims(file) and regular.nameless(file):
            yield ObjectKind.DELETED_FILE, name, file.proc_path()
        elif (file.device, file.inode) in tree.memory.carried:
            yield ObjectKind.CARRIED_FILE, file.link, file.proc_path()


def _objects_of_mappings(tree: TreeView) -> Iterator[tuple[ObjectKind, str, str]]:
    carried = tree.memory.carried
    for process in tree.processes:
        for mapping in process.mappings:
            kind = object_kind(mapping)
            if kind is None and not (carried and mapping.shared and mapping.inode):
                continue
            path = map_file(process.pid, mapping)
            status_ = os.stat(path)
            if kind is None and (status_.st_dev, status_.st_ino) in carried:
                yield ObjectKind.CARRIED_FILE, mapping.path, path
            elif kind is ObjectKind.MEMFD:
                yield kind, mapping.path.removesuffix(DELETED)[len(MEMFD) :], path
            elif kind is ObjectKind.SHARED_ANONYMOUS or (kind and not status_.st_nlink):
                # A file really called "... (deleted)" has its name.
                yield kind, mapping.path.removesuffix(DELETED), path


def map_file(pid: Pid, mapping: Mapping) -> str:
    """Name the link in /proc that leads to a mapping's file."""
    return f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"


def object_kind(mapping: Mapping) -> ObjectKind | None:
    """Tell which kind of memory object a mapping maps, if any."""
    if not mapping.inode:
        return None
    if mapping.path.startswith(MEMFD):
        return ObjectKind.MEMFD
    if mapping.shared and (mapping.path == _SHARED_ANONYMOUS or mapping.path.startswith("[anon_shmem:")):
        return ObjectKind.SHARED_ANONYMOUS
    if mapping.path.startswith("/") and mapping.deleted and not mapping.path.startswith("/SYSV"):
        # To be looked at: a file may really be called so.
        return ObjectKind.DELETED_FILE
    return None
