"""What the kernel tells of an open file: /proc/PID/fdinfo/FD, proc_pid_fdinfo(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from godwit.procfs import source
from godwit.types import Fd, Pid

_EPOLL = re.compile(
    r"tfd:\s*(\d+) events:\s*([0-9a-f]+) data:\s*([0-9a-f]+)\s+"
    r"pos:(-?\d+) ino:([0-9a-f]+) sdev:([0-9a-f]+)\s*"
)
_INOTIFY = re.compile(
    r"inotify wd:([0-9a-f]+) ino:([0-9a-f]+) sdev:([0-9a-f]+) mask:([0-9a-f]+) ignored_mask:([0-9a-f]+)"
    r"(?: fhandle-bytes:([0-9a-f]+) fhandle-type:([0-9a-f]+) f_handle:((?:[0-9a-f]{2})*))?\s*"
)


def _decode_sdev(text: str) -> int:
    """Turn a device as the kernel keeps it, 12 and 20 bits, into one as stat(2) gives it."""
    value = int(text, 16)
    if value > 0xFFFFFFFF:
        raise source.malformed("fdinfo", "sdev is no device", text)
    return os.makedev(value >> 20, value & 0xFFFFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class LockLine:
    """A lock held through the open file, or by the process on the file: proc_locks(5)."""

    kind: str  # POSIX, FLOCK, OFDLCK, LEASE, DELEG
    status: str  # ADVISORY; ACTIVE, BREAKING or BREAKER for a lease
    mode: str  # READ, WRITE, or UNLCK for a lease on its way out
    pid: int  # -1 for OFDLCK
    dev: int  # as st_dev
    inode: int
    start: int
    end: int | None  # the last byte; None: to the end of the file, wherever it will be


@dataclass(frozen=True, slots=True, kw_only=True)
class EpollLine:
    """One interest of an epoll set."""

    tfd: Fd  # as it was when added: may have been closed or reused since
    events: int  # EPOLL*
    data: int
    pos: int
    ino: int
    sdev: int  # as st_dev


@dataclass(frozen=True, slots=True, kw_only=True)
class InotifyLine:
    """One watch of an inotify instance."""

    wd: int
    ino: int
    sdev: int  # as st_dev
    mask: int  # IN_*
    ignored_mask: int
    handle_type: int  # for open_by_handle_at(2)
    handle: bytes  # empty: the file system has no handles


@dataclass(frozen=True, slots=True, kw_only=True)
class FdInfo:
    """An open file. `fields` holds the first value of every other key, stripped but not decoded."""

    pos: int
    flags: int  # O_*, with O_CLOEXEC of the descriptor
    mnt_id: int
    ino: int | None  # None before Linux 5.14
    locks: tuple[LockLine, ...]
    epoll: tuple[EpollLine, ...]
    inotify: tuple[InotifyLine, ...]
    fields: Mapping[str, str]


def _parse_lock(line: str) -> LockLine:
    words = line.split()
    try:
        _, kind, status, mode, pid, place, start, end = words
        major, minor, inode = place.split(":")
        return LockLine(
            kind=kind,
            status=status,
            mode=mode,
            pid=int(pid),
            dev=os.makedev(int(major, 16), int(minor, 16)),
            inode=int(inode),
            start=int(start),
            end=None if end == "EOF" else int(end),
        )
    except (ValueError, OverflowError):
        raise source.malformed("fdinfo", "no lock", line) from None


def _parse_epoll(line: str) -> EpollLine:
    found = _EPOLL.fullmatch(line)
    if found is None:
        raise source.malformed("fdinfo", "no epoll interest", line)
    return EpollLine(
        tfd=Fd(int(found[1])),
        events=int(found[2], 16),
        data=int(found[3], 16),
        pos=int(found[4]),
        ino=int(found[5], 16),
        sdev=_decode_sdev(found[6]),
    )


def _parse_inotify(line: str) -> InotifyLine:
    found = _INOTIFY.fullmatch(line)
    if found is None:
        raise source.malformed("fdinfo", "no inotify watch", line)
    return InotifyLine(
        wd=int(found[1], 16),
        ino=int(found[2], 16),
        sdev=_decode_sdev(found[3]),
        mask=int(found[4], 16),
        ignored_mask=int(found[5], 16),
        handle_type=int(found[7] or "0", 16),
        handle=bytes.fromhex(found[8] or ""),
    )


def parse(text: str) -> FdInfo:
    """Read the whole file.

    Raises:
        ValueError: A line every file has is missing, or a line we read is damaged.
    """
    locks: list[LockLine] = []
    epoll: list[EpollLine] = []
    inotify: list[InotifyLine] = []
    fields: dict[str, str] = {}
    for line in source.lines(text):
        key, _, value = line.partition(":")
        if key == "lock":
            locks.append(_parse_lock(value))
        elif key == "tfd":
            epoll.append(_parse_epoll(line))
        elif key == "inotify wd":
            inotify.append(_parse_inotify(line))
        else:
            fields.setdefault(key, value.strip())
    missing = [key for key in ("pos", "flags", "mnt_id") if key not in fields]
    if missing:
        raise source.malformed("fdinfo", f"no {missing[0]}", text)
    ino = fields.pop("ino", None)
    return FdInfo(
        pos=source.number("fdinfo", "pos", fields.pop("pos")),
        flags=source.number("fdinfo", "flags", fields.pop("flags"), 8),
        mnt_id=source.number("fdinfo", "mnt_id", fields.pop("mnt_id")),
        ino=None if ino is None else source.number("fdinfo", "ino", ino),
        locks=tuple(locks),
        epoll=tuple(epoll),
        inotify=tuple(inotify),
        fields=fields,
    )


def read(pid: Pid, fd: Fd, *, proc: str = source.PROC) -> FdInfo:
    """Read what is told of a descriptor of a process.

    Raises:
        ProcessLookupError: The process is gone.
        FileNotFoundError: It has no such descriptor.
    """
    return parse(source.read_text(pid, f"fdinfo/{fd}", proc=proc))
