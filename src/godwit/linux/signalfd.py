"""Signals read as a file: signalfd(2)."""

from __future__ import annotations

import struct

from godwit.linux import abi
from godwit.types import OwnedFd

SFD_CLOEXEC = 0o2000000
SIGSET_BYTES = 8  # the kernel's sigset_t, not the C library's


def create(mask: int) -> OwnedFd:
    """Make a signalfd, close-on-exec, for the signals whose bit (number - 1) is set in `mask`."""
    return OwnedFd(abi.syscall("signalfd4", -1, struct.pack("=Q", mask), SIGSET_BYTES, SFD_CLOEXEC))
