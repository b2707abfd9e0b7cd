"""mmap(2), mremap(2), madvise(2) and mlock(2): constants, and where a mapping of ours lies."""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x100
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2

MADV_RANDOM: Final = 1
MADV_SEQUENTIAL: Final = 2
MADV_DONTNEED: Final = 4
MADV_DONTFORK: Final = 10
MADV_MERGEABLE: Final = 12
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_DONTDUMP: Final = 16
MADV_WIPEONFORK: Final = 18
MADV_POPULATE_WRITE: Final = 23

MLOCK_ONFAULT: Final = 1

PR_SET_VMA: Final = 0x53564D41
PR_SET_VMA_ANON_NAME: Final = 0


def mapping_address(mapping: mmap.mmap) -> int:
    """Return where a writable mapping starts in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
