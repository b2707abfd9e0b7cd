"""Who there is, and what each holds: the directories of /proc.

All of these are snapshots of something that moves, unless the processes are stopped.
"""

from __future__ import annotations

import errno
import os

from godwit.linux.pause import pause
from godwit.procfs import source, stat
from godwit.types import Fd, Pid, Tid

_ENDING_LOOKS = 10
_ENDING_PAUSE_S = 0.002


def _list(pid: Pid, name: str, proc: str) -> list[str]:
    directory = source.task_path(pid, None, proc)
    try:
        return os.listdir(f"{directory}/{name}")
    except FileNotFoundError:
        raise source.gone(directory) from None


def _check_alive(pid: Pid, proc: str) -> None:
    directory = source.task_path(pid, None, proc)
    if not os.path.isdir(directory):
        raise source.gone(directory)


def list_pids(*, proc: str = source.PROC) -> tuple[Pid, ...]:
    """List every process that this /proc shows, in order of pid."""
    return tuple(Pid(number) for number in sorted(int(name) for name in os.listdir(proc) if name.isdecimal()))


def list_tids(pid: Pid, *, proc: str = source.PROC) -> tuple[Tid, ...]:
    """List the threads of a process in order of tid. Raises ProcessLookupError if it is gone."""
    return tuple(Tid(number) for number in sorted(int(name) for name in _list(pid, "task", proc)))


def children(pid: Pid, *, proc: str = source.PROC) -> tuple[Pid, ...]:
    """List the children of all threads of a process, zombies too, in order of pid.

    Complete only while the process is stopped: proc_tid_children(5).

    Raises:
        ProcessLookupError: The process is gone.
    """
    found: set[int] = set()
    for tid in list_tids(pid, proc=proc):
        try:
            words = source.read_text(pid, "children", tid=tid, proc=proc).split()
        except ProcessLookupError:
            continue  # the thread has ended, and its children went to another one
        except FileNotFoundError:
            # No CONFIG_PROC_CHILDREN: ask every process for its parent.
            return _children_by_parent(pid, proc)
        found.update(int(word) for word in words)
    _check_alive(pid, proc)
    return tuple(Pid(number) for number in sorted(found))


def _children_by_parent(pid: Pid, proc: str) -> tuple[Pid, ...]:
    found: list[Pid] = []
    for other in list_pids(proc=proc):
        try:
            if stat.read(other, proc=proc).ppid == pid:
                found.append(other)
        except ProcessLookupError:
            continue
    return tuple(found)


TOO_LONG = "path too long to be told"  # the kernel tells none above one page


def open_fds(pid: Pid, *, proc: str = source.PROC) -> dict[Fd, str]:
    """Map each descriptor of a process to the text of its link; none for a zombie.

    A path that the kernel does not tell reads TOO_LONG.

    Raises:
        ProcessLookupError: The process is gone.
        PermissionError: We may not ptrace it.
    """
    links: dict[Fd, str] = {}
    directory = source.task_path(pid, None, proc)
    for number in sorted(int(name) for name in _list(pid, "fd", proc)):
        try:
            links[Fd(number)] = os.readlink(f"{directory}/fd/{number}")
        except FileNotFoundError:
            continue  # closed since the listing
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            links[Fd(number)] = TOO_LONG
    _check_alive(pid, proc)
    return links


def namespaces(pid: Pid, *, proc: str = source.PROC) -> dict[str, int]:
    """Map each kind of namespace to its inode number; a zombie has left some of them.

    Raises:
        ProcessLookupError: The process is gone.
        PermissionError: We may not ptrace it.
    """
    inodes: dict[str, int] = {}
    directory = source.task_path(pid, None, proc)
    for name in sorted(_list(pid, "ns", proc)):
        try:
            inodes[name] = os.stat(f"{directory}/ns/{name}").st_ino
        except PermissionError:
            # What a process that is ending just now answers, to root as well.
            _check_lasting(pid, proc)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH):
                raise
    _check_alive(pid, proc)
    return inodes


def _check_lasting(pid: Pid, proc: str) -> None:
    """Raise ProcessLookupError if the process is ending: a zombie or gone within a moment."""
    for _ in range(_ENDING_LOOKS):
        _check_alive(pid, proc)
        if stat.read(pid, proc=proc).state in "ZX":
            raise ProcessLookupError(errno.ESRCH, f"process {pid} is ending")
        pause(_ENDING_PAUSE_S)
