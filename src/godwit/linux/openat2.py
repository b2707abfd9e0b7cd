"""Opening a path below a directory that stands for the root: openat2(2), Linux 5.6."""

from __future__ import annotations

import os
import struct
from typing import Final

from godwit.linux import abi
from godwit.types import Fd, OwnedFd

RESOLVE_IN_ROOT: Final = 0x10
_OPEN_HOW: Final = struct.Struct("<QQQ")


def open_in_root(root: Fd, path: bytes, flags: int, mode: int = 0) -> OwnedFd:
    """Open a path as a process would whose root directory is `root`.

    Absolute links and ".." stay below it; links of /proc that lead elsewhere are not followed (ELOOP).

    Args:
        root: A directory; O_PATH will do.
        path: Absolute or not, it begins at the root.
        flags: O_*; O_CLOEXEC is added.
        mode: Of a file that is made.

    Raises:
        OSError: As open(2).
    """
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, RESOLVE_IN_ROOT)
    return OwnedFd(abi.syscall("openat2", root, path + b"\0", how, len(how)))
