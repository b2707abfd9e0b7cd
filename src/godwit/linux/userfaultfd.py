"""Page faults handled in user space, and writes noted: userfaultfd(2), ioctl_userfaultfd(2).

A userfaultfd belongs to the address space that made it. Whoever holds a duplicate may register ranges
of that space and fill its pages: UFFDIO_COPY reads from the caller's memory and writes to the other's.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from dataclasses import dataclass
from typing import Final

from godwit.types import Fd

UFFD_API: Final = 0xAA
UFFD_USER_MODE_ONLY: Final = 1
UFFD_FEATURE_EVENT_FORK: Final = 1 << 1
UFFD_FEATURE_EVENT_REMAP: Final = 1 << 2
UFFD_FEATURE_EVENT_REMOVE: Final = 1 << 3
UFFD_FEATURE_EVENT_UNMAP: Final = 1 << 6
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15

UFFDIO_REGISTER_MODE_MISSING: Final = 1
UFFDIO_REGISTER_MODE_WP: Final = 2

_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_UNREGISTER: Final = 0x8010AA01
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_COPY: Final = 0xC028AA03
_UFFDIO_ZEROPAGE: Final = 0xC020AA04
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06

_API: Final = struct.Struct("<QQQ")
_RANGE: Final = struct.Struct("<QQ")
_REGISTER: Final = struct.Struct("<QQQQ")
_COPY: Final = struct.Struct("<QQQQq")
_WRITEPROTECT: Final = struct.Struct("<QQQ")
_SOMEWHERE: Final = 1 << 30
_ZEROPAGE: Final = struct.Struct("<QQQq")

UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_EVENT_FORK: Final = 0x13
UFFD_EVENT_REMAP: Final = 0x14
UFFD_EVENT_REMOVE: Final = 0x15
UFFD_EVENT_UNMAP: Final = 0x16
UFFD_MSG_BYTES: Final = 32
_MSG: Final = struct.Struct("<B7xQQQ")


@dataclass(frozen=True, slots=True)
class Message:
    """A `struct uffd_msg`: what the words mean depends on the event.

    PAGEFAULT: flags, address, thread. FORK: the new userfaultfd's number in our table. REMAP: from, to,
    length. REMOVE and UNMAP: start, end.
    """

    event: int
    first: int
    second: int
    third: int


def enable(fd: Fd, features: int) -> None:
    """Shake hands with the kernel. Raises OSError: EINVAL, the kernel lacks one of the features."""
    fcntl.ioctl(fd, _UFFDIO_API, bytearray(_API.pack(UFFD_API, features, 0)))


def register(fd: Fd, start: int, end: int, mode: int) -> None:
    """Handle faults of a range. Raises OSError: EINVAL unfit or not mapped, EBUSY another's, ENOMEM gone."""
    fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(_REGISTER.pack(start, end - start, mode, 0)))


def unregister(fd: Fd, start: int, end: int) -> None:
    """Leave the faults of a range to the kernel again, and wake who waits there."""
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, _RANGE.pack(start, end - start))


def wake(fd: Fd, start: int, end: int) -> None:
    """Let threads try again that wait for a page of the range."""
    fcntl.ioctl(fd, _UFFDIO_WAKE, _RANGE.pack(start, end - start))


def copy(fd: Fd, start: int, source: int, length: int) -> int:
    """Put pages where there are none, and wake who waits for them; return the bytes done.

    Args:
        fd: The userfaultfd.
        start: In the other address space.
        source: In ours.
        length: Bytes, whole pages.

    Less than `length` is returned where a page is there already, or where the other address space is
    changing at this moment (EAGAIN): see `userfaultfd(2)`.

    Raises:
        OSError: EEXIST, the first page is there already; ENOENT, the range has gone; ESRCH, the whole
            address space has; ENOSPC likewise.
    """
    argument = bytearray(_COPY.pack(start, source, length, 0, 0))
    try:
        fcntl.ioctl(fd, _UFFDIO_COPY, argument)
    except BlockingIOError:
        return max(0, int(_COPY.unpack(argument)[4]))
    return int(_COPY.unpack(argument)[4])


def zero(fd: Fd, start: int, length: int) -> int:
    """Put the zero page where there is none, and wake who waits; return and raise as `copy` does."""
    argument = bytearray(_ZEROPAGE.pack(start, length, 0, 0))
    try:
        fcntl.ioctl(fd, _UFFDIO_ZEROPAGE, argument)
    except BlockingIOError:
        return max(0, int(_ZEROPAGE.unpack(argument)[3]))
    return int(_ZEROPAGE.unpack(argument)[3])


def is_alive(fd: Fd) -> bool:
    """Tell whether the address space still exists. Changes nothing; no range may be registered for writes."""
    try:
        # Nothing there is registered for that: a living address space answers ENOENT.
        fcntl.ioctl(fd, _UFFDIO_WRITEPROTECT, bytearray(_WRITEPROTECT.pack(_SOMEWHERE, 4096, 0)))
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def messages(raw: bytes | bytearray) -> list[Message]:
    """Take apart what read(2) gave; zeroes, which no event is numbered by, are room that it did not fill."""
    return [Message(*fields) for fields in _MSG.iter_unpack(raw) if fields[0]]
