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
from godwit.errors import BusyError, Refusal, RefusedError
from godwit.linux.statx import birth_ns
from godwit.procfs import maps, tasks
from godwit.procfs.holders import is_outsider
from godwit.resources.objects import ObjectKind
from godwit.types import OwnedFd, Pid

LIMIT_BYTES: Final = 256 << 20


@dataclass(slots=True)
class CarriedFile:
    """A file that goes along, and the way to its name here."""

    path: bytes
    device: int
    inode: int
    birth_ns: int
    directory: OwnedFd

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from every other file that there is at the same time."""
        return self.device, self.inode

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
    if not why:
        user = _other_user(tree, found)
        why = f"pid {user} uses it too" if user is not None else ""
    if why:
        raise _refusal(path, why)
    return CarriedFile(
        path=path,
        device=found.st_dev,
        inode=found.st_ino,
        birth_ns=_birth_ns(proc_path),
        directory=_directory_of(tree, path),
    )


def still(tree: TreeView, known: Iterable[CarriedFile]) -> list[CarriedFile]:
    """Return those that go along with the frozen tree, by the names that they have now; close the others.

    One that the program has closed meanwhile stays here, whatever became of it at the destination.

    Raises:
        RefusedError: One may not leave any more.
        BusyError: Another file has taken the place of one.
    """
    by_key = {file.key: file for file in known}
    kept: list[CarriedFile] = []
    for key, found in tree.objects.items():
        if found.kind is not ObjectKind.CARRIED_FILE:
            continue
        file = by_key.pop(key)
        kept.append(file)
        if file.birth_ns != _birth_ns(found.proc_path):
            raise BusyError(
                f"the program replaces its files all the time ({os.fsdecode(found.name)})",
                remedy="try again in a moment",
            )
        why = _obstacle(tree, found.name, os.stat(found.proc_path))
        if why:
            raise _refusal(found.name, why)
        if file.path != found.name:
            file.close()
            file.path, file.directory = found.name, _directory_of(tree, found.name)
    for file in by_key.values():
        file.close()
    return kept


def check_users(tree: TreeView, known: Iterable[CarriedFile]) -> None:
    """See that nobody else has begun to use one of the files meanwhile. Raises RefusedError."""
    for file in known:
        found = tree.objects.get(file.key)
        if found is None or found.kind is not ObjectKind.CARRIED_FILE:
            continue
        user = _other_user(tree, os.stat(found.proc_path))
        if user is not None:
            raise _refusal(found.name, f"pid {user} uses it too")


def _refusal(path: bytes, why: str) -> RefusedError:
    return RefusedError(
        [
            Refusal(
                what="written file",
                where=os.fsdecode(path),
                why=f"not at the destination, and cannot be brought along: {why}",
                remedy="put it on a directory that both machines share",
            )
        ]
    )


def _birth_ns(proc_path: str) -> int:
    with OwnedFd(os.open(proc_path, os.O_PATH | os.O_CLOEXEC)) as fd:
        return birth_ns(fd.number)


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
    return ""


def _is_where_it_says(tree: TreeView, path: bytes, found: os.stat_result) -> bool:
    """Tell whether the program's own root has the file under its name: it may have got it from elsewhere."""
    try:
        with _directory_of(tree, path) as directory:
            here = os.stat(os.path.basename(path), dir_fd=directory.number, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(here, found)


def _other_user(tree: TreeView, found: os.stat_result) -> Pid | None:
    """Return a process outside the tree that has the file open or mapped, by whatever name."""
    for pid in tasks.list_pids():
        if pid in tree.pids or pid in tree.memory.movers:
            continue
        with contextlib.suppress(OSError, ValueError):
            if _uses(pid, found) and is_outsider(pid, tree.pids):
                return pid
    return None


def _uses(pid: Pid, found: os.stat_result) -> bool:
    for fd, link in tasks.open_fds(pid).items():
        with contextlib.suppress(FileNotFoundError):
            if link.startswith("/") and os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), found):
                return True
    for mapping in maps.read_maps(pid):
        if mapping.shared and mapping.inode == found.st_ino:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(map_file(pid, mapping)), found):
                    return True
    return False
