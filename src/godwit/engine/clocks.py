"""Clocks and names of the machine as a process sees them: time_namespaces(7), uts_namespaces(7)."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from godwit.linux import ns
from godwit.linux.clone import CLONE_NEWTIME
from godwit.procfs import timens
from godwit.types import OwnedFd, Pid


def seen_by(pid: Pid) -> tuple[int, int]:
    """Return CLOCK_MONOTONIC and CLOCK_BOOTTIME as the process reads them, in ns."""
    theirs, ours = timens.read(pid), timens.read(Pid(os.getpid()))
    return (
        time.clock_gettime_ns(time.CLOCK_MONOTONIC) + theirs[0] - ours[0],
        time.clock_gettime_ns(time.CLOCK_BOOTTIME) + theirs[1] - ours[1],
    )


def boot_id() -> bytes:
    """Return the random id of this machine's boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def names_of(pid: Pid) -> tuple[bytes, bytes]:
    """Return host and domain name in the process's uts namespace."""
    found: list[tuple[bytes, bytes]] = []

    def ask() -> None:
        with OwnedFd(os.open(f"/proc/{pid}/ns/uts", os.O_RDONLY | os.O_CLOEXEC)) as uts:
            ns.setns(uts.number, ns.CLONE_NEWUTS)
        domain = Path("/proc/sys/kernel/domainname").read_bytes().strip()
        found.append((os.fsencode(os.uname().nodename), domain))

    if _same_namespace(pid, "uts"):
        domain = Path("/proc/sys/kernel/domainname").read_bytes().strip()
        return os.fsencode(os.uname().nodename), domain
    # A thread of its own: the namespace it joins goes with it.
    thread = threading.Thread(target=ask, name="uts")
    thread.start()
    thread.join()
    return found[0] if found else (b"", b"")


def _same_namespace(pid: Pid, kind: str) -> bool:
    theirs, ours = os.stat(f"/proc/{pid}/ns/{kind}"), os.stat(f"/proc/self/ns/{kind}")
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def enter_time_namespace(monotonic_ns: int, boottime_ns: int) -> int:
    """Give this process's future children clocks that read so much now.

    Returns how far their CLOCK_MONOTONIC is ahead of ours, in ns.

    Raises:
        OSError: The kernel has no time namespaces, or we may not make one.
    """
    ours = timens.read(Pid(os.getpid()))
    shift_ns = monotonic_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    boot_shift_ns = boottime_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    # Offsets are from the machine's own clocks, not from those of our namespace.
    offsets = (("monotonic", shift_ns + ours[0]), ("boottime", boot_shift_ns + ours[1]))
    ns.unshare(CLONE_NEWTIME)
    lines = [f"{name} {ns_ // 1_000_000_000} {ns_ % 1_000_000_000}" for name, ns_ in offsets]
    Path("/proc/self/timens_offsets").write_text("\n".join(lines) + "\n", "ascii")
    return shift_ns
