"""Namespaces: unshare(2), setns(2), namespaces(7)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from godwit.linux import abi
from godwit.types import OwnedFd, Pid

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

PR_SET_PDEATHSIG = 1

Result = TypeVar("Result")


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces of the kinds in `flags`. CLONE_NEWPID: its next children."""
    abi.syscall("unshare", flags)


def setns(fd: int, flags: int) -> None:
    """Join namespaces. setns(2).

    Args:
        fd: A /proc/PID/ns file, or a pidfd (Linux 5.8): then all kinds in `flags` at once.
        flags: CLONE_NEW bits. CLONE_NEWNS also moves root and working directory, and needs a
            caller with one thread. CLONE_NEWPID applies to the next children only.
    """
    abi.syscall("setns", fd, flags)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends. PR_SET_PDEATHSIG."""
    abi.syscall("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def fork_with_pid_namespace(enter: Callable[[], None]) -> int:
    """Fork a child of ours into another pid namespace, and return as `os.fork` does.

    The caller stays where it is: `enter` changes only where its children go (by `unshare` or
    `setns` with CLONE_NEWPID), and that is undone after the fork. The pid returned is the
    caller's view.
    """
    with OwnedFd(os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)) as own:
        pid = -1
        enter()
        try:
            pid = os.fork()
        finally:
            # The child is below the old namespace and may not return to it.
            if pid != 0:
                setns(own.number, CLONE_NEWPID)
        return pid


def call_in_netns(pid: Pid, call: Callable[[], Result]) -> Result:
    """Return what `call` returns in the network namespace of process `pid`.

    It runs in a thread that ends with it, so the caller's own namespace never changes. A socket
    made there keeps its namespace wherever it is used.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            with OwnedFd(os.open(Path(f"/proc/{pid}/ns/net"), os.O_RDONLY | os.O_CLOEXEC)) as netns:
                setns(netns.number, CLONE_NEWNET)
            results.append(call())
        except BaseException as error:  # noqa: BLE001  # carried to the caller's thread, not swallowed
            errors.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
