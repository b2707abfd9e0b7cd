"""Files known by their path: programs, libraries, working directories, open files.

At the destination the path must lead to the same file (a shared file system: same inode number and
birth) or, where the process only reads, to an equal one (same size, and same build id or content).
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from dataclasses import dataclass
from typing import Final

import xxhash

from godwit.errors import Refusal, RefusedError
from godwit.linux import elf, statfs
from godwit.linux.statx import birth_ns
from godwit.resources.roots import OURS, Root
from godwit.types import Fd, OwnedFd

_HEAD_BYTES: Final = 4096
_HASH_CHUNK_BYTES: Final = 1 << 20
_HASH_LIMIT_BYTES: Final = 256 << 20
_HOME_INODE_BITS: Final = (1 << 48) - 1  # above them stands which of home's file systems it is


@dataclass(frozen=True, slots=True, kw_only=True)
class PathFileEntry:
    """A file as the source saw it."""

    path: bytes  # absolute, from the root of the process's mount namespace
    mode: int  # st_mode
    uid: int
    gid: int
    size_bytes: int
    mtime_ns: int
    inode: int
    birth_ns: int  # 0: unknown
    file_system: bytes = b""  # what tells it from any other, on this machine and elsewhere
    parent_inode: int = 0  # of the directory that holds the name; 0: unknown
    parent_birth_ns: int = 0
    parent_file_system: bytes = b""
    build_id: bytes = b""
    digest: bytes = b""  # xxh3_128 of the content; empty where too large or not read


def describe(fd: Fd, path: bytes, *, content: bool, root: str = "") -> PathFileEntry:
    """Describe an open file (an O_PATH descriptor does).

    Args:
        fd: Of the file. To note its content it must be readable.
        path: Its name, absolute.
        content: Note what tells equal files; nothing is noted of other than regular files.
        root: Where, as we see it, the name begins.
    """
    status = os.fstat(fd)
    parent_inode, parent_birth_ns, parent_file_system = _parent(root, path)
    build_id, digest = b"", b""
    if content and stat.S_ISREG(status.st_mode):
        build_id = elf.build_id(os.pread(fd, _HEAD_BYTES, 0)) or b""
        if not build_id and status.st_size <= _HASH_LIMIT_BYTES:
            digest = _digest(fd)
    return PathFileEntry(
        path=path,
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        birth_ns=birth_ns(fd),
        file_system=_file_system(fd),
        parent_inode=parent_inode,
        parent_birth_ns=parent_birth_ns,
        parent_file_system=parent_file_system,
        build_id=build_id,
        digest=digest,
    )


def _file_system(fd: Fd) -> bytes:
    """Return what tells the file system of a file from all others.

    One that only a single machine can have mounted counts with that machine: those cloned from one image
    have file systems of equal id, and in them files of equal number and birth.
    """
    kind, ident = statfs.file_system(fd)
    machine = b"" if statfs.may_be_shared(kind) else _machine()
    return kind.to_bytes(8, "little", signed=True) + ident + machine


@functools.cache
def _machine() -> bytes:
    """Return what tells this machine from others: machine-id(5), or, where there is none, this boot of it."""
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            ident = file.read(64).strip()
            if ident:
                return ident
    return b""


def _parent(root: str, path: bytes) -> tuple[int, int, bytes]:
    """Identify the directory that holds the name; nothing where it cannot be reached."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        with OwnedFd(os.open(os.fsencode(root) + os.path.dirname(path), flags)) as fd:
            return os.fstat(fd.number).st_ino, birth_ns(fd.number), _file_system(fd.number)
    except OSError:
        return 0, 0, b""


def _in_shared_directory(entry: PathFileEntry) -> bool:
    """Tell whether the directory here is the very one that holds the name at the source.

    What is in its place by now is then no other machine's file, but what the program, still running,
    has made of it since: to be looked at again once it is frozen.
    """
    there = (entry.parent_inode, entry.parent_birth_ns, entry.parent_file_system)
    return bool(entry.parent_birth_ns) and _parent("", entry.path) == there


def _digest(fd: Fd) -> bytes:
    state = xxhash.xxh3_128()
    at = 0
    while chunk := os.pread(fd, _HASH_CHUNK_BYTES, at):
        state.update(chunk)
        at += len(chunk)
    return state.digest()


