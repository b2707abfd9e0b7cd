"""Scheduling of a task: sched_setattr(2), sched_setaffinity(2), ioprio_set(2)."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from godwit.linux import abi
from godwit.types import Tid

IOPRIO_WHO_PROCESS: Final = 1


class SchedAttr(ctypes.Structure):
    """`struct sched_attr` of <linux/sched/types.h>, first version (48 bytes)."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("sched_policy", ctypes.c_uint32),
        ("sched_flags", ctypes.c_uint64),
        ("sched_nice", ctypes.c_int32),
        ("sched_priority", ctypes.c_uint32),
        ("sched_runtime", ctypes.c_uint64),
        ("sched_deadline", ctypes.c_uint64),
        ("sched_period", ctypes.c_uint64),
    ]


def get_attributes(tid: Tid) -> bytes:
    """Read policy, nice value and priority as `struct sched_attr`."""
    attributes = SchedAttr()
    abi.syscall("sched_getattr", tid, attributes, ctypes.sizeof(attributes), 0)
    return bytes(attributes)


def set_attributes(tid: Tid, raw: bytes) -> None:
    """Set what `get_attributes` read. Raises PermissionError for a better standing than allowed."""
    attributes = SchedAttr.from_buffer_copy(raw)
    attributes.size = ctypes.sizeof(attributes)
    abi.syscall("sched_setattr", tid, attributes, 0)


def get_affinity(tid: Tid) -> tuple[int, ...]:
    """Read the CPUs the task may run on."""
    return tuple(sorted(os.sched_getaffinity(tid)))


def get_io_priority(tid: Tid) -> int:
    """Read the I/O class and priority. ioprio_get(2)."""
    return abi.syscall("ioprio_get", IOPRIO_WHO_PROCESS, tid)


def set_io_priority(tid: Tid, priority: int) -> None:
    """Set the I/O class and priority. ioprio_set(2)."""
    abi.syscall("ioprio_set", IOPRIO_WHO_PROCESS, tid, priority)
