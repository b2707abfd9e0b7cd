"""What processes outside a tree share with it."""

from __future__ import annotations

import contextlib
import os

from godwit.engine.view import TreeView, object_kind
from godwit.linux import kcmp
from godwit.procfs import maps, tasks
from godwit.procfs.holders import MEMFD, is_outsider
from godwit.resources.base import OpenFile
from godwit.resources.objects import ObjectKind
from godwit.types import Pid


def shared_outside(tree: TreeView, file: OpenFile) -> Pid | None:
    """Return a process outside the tree that has the same open file, where that matters; or None.

    An anonymous inode is one object for all who have it, a memfd one memory. Of a file with a name
    only the offset would be shared, as after a fork; that tie is given up.
    """
    memfd = file.link.startswith(MEMFD)
    if not memfd and not file.link.startswith("anon_inode:"):
        return None
    for pid, fd in tree.outside_holders(file.link):
        with contextlib.suppress(OSError):
            if memfd:
                other = os.stat(f"/proc/{pid}/fd/{fd}")
                if (other.st_dev, other.st_ino) == (file.device, file.inode):
                    return pid
            elif kcmp.same_file(*file.holders[0], pid, fd):
                return pid
    return None


def mapped_outside(tree: TreeView) -> tuple[Pid, bytes] | None:
    """Return a process outside the tree that maps one of its memory objects, and the object's name."""
    wanted = {
        inode: found.name
        for (_, inode), found in tree.objects.items()
        if found.kind in (ObjectKind.MEMFD, ObjectKind.SHARED_ANONYMOUS)
    }
    if not wanted:
        return None
    for pid in tasks.list_pids():
        if pid in tree.pids or pid in tree.memory.movers:
            continue
        with contextlib.suppress(OSError, ValueError):
            for mapping in maps.read_maps(pid):
                found = mapping.inode in wanted and object_kind(mapping) is not None
                if found and is_outsider(pid, tree.pids):
                    return pid, wanted[mapping.inode]
    return None
