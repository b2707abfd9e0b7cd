"""The mappings of a process as entries, and the files that it knows by path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from godwit.engine.view import KnownSpace, ProcessView, TreeView, map_file
from godwit.errors import Refusal, RefusedError
from godwit.linux import mem
from godwit.procfs import maps
from godwit.resources import memory, sleepnotes
from godwit.resources.memory import VmaEntry
from godwit.resources.pathfile import PathFileEntry
from godwit.tracee import gadgets
from godwit.types import PAGE_SIZE, OwnedFd, Pid


class PathTable:
    """The image's table of files known by path."""

    def __init__(self, view: TreeView) -> None:
        self._view = view
        self._index: dict[PathFileEntry, int] = {}

    def index(self, proc_path: str, path: bytes, *, content: bool) -> int:
        """Return the place of the file that a link in /proc leads to."""
        return self.place(self._view.path_file(proc_path, path, content=content))

    def place(self, entry: PathFileEntry) -> int:
        """Return the place of a file, a new one at the end if it had none."""
        return self._index.setdefault(entry, len(self._index))

    def entries(self) -> tuple[PathFileEntry, ...]:
        """Return the table."""
        return tuple(self._index)


def sleep_notes(process: ProcessView) -> Mapping[int, sleepnotes.Note]:
    """Read what a restore noted about the sleeps of the process, by thread."""
    notes: dict[int, sleepnotes.Note] = {}
    for mapping in note_mappings(process):
        with mem.open_memory(process.pid) as memory_fd:
            content = os.pread(memory_fd.number, mapping.length_bytes, mapping.start)
        notes |= sleepnotes.parse(content) or {}
    return notes


def note_mappings(process: ProcessView) -> list[maps.Mapping]:
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


def links(pid: Pid, paths: PathTable) -> tuple[int, int, int]:
    """Index what /proc/PID/exe, cwd and root lead to; -1 for the root of the mount namespace."""
    exe = _link(pid, "exe", paths, content=True)
    cwd = _link(pid, "cwd", paths, content=False)
    if os.readlink(f"/proc/{pid}/root") == "/":
        return exe, cwd, -1
    return exe, cwd, _link(pid, "root", paths, content=False)


def _link(pid: Pid, name: str, paths: PathTable, *, content: bool) -> int:
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
    if not target.endswith(maps.DELETED) or os.stat(proc_path).st_nlink > 0:
        return None
    return Refusal(
        what=f"{name} {target}",
        where=f"pid {pid}",
        why="it was removed while the program uses it",
        remedy="put it back, or restart the program from its new version",
    )


def vmas_of(
    process: ProcessView, paths: PathTable, view: TreeView, memory_fd: OwnedFd
) -> tuple[tuple[VmaEntry, ...], bytes]:
    """Describe the mappings; what was described before is taken from memory while it stays the same."""
    known = view.memory.spaces.get(process.pid)
    if known is None or known.mappings is not process.mappings:
        known = _describe_space(process, view, memory_fd)
        view.memory.spaces[process.pid] = known
    places = [paths.place(entry) for entry in known.files]
    vmas = tuple(vma if vma.file < 0 else replace(vma, file=places[vma.file]) for vma in known.vmas)
    return vmas, known.vdso


def _describe_space(process: ProcessView, view: TreeView, memory_fd: OwnedFd) -> KnownSpace:
    vmas: list[VmaEntry] = []
    files: dict[PathFileEntry, int] = {}
    vdso = b""
    ours = {mapping.start for mapping in note_mappings(process)}
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
    return KnownSpace(
        mappings=process.mappings,
        vmas=tuple(vmas),
        files=tuple(files),
        vdso=vdso,
        gadgets=gadgets.find(process.mappings, memory_fd, vdso),
    )


def _written(mapping: maps.Mapping) -> bool:
    return mapping.shared and "mw" in mapping.flags
