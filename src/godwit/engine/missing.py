"""Pages that are missing at first and come when somebody waits for them: userfaultfd(2), post-copy.

The descriptors are made while a stub is still root's, and before anything is frozen. From `leave` on a
thread that touches a missing page waits in the kernel; it never finds a page of zeroes in its place, for as
long as anybody holds the descriptor. A pod's init does, so only the pod's end takes the last one away.

After Hines & Gopalan, "Post-Copy Based Live Virtual Machine Migration", VEE 2009.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from godwit.engine import ranges, space
from godwit.engine.ranges import Ranges
from godwit.engine.stub import Stub
from godwit.errors import DestinationError, ImageError, Refusal
from godwit.linux import abi, mman, pagemap, pidfd, userfaultfd
from godwit.resources.memory import Backing, VmaEntry
from godwit.types import Fd, OwnedFd

_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK
_TRIES: Final = 5
FEATURES: Final = (
    userfaultfd.UFFD_FEATURE_EVENT_FORK
    | userfaultfd.UFFD_FEATURE_EVENT_REMAP
    | userfaultfd.UFFD_FEATURE_EVENT_REMOVE
    | userfaultfd.UFFD_FEATURE_EVENT_UNMAP
)


def available() -> bool:
    """Tell whether this kernel lets us serve missing pages, the kernel's own faults on them included."""
    try:
        with OwnedFd(abi.syscall("userfaultfd", _FLAGS)) as fd:
            userfaultfd.enable(fd.number, FEATURES)
    except OSError:
        return False
    return True


def refusal() -> Refusal:
    """Say why memory cannot come later here."""
    return Refusal(
        what="memory on demand (post-copy)",
        where="destination",
        why="its kernel does not let us handle page faults (userfaultfd, CAP_SYS_PTRACE)",
        remedy="run `godwit receive` there as root, or use --strategy precopy",
    )


def arm(stub: Stub) -> OwnedFd:
    """Make a stub's userfaultfd and take it over. The stub must still have root's credentials."""
    number = stub.call("userfaultfd", _FLAGS)
    try:
        with pidfd.pidfd_open(stub.pid) as process:
            fd = pidfd.pidfd_getfd(process.number, Fd(number))
    finally:
        stub.call("close", number)
    try:
        userfaultfd.enable(fd.number, FEATURES)
    except BaseException:
        fd.close()
        raise
    return fd


def may_be_left(vma: VmaEntry) -> bool:
    """Tell whether pages of a mapping can come later.

    Those of private file mappings cannot (the kernel knows no missing page there), those of locked memory
    must not, a stack's are needed at once, and of what a fork wipes a child lacks nothing.
    """
    private = vma.backing is Backing.ANONYMOUS and not vma.shared
    return private and not vma.locked and not vma.grows_down and mman.MADV_WIPEONFORK not in vma.advice


def check(vmas: Sequence[VmaEntry], runs: Ranges) -> None:
    """Raise ImageError unless every page of these ranges may come later."""
    allowed = ranges.union((vma.start, vma.end) for vma in vmas if may_be_left(vma))
    if ranges.subtract(ranges.union(runs), allowed):
        raise ImageError("pages are left behind that cannot come later")


def leave(stub: Stub, uffd: Fd, vmas: Sequence[VmaEntry], runs: Ranges) -> None:
    """Have nothing in these ranges, and have who touches them wait. The last change to a stub's memory.

    Raises:
        DestinationError: The kernel fills them again and again.
    """
    wanted = [
        (vma.start, vma.end)
        for vma in vmas
        if may_be_left(vma) and ranges.intersect([(vma.start, vma.end)], runs)
    ]
    table = OwnedFd(os.open(f"/proc/{stub.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC))
    with table:
        for _ in range(_TRIES):
            space.drop(stub, vmas, runs, zero=False)
            for start, end in wanted:
                userfaultfd.register(uffd, start, end, userfaultfd.UFFDIO_REGISTER_MODE_MISSING)
            if not _any_present(table.number, runs):
                return
            # In between, the kernel has made a huge page of what was around.
            for start, end in wanted:
                userfaultfd.unregister(uffd, start, end)
    raise DestinationError(f"the memory of pid {stub.inner} does not stay empty", remedy="try again")


def _any_present(table: Fd, runs: Ranges) -> bool:
    return any(True for start, end in runs for _ in pagemap.scan_private(table, start, end))
