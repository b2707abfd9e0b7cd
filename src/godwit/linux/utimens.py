"""utimensat(2), with what os.utime lacks: one time without the other, and the present."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from godwit.linux import abi
from godwit.types import Fd

UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2
NOW: Final = (0, UTIME_NOW)
_OMIT: Final = (0, UTIME_OMIT)
_TIMES: Final = struct.Struct("=qqqq")  # two struct timespec: of access, of modification


def set_times(
    directory: Fd, name: bytes, access: tuple[int, int] | None, modification: tuple[int, int] | None
) -> None:
    """Set one or both times of a file, each in seconds and nanoseconds, or `NOW`; None leaves one."""
    times = _TIMES.pack(*(access or _OMIT), *(modification or _OMIT))
    abi.syscall("utimensat", directory, name, ctypes.create_string_buffer(times, _TIMES.size), 0)
