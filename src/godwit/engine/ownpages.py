"""Our own memory after a fork(2): pages are shared, and copied at the first write to each.

In Python even a look writes, into a reference count. What must be quick later has its pages copied before.
"""

from __future__ import annotations

import contextlib
import os

from godwit.linux import abi, mman, pagemap
from godwit.procfs import maps
from godwit.types import OwnedFd, Pid


def unshare() -> None:
    """Have every private page that we can write to be ours alone, as far as the kernel can: madvise(2)."""
    with OwnedFd(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)) as table:
        for mapping in maps.read_maps(Pid(os.getpid())):
            if mapping.shared or not mapping.writable:
                continue
            for start, end in list(pagemap.scan_private(table.number, mapping.start, mapping.end)):
                with contextlib.suppress(OSError):
                    abi.syscall("madvise", start, end - start, mman.MADV_POPULATE_WRITE)
