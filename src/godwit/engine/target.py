"""Whether a pid names a process that anybody could move, and that we may touch."""

from __future__ import annotations

import os
from typing import Final

from godwit.errors import AccessError, BusyError, NoProcessError, RequestError, UnsupportedStateError
from godwit.linux.pause import pause
from godwit.procfs import stat, status, tasks
from godwit.residual import keeping
from godwit.types import Pid

_AGAIN_S: Final = 0.013


def check(pid: Pid) -> None:
    """See that a pid names a process that anybody could move, and that we may touch.

    Raises:
        NoProcessError, RequestError, AccessError: It does not, or we may not.
        BusyError: It is being traced.
    """
    try:
        found = _stat_twice(pid)
    except ProcessLookupError:
        raise NoProcessError(f"there is no process {pid}", remedy="look it up with ps") from None
    if found.kernel_thread:
        raise RequestError(f"pid {pid} ({found.comm}) is a kernel thread", remedy="name a user process")
    if found.state in "ZX" and len(tasks.list_tids(pid)) <= 1:
        raise NoProcessError(
            f"process {pid} ({found.comm}) has ended and waits to be reaped by pid {found.ppid}",
            remedy="name a living process",
        )
    if pid in _our_line():
        raise RequestError(
            f"pid {pid} ({found.comm}) is Godwit itself or a parent of it",
            remedy="run godwit from a terminal outside of that process",
        )
    _check_home(pid, found.comm)
    if not os.access(f"/proc/{pid}/mem", os.R_OK | os.W_OK) or not _may_trace(pid):
        owner = os.stat(f"/proc/{pid}").st_uid
        raise AccessError(
            f"pid {pid} ({found.comm}) belongs to user {owner}, and we may not trace it",
            remedy="run as root or as that user",
        )
    tracer = status.read(pid).tracer_pid
    if tracer:
        raise BusyError(
            f"pid {pid} ({found.comm}) is already traced by pid {tracer}",
            remedy="end the debugger or tracer first",
        )


def _check_home(pid: Pid, comm: str) -> None:
    """See that a process is neither what stayed here of one that has left, nor has its home elsewhere."""
    job = keeping.job_of(pid)
    if job is None:
        return
    if job.role == keeping.HOME:
        raise RequestError(
            f"pid {pid} ({comm}) has left: it runs at {job.peer}",
            remedy="nothing else can be done with it yet",
        )
    raise UnsupportedStateError(
        "a program whose home is elsewhere",
        where=f"pid {pid}",
        why="moving on, or home again, is not possible yet",
        remedy="let it end here",
    )


def _stat_twice(pid: Pid) -> stat.TaskStat:
    """Read stat; a pid that a thread takes over by executing a program is away for a moment."""
    try:
        return stat.read(pid)
    except ProcessLookupError:
        pause(_AGAIN_S)
        return stat.read(pid)


def _our_line() -> set[int]:
    # The first process is the parent of whoever has lost his own.
    line: set[int] = {1}
    pid = os.getpid()
    while pid > 1:
        line.add(pid)
        try:
            pid = stat.read(Pid(pid)).ppid
        except ProcessLookupError:
            break
    return line


def _may_trace(pid: Pid) -> bool:
    try:
        os.readlink(f"/proc/{pid}/exe")
    except PermissionError:
        return False
    except OSError:
        return True
    return True
