"""Descriptors of processes: pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2)."""

from __future__ import annotations

import os

from godwit.linux import abi
from godwit.types import Fd, OwnedFd, Pid


def pidfd_open(pid: Pid) -> OwnedFd:
    """Hold on to a process. Raises ProcessLookupError when it is gone."""
    return OwnedFd(os.pidfd_open(pid))


def pidfd_getfd(pidfd: Fd, target_fd: Fd) -> OwnedFd:
    """Duplicate a descriptor of another process into this one.

    pidfd_getfd(2), Linux 5.6. The duplicate is close-on-exec. It shares the open file
    description, so its offset and status flags are also the target's.

    Args:
        pidfd: From `pidfd_open`.
        target_fd: A number in the target's table, not in ours.

    Raises:
        ProcessLookupError: The target has exited.
        PermissionError: We may not ptrace the target.
        OSError: EBADF, the target has no such descriptor.
    """
    return OwnedFd(abi.syscall("pidfd_getfd", pidfd, target_fd, 0))


def send_signal(pidfd: Fd, signal: int) -> None:
    """Signal exactly the held process, never a successor of its number."""
    abi.syscall("pidfd_send_signal", pidfd, signal, 0, 0)


def queue_signal(pidfd: Fd, signal: int, info: bytes) -> None:
    """Signal exactly the held process, with a siginfo_t as sigqueue(3) fills it: si_code is negative.

    Raises:
        ProcessLookupError: It is gone.
        PermissionError: The kernel takes no such siginfo_t from us.
    """
    abi.syscall("pidfd_send_signal", pidfd, signal, info, 0)
