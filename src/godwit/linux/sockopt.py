"""Socket options that the standard library cannot ask for: socket(7)."""

from __future__ import annotations

import ctypes
import socket

from godwit.linux import abi
from godwit.types import Fd

SO_GET_FILTER = 26


def filter_instructions(fd: Fd) -> int:
    """Return the length of the attached packet filter: 0, there is none.

    Raises:
        PermissionError: EACCES, it is an eBPF program, which cannot be read.
        OSError: ENOPROTOOPT and the like, this kind of socket has no filters.
    """
    # The length counts instructions, not bytes; with 0 the kernel tells their number and copies none.
    length = ctypes.c_uint(0)
    abi.syscall("getsockopt", fd, socket.SOL_SOCKET, SO_GET_FILTER, 0, ctypes.byref(length))
    return length.value
