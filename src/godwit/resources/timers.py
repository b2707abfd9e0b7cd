"""Interval timers and POSIX timers of a process: setitimer(2), timer_create(2)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from godwit.errors import UnsupportedStateError
from godwit.procfs.timers import PosixTimer
from godwit.tracee.calls import Batch

_ITIMERS: Final = (0, 1, 2)  # ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF
_ITIMERVAL_BYTES: Final = 32
_ITIMERSPEC_BYTES: Final = 32
_SIGEVENT: Final = struct.Struct("<QiiI44x")
_SIGEV_THREAD_ID: Final = 4
_NOTIFY: Final = {"signal": 0, "none": 1, "thread": 2}
PR_TIMER_CREATE_RESTORE_IDS: Final = 77
LIMIT: Final = 900
_ZERO: Final = bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalTimer:
    """A timer of setitimer(2), as `struct itimerval`: interval, then what is left."""

    which: int
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PosixTimerEntry:
    """A timer of timer_create(2)."""

    timer_id: int
    clock: int
    notify: int  # SIGEV_*
    signal: int
    value: int  # sigev_value
    thread: int  # with SIGEV_THREAD_ID: a tid in the process's own pid namespace
    setting: bytes  # struct itimerspec: interval, then what is left


@dataclass(frozen=True, slots=True, kw_only=True)
class TimersEntry:
    """Every armed interval timer and every POSIX timer."""

    intervals: tuple[IntervalTimer, ...]
    posix: tuple[PosixTimerEntry, ...]


def collect(
    batch: Batch, timers: tuple[PosixTimer, ...], inner: Mapping[int, int]
) -> Callable[[], TimersEntry]:
    """Queue the questions; after the batch has run the answer is the entry.

    Args:
        batch: Of any thread of the process.
        timers: From /proc/PID/timers.
        inner: Our tid of each thread to the process's own.
    """
    if len(timers) > LIMIT:
        raise UnsupportedStateError(
            f"{len(timers)} POSIX timers",
            where=f"pid {timers[0].target}",
            why=f"more than {LIMIT} are not carried",
            remedy="use fewer timers",
        )
    interval_spaces = [batch.space(_ITIMERVAL_BYTES) for _ in _ITIMERS]
    for which, space in zip(_ITIMERS, interval_spaces, strict=True):
        batch.add("getitimer", which, space)
    posix_spaces = [batch.space(_ITIMERSPEC_BYTES) for _ in timers]
    for timer, space in zip(timers, posix_spaces, strict=True):
        batch.add("timer_gettime", timer.timer_id, space)

    def answer() -> TimersEntry:
        values = [batch.answer(space, _ITIMERVAL_BYTES) for space in interval_spaces]
        return TimersEntry(
            intervals=tuple(
                IntervalTimer(which=which, value=value)
                for which, value in zip(_ITIMERS, values, strict=True)
                if value != _ZERO
            ),
            posix=tuple(
                PosixTimerEntry(
                    timer_id=timer.timer_id,
                    clock=timer.clock_id,
                    notify=_NOTIFY[timer.notify] | (_SIGEV_THREAD_ID if timer.to_thread else 0),
                    signal=timer.signal,
                    value=timer.value,
                    thread=inner[timer.target] if timer.to_thread else 0,
                    setting=batch.answer(space, _ITIMERSPEC_BYTES),
                )
                for timer, space in zip(timers, posix_spaces, strict=True)
            ),
        )

    return answer


def restore(entry: TimersEntry, batch: Batch) -> None:
    """Queue making and arming every timer. The threads that they name must be there."""
    if entry.posix:
        batch.add("prctl", PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0)
    for timer in entry.posix:
        batch.make_room(2)
        event = batch.data(_SIGEVENT.pack(timer.value, timer.signal, timer.notify, timer.thread))
        batch.add("timer_create", timer.clock, event, struct.pack("<i", timer.timer_id))
        batch.add("timer_settime", timer.timer_id, 0, timer.setting, 0)
    if entry.posix:
        batch.add("prctl", PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0)
    for interval in entry.intervals:
        batch.add("setitimer", interval.which, _running(interval.value), 0)


def _running(value: bytes) -> bytes:
    """Return the setting that makes a timer go on.

    One that has run out and whose signal still waits shows nothing left: the kernel winds it up when
    the signal is taken. Set so, it would stand still; it gets a whole interval instead.
    """
    interval, left = value[: len(value) // 2], value[len(value) // 2 :]
    return interval + interval if not any(left) else value
