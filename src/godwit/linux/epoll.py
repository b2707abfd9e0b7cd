"""Interests of an epoll set as the kernel takes them: epoll_ctl(2)."""

from __future__ import annotations

import platform
import struct

EPOLL_CTL_ADD = 1
EPOLLIN = 0x001
EPOLLPRI = 0x002
EPOLLOUT = 0x004
EPOLLERR = 0x008
EPOLLHUP = 0x010
EPOLLRDNORM = 0x040
EPOLLRDBAND = 0x080
EPOLLWRNORM = 0x100
EPOLLWRBAND = 0x200
EPOLLMSG = 0x400
EPOLLRDHUP = 0x2000
EPOLLEXCLUSIVE = 1 << 28
EPOLLONESHOT = 1 << 30
EPOLLET = 1 << 31

# What a file may report; the rest of the word says how it is to be reported.
READINESS = (
    EPOLLIN
    | EPOLLPRI
    | EPOLLOUT
    | EPOLLERR
    | EPOLLHUP
    | EPOLLRDNORM
    | EPOLLRDBAND
    | EPOLLWRNORM
    | EPOLLWRBAND
    | EPOLLMSG
    | EPOLLRDHUP
)

# Only on x86_64 is the structure packed, so that 32-bit programs see the same one.
EVENT = struct.Struct("=IQ" if platform.machine() == "x86_64" else "=IxxxxQ")


def event(events: int, data: int) -> bytes:
    """Build a struct epoll_event."""
    return EVENT.pack(events, data)
