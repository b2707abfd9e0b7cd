"""Memory that several may map, and files without a name: carried whole, by content.

A memory object is a memfd, a shared anonymous mapping (which the kernel keeps as a file of its own),
a file whose last name was removed, or a file that only the program uses and the destination lacks.
Descriptors and mappings refer to it by its number; at the destination it is made first, filled from page
frames, and then opened and mapped as often as needed.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from godwit.errors import DestinationError
from godwit.linux import abi, mman
from godwit.resources.roots import OURS, Root
from godwit.types import PAGE_SIZE, Fd, OwnedFd, page_ceil, page_floor

F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
_SEAL_EXEC: Final = 0x20
_MFD_CLOEXEC: Final = 1
_MFD_ALLOW_SEALING: Final = 2
_F_SEAL_SEAL: Final = 1
_PUNCH_HOLE: Final = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZEROES: Final = bytes(1 << 16)


class ObjectKind(enum.StrEnum):
    """What the kernel calls it."""

    MEMFD = "memfd"
    SHARED_ANONYMOUS = "shared anonymous memory"
    DELETED_FILE = "deleted file"
    CARRIED_FILE = "file brought along"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectEntry:
    """A memory object. Its content travels in page frames."""

    object_id: int
    kind: ObjectKind
    name: bytes  # of a memfd; the last path of a deleted file
    size_bytes: int
    mode: int
    uid: int
    gid: int
    seals: int = 0


def collect(object_id: int, kind: ObjectKind, name: bytes, fd: Fd) -> ObjectEntry:
    """Describe the object behind a descriptor."""
    status = os.fstat(fd)
    return ObjectEntry(
        object_id=object_id,
        kind=kind,
        name=name,
        size_bytes=status.st_size,
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        seals=fcntl.fcntl(fd, F_GET_SEALS) if kind is ObjectKind.MEMFD else 0,
    )


def data_runs(fd: Fd, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) runs of whole pages that hold data, by SEEK_DATA; holes are left out."""
    at, last = 0, 0
    while at < size_bytes:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= size_bytes:
            return  # It has grown since its size was taken.
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)
        # File systems with smaller blocks may have two runs in one page.
        first, beyond = max(last, page_floor(start)), page_ceil(end)
        if first < beyond:
            yield first, beyond
        at, last = max(end, start + 1), beyond


def restore(entry: ObjectEntry, root: Root = OURS) -> OwnedFd:
    """Make the object, of full size and still empty, open for reading and writing.

    A name begins at `root`; one of a file brought along, at ours.

    Raises:
        DestinationError: There is no room, or no directory for a deleted file.
    """
    try:
        fd = _make(entry, root)
        with contextlib.ExitStack() as guard:
            guard.enter_context(fd)
            os.ftruncate(fd.number, entry.size_bytes)
            _set_attributes(entry, fd.number)
            return fd.release()
    except OSError as error:
        raise DestinationError(
            f"cannot make {entry.kind.value} {os.fsdecode(entry.name)!r} of {entry.size_bytes} bytes:"
            f" {error.strerror}",
            remedy="make room at the destination, or choose another machine",
        ) from error


def resizable(before: ObjectEntry, now: ObjectEntry) -> bool:
    """Tell whether two entries of one id are of the same object, of whatever size."""
    return (before.kind, before.name) == (now.kind, now.name)


def resized(before: ObjectEntry, now: ObjectEntry, fd: Fd) -> bool:
    """Bring an object to another size and mode, if it still is the same; tell whether that was done."""
    if not resizable(before, now):
        return False
    if before == now:
        return True
    os.ftruncate(fd, now.size_bytes)
    _set_attributes(now, fd)
    return True


def punch_hole(fd: Fd, start: int, length: int) -> None:
    """Give up a stretch of the object's content: it reads as zeroes. fallocate(2)."""
    abi.syscall("fallocate", fd, _PUNCH_HOLE, start, length)


