"""Whether two processes share a kernel object: kcmp(2)."""

from __future__ import annotations

import struct

from godwit.linux import abi
from godwit.types import Fd, Pid

KCMP_FILE = 0
KCMP_VM = 1
KCMP_FILES = 2
KCMP_FS = 3
KCMP_SIGHAND = 4
KCMP_EPOLL_TFD = 7

SAME = 0
LESS = 1
GREATER = 2


def _order(pid1: Pid, pid2: Pid, kind: int, idx1: int, idx2: int | bytes) -> int:
    return abi.syscall("kcmp", pid1, pid2, kind, idx1, idx2)


def same_file(pid1: Pid, fd1: Fd, pid2: Pid, fd2: Fd) -> bool:
    """Tell whether two descriptors share one open file description.

    Raises:
        ProcessLookupError: A process is gone.
        PermissionError: We may not ptrace one of them.
        OSError: EBADF, one has no such descriptor.
    """
    return _order(pid1, pid2, KCMP_FILE, fd1, fd2) == 0


def same_part(pid1: Pid, pid2: Pid, kind: int) -> bool:
    """Tell whether two tasks share their KCMP_VM, KCMP_FILES, KCMP_FS or KCMP_SIGHAND."""
    return _order(pid1, pid2, kind, 0, 0) == 0


def watches_file(watcher: Pid, epoll: Fd, tfd: Fd, nth: int, holder: Pid, fd: Fd) -> bool:
    """Tell whether an interest of an epoll set is in the file that `holder` has open as `fd`.

    Args:
        watcher: Who has the epoll set.
        epoll: The set's number there.
        tfd: The number under which the file was added, wherever it is now.
        nth: Which of several interests with that number, in the order of fdinfo, from 0.
        holder: Who has the candidate.
        fd: Its number there.

    Raises:
        FileNotFoundError: There is no such interest (any more).
        OSError: EBADF, one of the descriptors is closed.
    """
    slot = struct.pack("=III", epoll, tfd, nth)
    return _order(holder, watcher, KCMP_EPOLL_TFD, fd, slot) == 0


def file_order(pid1: Pid, fd1: Fd, pid2: Pid, fd2: Fd) -> int:
    """Order two descriptors by their open file descriptions: SAME, LESS or GREATER.

    The order is total while the files stay open, so many descriptors can be sorted. Raises as
    `same_file` does.
    """
    return _order(pid1, pid2, KCMP_FILE, fd1, fd2)
