"""The name of a fifo: fifo(7). Its ends and its content are those of any pipe."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from dataclasses import dataclass

from godwit.errors import DestinationError, ImageError
from godwit.procfs.maps import DELETED
from godwit.resources.base import OpenFile
from godwit.resources.roots import OURS, Root
from godwit.types import OwnedFd


@dataclass(frozen=True, slots=True, kw_only=True)
class Fifo:
    """A fifo's name in an image."""

    path: bytes
    deleted: bool  # nobody can open it by its name any more
    mode: int  # permission bits, for a destination that has no such fifo
    uid: int
    gid: int


def collect(file: OpenFile) -> Fifo:
    """Note the name."""
    state = os.stat(file.proc_path())
    return Fifo(
        path=os.fsencode(file.link.removesuffix(DELETED) if state.st_nlink == 0 else file.link),
        deleted=state.st_nlink == 0,
        mode=stat.S_IMODE(state.st_mode),
        uid=state.st_uid,
        gid=state.st_gid,
    )


def open_both_ends(fifo: Fifo, root: Root = OURS) -> tuple[OwnedFd, OwnedFd]:
    """Open the fifo of that name, made if it is not there, for reading and for writing.

    Raises:
        DestinationError: Something else has its name, or its directory is missing.
    """
    if not os.path.isabs(fifo.path) or b"\0" in fifo.path:
        raise ImageError(f"a fifo has the impossible name {os.fsdecode(fifo.path)!r}")
    if fifo.deleted:
        with tempfile.TemporaryDirectory(prefix="godwit-fifo-") as directory:
            path = os.path.join(os.fsencode(directory), os.path.basename(fifo.path) or b"fifo")
            _make(fifo, path)
            return _open(path, OURS)
    try:
        if not root.at_home:
            with contextlib.suppress(FileExistsError):
                _make(fifo, fifo.path)
        return _open(fifo.path, root)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise DestinationError(
            f"cannot open the fifo {os.fsdecode(fifo.path)}: {error.strerror}",
            remedy="make its directory at the destination, or share it",
        ) from error


def _make(fifo: Fifo, path: bytes) -> None:
    os.mkfifo(path, stat.S_IMODE(fifo.mode))
    # mkfifo(2) obeys the umask.
    os.chmod(path, stat.S_IMODE(fifo.mode))
    os.chown(path, fifo.uid, fifo.gid)


def _open(path: bytes, root: Root) -> tuple[OwnedFd, OwnedFd]:
    # Looked at before it is opened: opening a device or a terminal can already do something.
    with root.open(path, os.O_PATH | os.O_NOFOLLOW) as found:
        if not stat.S_ISFIFO(os.fstat(found.number).st_mode):
            raise DestinationError(
                f"{os.fsdecode(path)} is no fifo at the destination", remedy="move that file out of the way"
            )
        name = f"/proc/self/fd/{found.number}"
        with OwnedFd(os.open(name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)) as writer:
            reader = OwnedFd(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            return reader, writer.release()
