"""Locks of open file descriptions, and their waiting: fcntl_locking(2), flock(2)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
from dataclasses import dataclass
from typing import Final

from godwit.linux import abi
from godwit.types import Fd

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
F_OFD_SETLKW: Final = 38
OFFSET_MAX: Final = (1 << 63) - 1
_FLOCK: Final = struct.Struct("=hh4xqqi4x")  # l_type l_whence l_start l_len l_pid


@dataclass(frozen=True, slots=True)
class Range:
    """A lock: F_RDLCK, F_WRLCK or F_UNLCK, from byte `start` to byte `end`, both inclusive.

    `pid` is the holder's, -1 if an open file description holds it.
    """

    kind: int
    start: int
    end: int
    pid: int = 0


def _packed(wanted: Range) -> bytes:
    if wanted.kind not in {fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK}:
        abi.fail(errno.EINVAL, "fcntl")
    if not 0 <= wanted.start <= wanted.end:
        abi.fail(errno.EINVAL, "fcntl")
    length = 0 if wanted.end >= OFFSET_MAX else wanted.end - wanted.start + 1
    if wanted.start > OFFSET_MAX:
        abi.fail(errno.EINVAL, "fcntl")
    return _FLOCK.pack(wanted.kind, 0, wanted.start, length, 0)


def conflict(fd: Fd, wanted: Range) -> Range | None:
    """Return a lock of somebody else that is in the way of one on this open file, or None."""
    kind, _, start, length, pid = _FLOCK.unpack(fcntl.fcntl(fd, F_OFD_GETLK, _packed(wanted)))
    if kind == fcntl.F_UNLCK:
        return None
    return Range(kind, start, start + length - 1 if length else OFFSET_MAX, pid)


def lock(fd: Fd, wanted: Range) -> None:
    """Lock or unlock. Raises BlockingIOError: somebody else's lock is in the way."""
    fcntl.fcntl(fd, F_OFD_SETLK, _packed(wanted))


def wait_and_lock(fd: Fd, wanted: Range) -> None:
    """Lock as soon as nothing is in the way. Raises InterruptedError: a signal came first."""
    packed = _packed(wanted)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    # Not fcntl.fcntl(), which begins again after a signal.
    abi.syscall("fcntl", fd, F_OFD_SETLKW, buffer)


def wait_and_flock(fd: Fd, operation: int) -> None:
    """Make the LOCK_ operation of flock(2). Raises InterruptedError: a signal came first."""
    abi.syscall("flock", fd, operation)
