"""Files brought along: written by the program alone, and unknown to the destination.

Their content goes along as a memory object, the file is made at the destination under the same name,
and once the move is committed its name at the source is removed: the file has moved.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from godwit.engine.view import TreeView, map_file
from godwit.errors import Refusal, RefusedError
from godwit.procfs import maps, tasks
from godwit.types import OwnedFd, Pid

LIMIT_BYTES: Final = 256 << 20


@dataclass(slots=True)
class CarriedFile:
    """A file that goes along, and the way to its name here."""

    path: bytes
    device: int
    inode: int
    directory: OwnedFd

    def remove(self) -> None:
        """Remove the name here, if it still is the file's."""
        name = os.path.basename(self.path)
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=self.directory.number, follow_symlinks=False)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.unlink(name, dir_fd=self.directory.number)

    def close(self) -> None:
        """Let go of the directory."""
        self.directory.close()


def choose(tree: TreeView, paths: Iterable[bytes]) -> list[CarriedFile]:
    """Find the files that the destination asks for, and see that they may leave.

    One that the program no longer has open is left out: a running program closes what it likes.

    Raises:
        RefusedError: One is used by others too, has other names, or is too large.
    """
    ways = {path: _way_to(tree, path) for path in paths}
    return [_choose(tree, path, way) for path, way in ways.items() if way is not None]


def _choose(tree: TreeView, path: bytes, proc_path: str) -> CarriedFile:
    found = os.stat(proc_path)
    why = _obstacle(tree, path, found)
    if why:
        raise RefusedError(
            [
                Refusal(
                    what="written file",
                    where=os.fsdecode(path),
                    why=f"not at the destination, and cannot be brought along: {why}",
                    remedy="put it on a directory that both machines share",
                )
            ]
        )
    return CarriedFile(
        path=path, device=found.st_dev, inode=found.st_ino, directory=_directory_of(tree, path)
    )


def _directory_of(tree: TreeView, path: bytes) -> OwnedFd:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    root = os.fsencode(f"/proc/{tree.root.pid}/root")
    return OwnedFd(os.open(root + os.path.dirname(path), flags))


def _way_to(tree: TreeView, path: bytes) -> str | None:
    name = os.fsdecode(path)
    for file in tree.files:
        if file.link == name:
            return file.proc_path()
    for process in tree.processes:
        for mapping in process.mappings:
            if mapping.path == name:
                return map_file(process.pid, mapping)
    return None


def _obstacle(tree: TreeView, path: bytes, found: os.stat_result) -> str:
    if not stat.S_ISREG(found.st_mode):
        return "it is no regular file"
    if found.st_nlink != 1:
        return f"it has {found.st_nlink} names"
    if found.st_size > LIMIT_BYTES:
        return f"it is {found.st_size >> 20} MiB long, and the limit is {LIMIT_BYTES >> 20}"
    if not _is_where_it_says(tree, path, found):
        return "its name leads elsewhere in the file system of the program"
    user = _other_user(tree, path, found)
    return f"pid {user} uses it too" if user is not None else ""


def _is_where_it_says(tree: TreeView, path: bytes, found: os.stat_result) -> bool:
    """Tell whether the program's own root has the file under its name: it may have got it from elsewhere."""
    try:
        with _directory_of(tree, path) as directory:
            here = os.stat(os.path.basename(path), dir_fd=directory.number, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(here, found)


def _other_user(tree: TreeView, path: bytes, found: os.stat_result) -> Pid | None:
    """Return a process outside the tree that has the file open or mapped."""
    name = os.fsdecode(path)
    for pid in tasks.list_pids():
        if pid in tree.pids or pid in tree.memory.movers:
            continue
        with contextlib.suppress(OSError, ValueError):
            for fd, link in tasks.open_fds(pid).items():
                if link == name and os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), found):
                    return pid
            if any(mapping.path == name and mapping.shared for mapping in maps.read_maps(pid)):
                return pid
    return None