def write(fd: Fd, data: memoryview, start: int) -> None:
    """Write all of the data. A full disk takes a part of it without a word; the next call raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], start + done)


def write_zeroes(fd: Fd, start: int, length: int) -> None:
    """Write zeroes, as data and not as a hole. Raises OSError."""
    for at in range(start, start + length, len(_ZEROES)):
        write(fd, memoryview(_ZEROES)[: start + length - at], at)


def _set_attributes(entry: ObjectEntry, fd: Fd) -> None:
    if entry.kind is not ObjectKind.SHARED_ANONYMOUS:
        os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, entry.mode & 0o7777)


def seal(entry: ObjectEntry, fd: Fd) -> None:
    """Seal a memfd as it was. After its content came, and before the program may use it."""
    if entry.kind is ObjectKind.MEMFD and entry.seals & ~fcntl.fcntl(fd, F_GET_SEALS):
        fcntl.fcntl(fd, F_ADD_SEALS, entry.seals)


def _make(entry: ObjectEntry, root: Root) -> OwnedFd:
    match entry.kind:
        case ObjectKind.MEMFD:
            # A memfd made without MFD_ALLOW_SEALING carries F_SEAL_SEAL alone.
            sealing = 0 if entry.seals == _F_SEAL_SEAL else _MFD_ALLOW_SEALING
            return OwnedFd(os.memfd_create(os.fsdecode(entry.name), _MFD_CLOEXEC | sealing))
        case ObjectKind.SHARED_ANONYMOUS:
            return _shared_anonymous(entry.size_bytes)
        case ObjectKind.DELETED_FILE:
            return _nameless(entry, root)
        case ObjectKind.CARRIED_FILE:
            return _named(entry)


def _shared_anonymous(size_bytes: int) -> OwnedFd:
    # The file behind such a mapping has no name; the mapping's entry in /proc leads to it.
    length = max(page_ceil(size_bytes), PAGE_SIZE)
    with mmap.mmap(-1, length, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as mapping:
        start = mman.mapping_address(mapping)
        path = f"/proc/self/map_files/{start:x}-{start + length:x}"
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))


def _nameless(entry: ObjectEntry, root: Root) -> OwnedFd:
    with root.open(os.path.dirname(entry.name), os.O_PATH | os.O_DIRECTORY) as directory:
        try:
            path = f"/proc/self/fd/{directory.number}"
            return OwnedFd(os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
        name = ".godwit-" + secrets.token_hex(8)
        made = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = OwnedFd(os.open(name, made, 0o600, dir_fd=directory.number))
        os.unlink(name, dir_fd=directory.number)
        return fd


def _named(entry: ObjectEntry) -> OwnedFd:
    """Make a file brought along, where its owner might have made it.

    The path is walked without following links, and new directories are its owner's: we may be root, and
    he must not have us make a file where he could not.
    """
    *parts, name = [part for part in entry.name.split(b"/") if part]
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as walk:
        directory = walk.enter_context(OwnedFd(os.open(b"/", flags)))
        for part in parts:
            try:
                below = os.open(part, flags, dir_fd=directory.number)
            except FileNotFoundError:
                _see_that_owner_may_write(entry, directory.number)
                os.mkdir(part, 0o755, dir_fd=directory.number)
                below = os.open(part, flags, dir_fd=directory.number)
                os.chown(f"/proc/self/fd/{below}", entry.uid, entry.gid)
            directory = walk.enter_context(OwnedFd(below))
        _see_that_owner_may_write(entry, directory.number)
        made = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return OwnedFd(os.open(name, made, 0o600, dir_fd=directory.number))


def _see_that_owner_may_write(entry: ObjectEntry, directory: Fd) -> None:
    found = os.fstat(directory)
    everybody = found.st_mode & stat.S_IWOTH
    his = found.st_uid == entry.uid and found.st_mode & stat.S_IWUSR
    if entry.uid and not everybody and not his:
        raise PermissionError(errno.EACCES, "its owner may not make files there")


def discard(entry: ObjectEntry, fd: OwnedFd) -> None:
    """Undo `restore`: a file brought along loses its name again."""
    with fd:
        if entry.kind is not ObjectKind.CARRIED_FILE:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(entry.name), os.fstat(fd.number)):
                os.unlink(entry.name)


def reopen(fd: Fd, flags: int) -> OwnedFd:
    """Open the object once more: a description of its own, with `flags`."""
    # The way there is a link, which O_NOFOLLOW would refuse.
    return OwnedFd(os.open(f"/proc/self/fd/{fd}", flags & ~os.O_NOFOLLOW | os.O_CLOEXEC))
