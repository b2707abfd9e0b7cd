"""Timers that are files: timerfd_create(2)."""

from __future__ import annotations

import ctypes
import fcntl
import struct

from godwit.linux import abi
from godwit.types import Fd, OwnedFd

TFD_CLOEXEC = 0o2000000
TFD_TIMER_ABSTIME = 1
TFD_TIMER_CANCEL_ON_SET = 2
TFD_IOC_SET_TICKS = 0x40085400

CLOCK_REALTIME = 0
CLOCK_MONOTONIC = 1
CLOCK_BOOTTIME = 7
CLOCK_REALTIME_ALARM = 8
CLOCK_BOOTTIME_ALARM = 9

_NS = 1_000_000_000


class itimerspec(ctypes.Structure):
    """Struct itimerspec of timerfd_settime(2), its two timespecs laid flat."""

    _fields_ = [
        ("it_interval_sec", ctypes.c_int64),
        ("it_interval_nsec", ctypes.c_int64),
        ("it_value_sec", ctypes.c_int64),
        ("it_value_nsec", ctypes.c_int64),
    ]


def create(clock: int) -> OwnedFd:
    """Make a disarmed timer, close-on-exec.

    Raises:
        OSError: EINVAL, no such clock. EPERM, an alarm clock needs CAP_WAKE_ALARM.
    """
    return OwnedFd(abi.syscall("timerfd_create", clock, TFD_CLOEXEC))


def settime(fd: Fd, *, flags: int, value_ns: int, interval_ns: int) -> None:
    """Arm the timer, or disarm it with a value of 0; expirations not yet read are forgotten."""
    spec = itimerspec(interval_ns // _NS, interval_ns % _NS, value_ns // _NS, value_ns % _NS)
    abi.syscall("timerfd_settime", fd, flags, spec, 0)


def gettime(fd: Fd) -> tuple[int, int]:
    """Return the remaining time and the interval, in ns.

    An expired periodic timer is set going again by this, its expirations counted up to now: just
    what read(2) would do, so that a reader cannot tell.
    """
    spec = itimerspec()
    abi.syscall("timerfd_gettime", fd, spec)
    return (
        spec.it_value_sec * _NS + spec.it_value_nsec,
        spec.it_interval_sec * _NS + spec.it_interval_nsec,
    )


def set_ticks(fd: Fd, ticks: int) -> None:
    """Set the number of expirations that the next read(2) reports; more than 0."""
    fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("=Q", ticks))
