"""Where a task sleeps and when it last ran: /proc/PID/task/TID/sched and wchan."""

from __future__ import annotations

import re

from godwit.procfs import source
from godwit.types import Pid, Tid

_EXEC_START = re.compile(r"^se\.exec_start\s*:\s*(-?)(\d+)\.(\d{6})$", re.MULTILINE)


def parse_exec_start_ns(text: str) -> int | None:
    """Read when the task was last put on a CPU, by the scheduler's clock; None if not told."""
    found = _EXEC_START.search(text)
    if found is None:
        return None
    # Milliseconds with six decimals.
    value = source.number("sched", "se.exec_start", found[2] + found[3])
    return -value if found[1] else value


def exec_start_ns(pid: Pid, tid: Tid, *, proc: str = source.PROC) -> int | None:
    """Read when a thread last ran, in nanoseconds of the scheduler's clock of its CPU.

    Returns:
        None if the kernel was built without this file.

    Raises:
        ProcessLookupError: The thread is gone.
    """
    try:
        return parse_exec_start_ns(source.read_text(pid, "sched", tid=tid, proc=proc))
    except FileNotFoundError:
        return None


def wchan(pid: Pid, tid: Tid, *, proc: str = source.PROC) -> str:
    """Name the kernel function a thread sleeps in: "" if it runs, is stopped or we may not know.

    Raises:
        ProcessLookupError: The thread is gone.
    """
    try:
        text = source.read_text(pid, "wchan", tid=tid, proc=proc)
    except FileNotFoundError:
        return ""  # no CONFIG_KALLSYMS
    return "" if text == "0" else text
