"""getdents64(2): reading a directory a buffer at a time."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from godwit.linux import abi
from godwit.types import Fd

_BUFFER_BYTES = 4096
_LARGE_BYTES: Final = 32768
_DIRENT64: Final = struct.Struct("=QqHB")  # d_ino d_off d_reclen d_type; then d_name and a zero byte


def read_some(directory: Fd) -> int:
    """Read on in an open directory, by some entries; return how many bytes they took, 0 at its end."""
    return abi.syscall("getdents64", directory, (ctypes.c_char * _BUFFER_BYTES)(), _BUFFER_BYTES)


def read_entries(directory: Fd) -> list[tuple[int, int, int, bytes]]:
    """Read on in an open directory: inode number, offset of the next entry, type and name of some entries.

    An empty list is its end. An offset is for lseek(2), and means nothing else.
    """
    buffer = ctypes.create_string_buffer(_LARGE_BYTES)
    length = abi.syscall("getdents64", directory, buffer, _LARGE_BYTES)
    raw = buffer.raw[:length]
    entries: list[tuple[int, int, int, bytes]] = []
    at = 0
    while at < length:
        inode, offset, size, kind = _DIRENT64.unpack_from(raw, at)
        end = raw.index(0, at + _DIRENT64.size)
        entries.append((inode, offset, kind, raw[at + _DIRENT64.size : end]))
        at += size
    return entries
