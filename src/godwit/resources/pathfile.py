"""Files known by their path: programs, libraries, working directories, open files.

At the destination the path must lead to the same file (a shared file system: same inode number and
birth) or, where the process only reads, to an equal one (same size, and same build id or content).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import xxhash

from godwit.errors import Refusal
from godwit.linux import elf
from godwit.linux.statx import birth_ns
from godwit.types import Fd, OwnedFd

_HEAD_BYTES: Final = 4096
_HASH_CHUNK_BYTES: Final = 1 << 20
_HASH_LIMIT_BYTES: Final = 256 << 20


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
    parent_inode: int = 0  # of the directory that holds the name; 0: unknown
    parent_birth_ns: int = 0
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
    parent_inode, parent_birth_ns = _parent(root, path)
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
        parent_inode=parent_inode,
        parent_birth_ns=parent_birth_ns,
        build_id=build_id,
        digest=digest,
    )


def _parent(root: str, path: bytes) -> tuple[int, int]:
    """Identify the directory that holds the name; zeroes where it cannot be reached."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        with OwnedFd(os.open(os.fsencode(root) + os.path.dirname(path), flags)) as fd:
            return os.fstat(fd.number).st_ino, birth_ns(fd.number)
    except OSError:
        return 0, 0


def _in_shared_directory(entry: PathFileEntry) -> bool:
    """Tell whether the directory here is the very one that holds the name at the source.

    What is in its place by now is then no other machine's file, but what the program, still running,
    has made of it since: to be looked at again once it is frozen.
    """
    here = _parent("", entry.path)
    return bool(entry.parent_birth_ns) and here == (entry.parent_inode, entry.parent_birth_ns)


def _digest(fd: Fd) -> bytes:
    state = xxhash.xxh3_128()
    at = 0
    while chunk := os.pread(fd, _HASH_CHUNK_BYTES, at):
        state.update(chunk)
        at += len(chunk)
    return state.digest()


def same_file(entry: PathFileEntry, status: os.stat_result, born_ns: int) -> bool:
    """Tell whether a file here is the very file described, seen through a shared file system."""
    if status.st_ino != entry.inode or stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode):
        return False
    if entry.birth_ns and born_ns:
        return entry.birth_ns == born_ns
    return status.st_size == entry.size_bytes and status.st_mtime_ns == entry.mtime_ns


def find(entry: PathFileEntry, *, written: bool, what: str, running: bool = False) -> Refusal | None:
    """Check that this machine has the file; return the refusal, or None.

    Args:
        entry: As the source saw it.
        written: The program writes to it: nothing but the very file will do.
        what: For the message: "mapped file", "open file".
        running: The program still runs: a file in a directory that both share may change until the
            freeze, and is not refused now.
    """
    if running and _in_shared_directory(entry):
        return None
    name = os.fsdecode(entry.path)

    def refuse(why: str, remedy: str) -> Refusal:
        return Refusal(what=what, where=name, why=why, remedy=remedy)

    try:
        fd = OwnedFd(os.open(entry.path, os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        return refuse(
            f"not at the destination ({error.strerror})",
            "put it on a directory that both machines share, or copy it to the same path there",
        )
    with fd:
        status, born = os.fstat(fd.number), birth_ns(fd.number)
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode):
            return refuse("another type of file at the destination", "remove what stands in its place there")
        if same_file(entry, status, born) or not stat.S_ISREG(entry.mode):
            return None
        if written:
            return refuse(
                "the program writes to it, and the destination has another file of that name",
                "put it on a directory that both machines share",
            )
        return _equal_content(entry, status, refuse_with=refuse)


def _equal_content(
    entry: PathFileEntry, status: os.stat_result, refuse_with: Callable[[str, str], Refusal]
) -> Refusal | None:
    if status.st_size != entry.size_bytes:
        return refuse_with(
            f"{entry.size_bytes} bytes long at the source, {status.st_size} at the destination",
            "install the same version of it there",
        )
    with OwnedFd(os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)) as readable:
        if entry.build_id:
            here = elf.build_id(os.pread(readable.number, _HEAD_BYTES, 0)) or b""
            if here == entry.build_id:
                return None
            return refuse_with(
                f"build id {entry.build_id.hex()} at the source, {here.hex() or 'none'} at the destination",
                "install the same version of it there",
            )
        if entry.digest:
            if _digest(readable.number) == entry.digest:
                return None
            return refuse_with("its content differs at the destination", "copy it there unchanged")
    if status.st_mtime_ns == entry.mtime_ns:
        return None
    return refuse_with(
        "too large to compare by content, and its date differs at the destination",
        "copy it there with its date (cp --preserve)",
    )
