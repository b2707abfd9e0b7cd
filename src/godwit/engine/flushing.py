"""What a program has written to a file that the destination reads over another client: sent there in time.

A client of a network file system keeps what was written until the file is closed or flushed ("close-to-open",
nfs(5)), and the copy here is closed only when the one elsewhere reads already. What came late would also
write over what has been written there since.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from godwit.engine.view import TreeView, map_file
from godwit.linux import statfs
from godwit.types import OwnedFd


def flush_shared(tree: TreeView) -> None:
    """Flush what the tree writes to on file systems of several machines: fsync(2), for mappings as well.

    To be done while the program runs, which makes the second time, when it stands still, short.

    Raises:
        OSError: It could not be written: the file system is full, or its server is gone.
    """
    several: dict[int, bool] = {}
    done: set[tuple[int, int]] = set()
    for path, device, inode in _written(tree):
        if (device, inode) in done:
            continue
        done.add((device, inode))
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # closed meanwhile, and so flushed
            if device not in several:
                several[device] = _of_several_machines(path)
            if several[device]:
                with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)) as fd:
                    os.fsync(fd.number)


def _written(tree: TreeView) -> Iterator[tuple[str, int, int]]:
    """Yield a way to each file with a name that may have been written, its device and inode."""
    for file in tree.files:
        writes = file.info.flags & os.O_ACCMODE != os.O_RDONLY and not file.info.flags & os.O_PATH
        if writes and stat.S_ISREG(file.mode) and not tree.has_object(file.device, file.inode):
            yield file.proc_path(), file.device, file.inode
    for process in tree.processes:
        for mapping in process.mappings:
            if not (mapping.shared and mapping.inode and "mw" in mapping.flags):
                continue
            path = map_file(process.pid, mapping)
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found = os.stat(path)
                if stat.S_ISREG(found.st_mode) and not tree.has_object(found.st_dev, found.st_ino):
                    yield path, found.st_dev, found.st_ino


def _of_several_machines(path: str) -> bool:
    with OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC)) as fd:
        return statfs.may_be_shared(statfs.file_system(fd.number)[0])
