"""statx(2), for the one field that os.stat lacks: when a file was born."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from godwit.linux import abi
from godwit.types import Fd

AT_EMPTY_PATH: Final = 0x1000
AT_STATX_DONT_SYNC: Final = 0x4000
STATX_BTIME: Final = 0x800
_STATX_BYTES: Final = 256
_MASK: Final = struct.Struct("<I")
_BTIME: Final = struct.Struct("<qI")
_BTIME_AT: Final = 80
_DEVICE: Final = struct.Struct("<II")  # stx_dev_major stx_dev_minor
_DEVICE_AT: Final = 136


def device_without_asking(fd: Fd) -> int:
    """Return the device number of a file's file system, as the kernel has it: a server is not asked."""
    buffer = (ctypes.c_char * _STATX_BYTES)()
    abi.syscall("statx", fd, b"\0", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, buffer)
    return os.makedev(*_DEVICE.unpack_from(bytes(buffer), _DEVICE_AT))


def birth_ns(fd: Fd) -> int:
    """Return when the file was made, in ns since the epoch; 0 where the file system keeps no such date."""
    buffer = (ctypes.c_char * _STATX_BYTES)()
    abi.syscall("statx", fd, b"\0", AT_EMPTY_PATH, STATX_BTIME, buffer)
    raw = bytes(buffer)
    if not _MASK.unpack_from(raw)[0] & STATX_BTIME:
        return 0
    seconds, nanoseconds = _BTIME.unpack_from(raw, _BTIME_AT)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
