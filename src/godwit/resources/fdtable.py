"""The descriptor table of a process, and what every open file has: fcntl(2).

Status flags, the owner for SIGIO and record locks belong to no kind in particular.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from godwit.resources.base import OpenFile
from godwit.types import Fd, FileId

F_SETOWN_EX: Final = 15
F_GETOWN_EX: Final = 16
F_SETSIG: Final = 10
F_OWNER_PGRP: Final = 2
F_GETSIG: Final = 11
F_OFD_SETLK: Final = 37
SETTABLE_FLAGS: Final = os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC | os.O_DIRECT | os.O_NOATIME
_OWNER: Final = struct.Struct("<ii")
_FLOCK: Final = struct.Struct("<hhxxxxqqixxxx")
_END_OF_FILE: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DescriptorEntry:
    """One slot of a descriptor table."""

    fd: int
    file_id: FileId
    close_on_exec: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonEntry:
    """What every open file has."""

    file_id: FileId
    flags: int  # O_*, as in fdinfo
    owner_type: int = 0  # F_OWNER_*
    owner: int = 0  # in the tree's own pid namespace; 0 none
    owner_signal: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LockEntry:
    """A record or whole-file lock."""

    file_id: FileId
    kind: str  # POSIX, OFDLCK, FLOCK
    write: bool
    start: int
    length: int  # 0: to the end of the file
    holder: int  # the process, in the tree's own pid namespace
    fd: int  # a number under which the holder has the file


def collect_common(file: OpenFile, inner: Mapping[int, int], inner_groups: Mapping[int, int]) -> CommonEntry:
    """Note flags and SIGIO owner.

    Args:
        file: The file.
        inner: Our pids and tids to the tree's own.
        inner_groups: Our process groups to the tree's own.

    Raises:
        UnsupportedStateError: The owner is not of the tree.
    """
    flags = file.info.flags
    if flags & os.O_PATH:
        return CommonEntry(file_id=file.file_id, flags=flags)
    with file.duplicate() as fd:
        kind, owner = _OWNER.unpack(fcntl.fcntl(fd.number, F_GETOWN_EX, bytes(8)))
        signal = fcntl.fcntl(fd.number, F_GETSIG)
    known = inner_groups if kind == F_OWNER_PGRP else inner
    if owner and owner not in known:
        raise file.refuse(
            "SIGIO owner outside the tree",
            f"{'group' if kind == F_OWNER_PGRP else 'pid'} {owner}, which does not move along, gets signals"
            " about it",
            "take the ownership back with F_SETOWN",
        )
    return CommonEntry(
        file_id=file.file_id,
        flags=flags,
        owner_type=kind if owner else 0,
        owner=known[owner] if owner else 0,
        owner_signal=signal,
    )


def restore_flags(entry: CommonEntry, fd: Fd) -> None:
    """Set the status flags that a descriptor made anew may lack."""
    if entry.flags & os.O_PATH:
        return
    now = fcntl.fcntl(fd, fcntl.F_GETFL)
    # O_ASYNC last and by the holder: it needs the owner.
    wanted = entry.flags & (SETTABLE_FLAGS & ~os.O_ASYNC) | now & ~SETTABLE_FLAGS
    if now != wanted:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)


def owner_calls(entry: CommonEntry, fd: int) -> list[tuple[str, tuple[int | bytes, ...]]]:
    """Return the calls by which a holder sets the SIGIO owner of its descriptor."""
    calls: list[tuple[str, tuple[int | bytes, ...]]] = []
    if entry.owner_signal:
        calls.append(("fcntl", (fd, F_SETSIG, entry.owner_signal)))
    if entry.owner:
        calls.append(("fcntl", (fd, F_SETOWN_EX, _OWNER.pack(entry.owner_type, entry.owner))))
    if entry.flags & os.O_ASYNC:
        calls.append(("fcntl", (fd, fcntl.F_SETFL, entry.flags & SETTABLE_FLAGS)))
    return calls


def collect_locks(file: OpenFile, inner: Mapping[int, int]) -> list[LockEntry]:
    """Note the locks that fdinfo shows for the file."""
    found: list[LockEntry] = []
    for lock in file.info.locks:
        holder = file.holders[0]
        if lock.kind == "POSIX":
            mine = [pair for pair in file.holders if inner.get(pair[0]) and pair[0] == lock.pid]
            if not mine:
                continue
            holder = mine[0]
        length = _END_OF_FILE if lock.end is None else lock.end - lock.start + 1
        found.append(
            LockEntry(
                file_id=file.file_id,
                kind=lock.kind,
                write=lock.mode == "WRITE",
                start=lock.start,
                length=length,
                holder=inner[holder[0]],
                fd=holder[1],
            )
        )
    return found


def lock_call(entry: LockEntry, *, take: bool) -> tuple[str, tuple[int | bytes, ...]]:
    """Return the call by which the holder takes or drops the lock, without waiting."""
    if entry.kind == "FLOCK":
        wanted = fcntl.LOCK_EX if entry.write else fcntl.LOCK_SH
        return "flock", (entry.fd, wanted | fcntl.LOCK_NB if take else fcntl.LOCK_UN)
    kind = (fcntl.F_WRLCK if entry.write else fcntl.F_RDLCK) if take else fcntl.F_UNLCK
    command = F_OFD_SETLK if entry.kind == "OFDLCK" else fcntl.F_SETLK
    return "fcntl", (entry.fd, command, _FLOCK.pack(kind, os.SEEK_SET, entry.start, entry.length, 0))


def is_conflict(error: OSError) -> bool:
    """Tell whether taking a lock failed because somebody else has it."""
    return error.errno in (errno.EAGAIN, errno.EACCES)
