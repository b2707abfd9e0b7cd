"""fallocate(2), with the modes that posix_fallocate(3) lacks."""

from __future__ import annotations

from godwit.linux import abi
from godwit.types import Fd


def fallocate(fd: Fd, mode: int, offset: int, length: int) -> None:
    """Change the space of a file. `mode` holds FALLOC_FL_ bits of <linux/falloc.h>; 0 allocates."""
    abi.syscall("fallocate", fd, mode, offset, length)
