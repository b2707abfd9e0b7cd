"""What processes outside a tree share with it."""

from __future__ import annotations

import contextlib
import os

from godwit.engine.view import TreeView, map_file
from godwit.linux import kcmp
from godwit.procfs import maps, tasks
from godwit.procfs.holders import is_outsider
from godwit.resources.base import OpenFile
from godwit.types import Fd, Pid


def shared_outside(tree: TreeView, file: OpenFile) -> Pid | None:
    """Return a process outside the tree that has the same open file, where that matters; or None.

    An anonymous inode is one object for all who have it, a memfd or a file without a name one memory. Of a
    file with a name only the offset would be shared, as after a fork; that tie is given up.
    """
    if not file.link.startswith("anon_inode:") and not tree.has_object(file.device, file.inode):
        return None
    for pid, fd in tree.outside_holders(file.link):
        with contextlib.suppress(OSError):
            if _is_same(file, pid, fd):
                return pid
    return None


def _is_same(file: OpenFile, pid: Pid, fd: Fd) -> bool:
    if file.link.startswith("anon_inode:"):
        return kcmp.same_file(*file.holders[0], pid, fd)
    other = os.stat(f"/proc/{pid}/fd/{fd}")
    return (other.st_dev, other.st_ino) == (file.device, file.inode)


def mapped_outside(tree: TreeView) -> tuple[Pid, bytes] | None:
    """Return a process outside the tree that maps one of its memory objects, and the object's name."""
    if not tree.objects:
        return None
    for pid in tasks.list_pids():
        if pid in tree.pids or pid in tree.memory.movers:
            continue
        with contextlib.suppress(OSError, ValueError):
            name = _mapped_by(tree, pid)
            if name is not None and is_outsider(pid, tree.pids):
                return pid, name
    return None


def _mapped_by(tree: TreeView, pid: Pid) -> bytes | None:
    """Return the name of an object of the tree that a process maps, and would see change; or None."""
    inodes = {inode for _, inode in tree.objects}
    for mapping in maps.read_maps(pid):
        if not mapping.shared or mapping.inode not in inodes:
            continue
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(map_file(pid, mapping))
            found = tree.objects.get((status.st_dev, status.st_ino))
            if found is not None:
                return found.name
    return None


def newcomer(tree: TreeView) -> tuple[Pid, str] | None:
    """Return a process outside the tree, born since one was last looked for, that shares something with it.

    A process of the tree may have left it: who has lost his parent has another. Whoever shares nothing is
    not looked at again.
    """
    now = frozenset(tasks.list_pids())
    before = tree.memory.neighbours
    for pid in now - before - tree.pids - tree.memory.movers:
        with contextlib.suppress(OSError, ValueError):
            shared = _shared_with(tree, pid)
            if shared and is_outsider(pid, tree.pids):
                return pid, shared
    tree.memory.neighbours = now
    return None


def _shared_with(tree: TreeView, pid: Pid) -> str:
    """Say what a process shares with the tree; empty: nothing that matters."""
    theirs = tasks.open_fds(pid)
    links = set(theirs.values())
    for file in tree.files:
        if file.link not in links:
            continue
        if file.link.startswith(("pipe:", "socket:")):
            return file.link
        if not file.link.startswith("anon_inode:") and not tree.has_object(file.device, file.inode):
            continue
        if any(link == file.link and _is_same(file, pid, fd) for fd, link in theirs.items()):
            return file.link
    name = _mapped_by(tree, pid) if tree.objects else None
    return os.fsdecode(name) if name is not None else ""
