"""Timers that are files: timerfd_create(2).

The kernel shows clock, flags, remaining time, interval and the expirations not yet read in fdinfo.
A timer set to an absolute time of the wall clock keeps that time; any other keeps what remained.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import ImageError
from godwit.linux import timerfd
from godwit.procfs import fdinfo
from godwit.procfs.fdinfo import FdInfo
from godwit.resources.base import FileKind, Finding, OpenFile, RestoreContext, Tree, moves
from godwit.types import FileId, OwnedFd, Pid

_WHAT = "timerfd"
_PAIR = re.compile(r"\((\d+), (\d+)\)")
_TRIES = 16
_NS = 1_000_000_000
_LONGEST_NS = 2**63 - 1
# An alarm clock shows the time of the plain one, which can be read without a clock chip.
_CLOCKS = {
    timerfd.CLOCK_REALTIME: time.CLOCK_REALTIME,
    timerfd.CLOCK_MONOTONIC: time.CLOCK_MONOTONIC,
    timerfd.CLOCK_BOOTTIME: time.CLOCK_BOOTTIME,
    timerfd.CLOCK_REALTIME_ALARM: time.CLOCK_REALTIME,
    timerfd.CLOCK_BOOTTIME_ALARM: time.CLOCK_BOOTTIME,
}
_FLAGS = timerfd.TFD_TIMER_ABSTIME | timerfd.TFD_TIMER_CANCEL_ON_SET


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFdEntry:
    """A timerfd in an image."""

    file_id: FileId
    clock: int  # CLOCK_*
    flags: int  # TFD_TIMER_*, as last set
    remaining_ns: int  # 0: disarmed, or expired and not periodic
    expires_ns: int  # time of the wall clock if it was set so, else 0
    interval_ns: int
    ticks: int  # expirations not yet read

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open file this restores."""
        return (self.file_id,)


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    return file.link == "anon_inode:[timerfd]"


def _pair_ns(info: FdInfo, key: str) -> int:
    found = _PAIR.fullmatch(info.fields[key])
    if found is None:
        raise ValueError(f"fdinfo: {key} is no time: {info.fields[key]!r}")
    return int(found[1]) * _NS + int(found[2])


def _own_info(fd: OwnedFd) -> FdInfo:
    return fdinfo.read(Pid(os.getpid()), fd.number)


def _counted(fd: OwnedFd) -> FdInfo:
    """Return a snapshot in which a periodic timer runs and all its expirations are counted.

    Except for a timer so fast that it expires again before it can be looked at.
    """
    for _ in range(_TRIES):
        timerfd.gettime(fd.number)
        info = _own_info(fd)
        # Both 0 and periodic: it expired between the two calls and stands still again.
        if _pair_ns(info, "it_value") or not _pair_ns(info, "it_interval") or info.fields["ticks"] == "0":
            return info
    return _own_info(fd)


def _entry(file: OpenFile) -> TimerFdEntry:
    with file.duplicate() as fd:
        info = _counted(fd)
        clock = int(info.fields["clockid"])
        if clock not in _CLOCKS:
            raise file.refuse(_WHAT, f"it counts by clock {clock}, which is not known here")
        now_ns = time.clock_gettime_ns(_CLOCKS[clock])
    flags = int(info.fields["settime flags"], 8)
    interval_ns = _pair_ns(info, "it_interval")
    remaining_ns = _pair_ns(info, "it_value")
    if not remaining_ns and int(info.fields["ticks"]):
        remaining_ns = interval_ns
    by_wall_clock = remaining_ns and flags & timerfd.TFD_TIMER_ABSTIME and _by_wall_clock(clock)
    return TimerFdEntry(
        file_id=file.file_id,
        clock=clock,
        flags=flags,
        remaining_ns=remaining_ns,
        expires_ns=now_ns + remaining_ns if by_wall_clock else 0,
        interval_ns=interval_ns,
        ticks=int(info.fields["ticks"]),
    )


def _by_wall_clock(clock: int) -> bool:
    return _CLOCKS[clock] == time.CLOCK_REALTIME


def inspect(file: OpenFile, tree: Tree) -> Finding:  # noqa: ARG001
    """Find that it moves."""
    return moves(file, _WHAT)


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[TimerFdEntry]:  # noqa: ARG001
    """Note the state of the timers; none is read from."""
    return [_entry(file) for file in files]


def restore(entry: TimerFdEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:  # noqa: ARG001
    """Make a timer that expires when the old one would have, its unread expirations kept."""
    if entry.clock not in _CLOCKS or entry.flags & ~_FLAGS:
        raise ImageError(f"timerfd {entry.file_id} has clock {entry.clock} and flags {entry.flags:#x}")
    times = (entry.remaining_ns, entry.expires_ns, entry.interval_ns)
    if not all(0 <= length_ns <= _LONGEST_NS for length_ns in times):
        raise ImageError(f"timerfd {entry.file_id} has an impossible time")
    value_ns = entry.remaining_ns
    if value_ns and entry.flags & timerfd.TFD_TIMER_ABSTIME:
        # The flag must come back too, so the remaining time becomes one of the clock as we see it.
        value_ns = entry.expires_ns or time.clock_gettime_ns(_CLOCKS[entry.clock]) + value_ns
    with timerfd.create(entry.clock) as fd:
        timerfd.settime(fd.number, flags=entry.flags, value_ns=value_ns, interval_ns=entry.interval_ns)
        _add_ticks(fd, entry.ticks)
        return {entry.file_id: fd.release()}


def _add_ticks(fd: OwnedFd, ticks: int) -> None:
    """Set the unread expirations, counting the one that may have come since the timer was set."""
    if not ticks:
        return
    timerfd.set_ticks(fd.number, ticks)
    info = _own_info(fd)
    periodic = _pair_ns(info, "it_interval") > 0
    # An expired timer stands still until somebody looks. If it expired before `set_ticks`, that one
    # was overwritten; if after, it is in the count.
    if periodic and not _pair_ns(info, "it_value") and int(info.fields["ticks"]) == ticks:
        timerfd.set_ticks(fd.number, ticks + 1)


KIND = FileKind(
    name="timerfd",
    tag=11,
    entry=TimerFdEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)
