"""Pods: the private view a process runs in away from home. namespaces(7).

A pod has its own pid, mount, uts, ipc and time namespaces. The builder enters all but the first
itself, so that what it opens is what the pod sees; the pod's init is the first of its pid namespace.
"""

from __future__ import annotations

import os

from godwit.engine import clocks
from godwit.engine.build import Builder
from godwit.errors import DestinationError
from godwit.linux import abi, ns
from godwit.resources.process import MachineEntry

_MS_REC = 0x4000
_MS_SLAVE = 1 << 19
_PR_SET_NAME = 15
_PROC_FLAGS = 2 | 4 | 8  # nosuid, nodev, noexec


def enter(machine: MachineEntry, monotonic_ns: int, boottime_ns: int) -> int:
    """Put this process where the pod will be. It must have one thread and be meant for this alone.

    Returns how far the pod's CLOCK_MONOTONIC is ahead of ours, in ns.

    Raises:
        DestinationError: The kernel refuses.
    """
    try:
        ns.unshare(ns.CLONE_NEWNS | ns.CLONE_NEWUTS | ns.CLONE_NEWIPC)
        # Mounts made later on the machine still appear in the pod; the pod's stay in it.
        abi.syscall("mount", 0, b"/\0", 0, _MS_REC | _MS_SLAVE, 0)
        abi.syscall("sethostname", machine.hostname, len(machine.hostname))
        if machine.domainname:
            abi.syscall("setdomainname", machine.domainname, len(machine.domainname))
        return clocks.enter_time_namespace(monotonic_ns, boottime_ns)
    except OSError as error:
        raise DestinationError(
            f"cannot make a pod: {error.strerror}", remedy="run as root, or allow user namespaces"
        ) from error


def complete_init(builder: Builder) -> None:
    """Give the pod a /proc of its own pids, and make its init ready to run its own code.

    From here on this process sees the pod's /proc too.
    """
    assert builder.family is not None
    init = builder.family.founder
    batch = init.batch()
    batch.add("close", init.transfer_fd)
    batch.add("prctl", _PR_SET_NAME, b"godwit-pod\0", 0, 0, 0)
    batch.add("mount", b"proc\0", b"/proc\0", b"proc\0", _PROC_FLAGS, 0)
    batch.run()
    os.sched_setaffinity(init.task.tid, os.sched_getaffinity(0))
    init.workshop.unmap(init.task)
    init.task.restore()
