"""Pipes: pipe(7), tee(2) and the ioctls and fcntls about them."""

from __future__ import annotations

import fcntl
import os
import struct
import termios

from godwit.linux import abi
from godwit.types import Fd, OwnedFd

F_SETPIPE_SZ = 1031
F_GETPIPE_SZ = 1032
SPLICE_F_NONBLOCK = 2


def pipe(flags: int = 0) -> tuple[OwnedFd, OwnedFd]:
    """Make a pipe and return (read end, write end), both close-on-exec. `flags`: O_NONBLOCK, O_DIRECT."""
    reader, writer = os.pipe2(flags | os.O_CLOEXEC)
    return OwnedFd(reader), OwnedFd(writer)


def capacity_bytes(fd: Fd) -> int:
    """Return how much the pipe holds at most."""
    return fcntl.fcntl(fd, F_GETPIPE_SZ)


def set_capacity(fd: Fd, length_bytes: int) -> None:
    """Let the pipe hold at least so much.

    Raises:
        PermissionError: Above /proc/sys/fs/pipe-max-size one needs CAP_SYS_RESOURCE.
    """
    fcntl.fcntl(fd, F_SETPIPE_SZ, length_bytes)


def unread_bytes(fd: Fd) -> int:
    """Return how many bytes wait in the pipe. FIONREAD, ioctl_pipe(2)."""
    count: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    return count


def tee(source: Fd, target: Fd, length_bytes: int) -> int:
    """Copy from one pipe to another without taking it away; packets stay packets. Never waits.

    Raises:
        BlockingIOError: The source is empty, or the target full.
    """
    return abi.syscall("tee", source, target, length_bytes, SPLICE_F_NONBLOCK)