def same_file(entry: PathFileEntry, fd: Fd) -> bool:
    """Tell whether a file here is the very file described, seen through a shared file system."""
    status, born_ns = os.fstat(fd), birth_ns(fd)
    if status.st_ino != entry.inode or stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode):
        return False
    if _file_system(fd) != entry.file_system:
        return False
    if entry.birth_ns and born_ns:
        return entry.birth_ns == born_ns
    return status.st_size == entry.size_bytes and status.st_mtime_ns == entry.mtime_ns


def find(
    entry: PathFileEntry, *, written: bool, what: str, root: Root = OURS, running: bool = False
) -> Refusal | None:
    """Check that this machine has the file; return the refusal, or None.

    Args:
        entry: As the source saw it.
        written: The program writes to it: nothing but the very file will do.
        what: For the message: "mapped file", "open file".
        root: Where its name begins.
        running: The program still runs: a file in a directory that both share may change until the
            freeze, and is not refused now.
    """
    if running and not root.at_home and _in_shared_directory(entry):
        return None
    try:
        opened(entry, os.O_PATH, written=written, what=what, root=root).close()
    except RefusedError as error:
        return error.refusals[0]
    return None


def opened(entry: PathFileEntry, flags: int, *, written: bool, what: str, root: Root = OURS) -> OwnedFd:
    """Open the file that this machine has for an entry.

    The path is walked once, and what it leads to is checked before it is opened for good: we may be
    root, and the program's user may have put something else in its place meanwhile.

    Raises:
        RefusedError: It is not here, or is not the same.
    """
    name = os.fsdecode(entry.path)

    def refuse(why: str, remedy: str) -> RefusedError:
        return RefusedError([Refusal(what=what, where=name, why=why, remedy=remedy)])

    try:
        found = root.open(entry.path, os.O_PATH)
    except OSError as error:
        raise refuse(
            f"not at the destination ({error.strerror})",
            "put it on a directory that both machines share, or copy it to the same path there",
        ) from error
    with found:
        difference = _difference(entry, found.number, written=written, at_home=root.at_home)
        if difference is not None:
            raise refuse(*difference)
        if flags & os.O_PATH:
            return found.release()
        return OwnedFd(
            os.open(f"/proc/self/fd/{found.number}", flags & ~os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
        )


def _difference(entry: PathFileEntry, fd: Fd, *, written: bool, at_home: bool) -> tuple[str, str] | None:
    """Say how the file here differs from the entry, and what to do; None where it will do."""
    status = os.fstat(fd)
    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode):
        return "another type of file at the destination", "remove what stands in its place there"
    if same_file(entry, fd) or (at_home and not (status.st_ino ^ entry.inode) & _HOME_INODE_BITS):
        return None
    if written:
        return (
            "the program writes to it, and the destination has another file of that name",
            "put it on a directory that both machines share",
        )
    if not stat.S_ISREG(entry.mode):
        return _different_standing(entry, status)
    key = (entry, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _equal:
        difference = _different_content(entry, fd, status)
        if difference is not None:
            return difference
        _equal.add(key)
    return None


def _different_standing(entry: PathFileEntry, status: os.stat_result) -> tuple[str, str] | None:
    """A directory may have other content here, but must be open to the same users."""
    ours = (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
    if ours == (entry.uid, entry.gid, stat.S_IMODE(entry.mode)):
        return None
    return "it has another owner or mode at the destination", "give it the owner and mode that it has here"


def _different_content(entry: PathFileEntry, fd: Fd, status: os.stat_result) -> tuple[str, str] | None:
    same_version = "install the same version of it there"
    if status.st_size != entry.size_bytes:
        why = f"{entry.size_bytes} bytes long at the source, {status.st_size} at the destination"
        return why, same_version
    with OwnedFd(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)) as readable:
        if entry.build_id:
            here = elf.build_id(os.pread(readable.number, _HEAD_BYTES, 0)) or b""
            if here == entry.build_id:
                return None
            ids = (entry.build_id.hex(), here.hex() or "none")
            return f"build id {ids[0]} at the source, {ids[1]} at the destination", same_version
        if entry.digest:
            if _digest(readable.number) == entry.digest:
                return None
            return "its content differs at the destination", "copy it there unchanged"
    if status.st_mtime_ns == entry.mtime_ns and _different_standing(entry, status) is None:
        return None
    return (
        "too large to compare by content, and its date, owner or mode differs at the destination",
        "copy it there with all of them (cp --preserve)",
    )


# Files found equal once stay so while neither changes: content is not read again inside the freeze.
_equal: set[tuple[object, ...]] = set()
