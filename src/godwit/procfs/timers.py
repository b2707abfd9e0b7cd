"""The POSIX timers of a process: /proc/PID/timers, proc_pid_timers(5)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from godwit.procfs import source
from godwit.types import Pid

_TIMER = re.compile(
    r"ID: (\d+)\nsignal: (\d+)/([0-9a-f]+)\n"
    r"notify: (signal|none|thread)/(pid|tid)\.(-?\d+)\nClockID: (-?\d+)\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PosixTimer:
    """One timer of timer_create(2). When it expires is not told: that takes timer_gettime(2)."""

    timer_id: int
    signal: int
    value: int  # sigev_value, as the pointer
    notify: str  # signal, none or thread
    to_thread: bool  # SIGEV_THREAD_ID: `target` is a tid
    target: int  # in the pid namespace of the /proc that was read
    clock_id: int


def parse(text: str) -> tuple[PosixTimer, ...]:
    """Read all timers. Raises ValueError with the text that is wrong."""
    timers: list[PosixTimer] = []
    at = 0
    while at < len(text):
        found = _TIMER.match(text, at)
        if found is None:
            raise source.malformed("timers", "no timer", text[at:])
        timers.append(
            PosixTimer(
                timer_id=int(found[1]),
                signal=int(found[2]),
                value=int(found[3], 16),
                notify=found[4],
                to_thread=found[5] == "tid",
                target=int(found[6]),
                clock_id=int(found[7]),
            )
        )
        at = found.end()
    return tuple(timers)


def read(pid: Pid, *, proc: str = source.PROC) -> tuple[PosixTimer, ...]:
    """Read the timers of a process.

    Raises:
        ProcessLookupError: The process is gone.
        FileNotFoundError: The kernel was built without CONFIG_CHECKPOINT_RESTORE.
    """
    return parse(source.read_text(pid, "timers", proc=proc))
