"""getdents64(2): reading a directory a buffer at a time."""

from __future__ import annotations

import ctypes

from godwit.linux import abi
from godwit.types import Fd

_BUFFER_BYTES = 4096


def read_some(directory: Fd) -> int:
    """Read on in an open directory, by some entries; return how many bytes they took, 0 at its end."""
    return abi.syscall("getdents64", directory, (ctypes.c_char * _BUFFER_BYTES)(), _BUFFER_BYTES)
