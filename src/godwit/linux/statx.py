"""statx(2), for the one field that os.stat lacks: when a file was born."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from godwit.linux import abi
from godwit.types import Fd

AT_EMPTY_PATH: Final = 0x1000
STATX_BTIME: Final = 0x800
_STATX_BYTES: Final = 256
_MASK: Final = struct.Struct("<I")
_BTIME: Final = struct.Struct("<qI")
_BTIME_AT: Final = 80


def birth_ns(fd: Fd) -> int:
    """Return when the file was made, in ns since the epoch; 0 where the file system keeps no such date."""
    buffer = (ctypes.c_char * _STATX_BYTES)()
    abi.syscall("statx", fd, b"\0", AT_EMPTY_PATH, STATX_BTIME, buffer)
    raw = bytes(buffer)
    if not _MASK.unpack_from(raw)[0] & STATX_BTIME:
        return 0
    seconds, nanoseconds = _BTIME.unpack_from(raw, _BTIME_AT)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
