"""One line about a task: /proc/PID/stat, proc_pid_stat(5)."""

from __future__ import annotations

from dataclasses import dataclass

from godwit.procfs import source
from godwit.types import Pid, Tid

PF_KTHREAD = 0x00200000  # in `flags`: a thread of the kernel, with no memory of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStat:
    """What stat tells. Fields are named as in proc_pid_stat(5).

    Pids are in the pid namespace of the /proc that was read. Addresses are the task's, and 0 when
    we may not ptrace it.
    """

    pid: int  # a tid, when read from a thread's directory
    comm: str
    state: str  # one letter
    ppid: Pid
    pgrp: int
    session: int
    tty_nr: int
    tpgid: int  # -1: no controlling terminal
    flags: int  # PF_*
    utime: int  # clock ticks
    stime: int  # clock ticks
    priority: int
    nice: int
    num_threads: int
    starttime: int  # clock ticks since boot, as the reader's time namespace sees it
    vsize: int  # bytes
    start_code: int
    end_code: int
    start_stack: int
    exit_signal: int
    processor: int  # the CPU it last ran on
    rt_priority: int
    policy: int  # SCHED_*
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int  # in the form of waitpid(2)

    @property
    def kernel_thread(self) -> bool:
        """Whether this is a thread of the kernel."""
        return bool(self.flags & PF_KTHREAD)


# Numbers of proc_pid_stat(5), which counts from 1.
_FIELDS = {
    "ppid": 4,
    "pgrp": 5,
    "session": 6,
    "tty_nr": 7,
    "tpgid": 8,
    "flags": 9,
    "utime": 14,
    "stime": 15,
    "priority": 18,
    "nice": 19,
    "num_threads": 20,
    "starttime": 22,
    "vsize": 23,
    "start_code": 26,
    "end_code": 27,
    "start_stack": 28,
    "exit_signal": 38,
    "processor": 39,
    "rt_priority": 40,
    "policy": 41,
    "start_data": 45,
    "end_data": 46,
    "start_brk": 47,
    "arg_start": 48,
    "arg_end": 49,
    "env_start": 50,
    "env_end": 51,
    "exit_code": 52,
}
_FIRST_AFTER_COMM = 3
_LAST = 52


def parse(text: str) -> TaskStat:
    """Read the line. Raises ValueError on anything a kernel since 3.5 would not write."""
    # The name may hold spaces, parentheses and newlines, unescaped; no later field can.
    head, opened, rest = text.partition(" (")
    comm, closed, tail = rest.rpartition(") ")
    if not opened or not closed:
        raise source.malformed("stat", "no name in parentheses", text)
    words = tail.split()
    if len(words) <= _LAST - _FIRST_AFTER_COMM:
        raise source.malformed("stat", f"{len(words)} fields after the name", text)
    if len(words[0]) != 1:
        raise source.malformed("stat", "state is no letter", words[0])
    values = {
        name: source.number("stat", name, words[field - _FIRST_AFTER_COMM]) for name, field in _FIELDS.items()
    }
    return TaskStat(
        pid=source.number("stat", "pid", head),
        comm=comm,
        state=words[0],
        ppid=Pid(values.pop("ppid")),
        **values,
    )


def read(pid: Pid, tid: Tid | None = None, *, proc: str = source.PROC) -> TaskStat:
    """Read stat of a process, or of one thread. Raises ProcessLookupError if it is gone."""
    return parse(source.read_text(pid, "stat", tid=tid, proc=proc))


def read_place(pid: Pid, tid: Tid, *, proc: str = source.PROC) -> tuple[str, int]:
    """Return the state of a thread and the CPU it last ran on, without reading the rest.

    Raises ProcessLookupError if it is gone, ValueError as `parse` does.
    """
    text = source.read_text(pid, "stat", tid=tid, proc=proc)
    words = text.rpartition(") ")[2].split()
    if len(words) <= _LAST - _FIRST_AFTER_COMM:
        raise source.malformed("stat", f"{len(words)} fields after the name", text)
    return words[0], source.number("stat", "processor", words[_FIELDS["processor"] - _FIRST_AFTER_COMM])
