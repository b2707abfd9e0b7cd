"""clone3(2) with chosen ids."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Sequence
from typing import Final

from godwit.linux import abi
from godwit.types import Pid

CLONE_VM: Final = 0x100
CLONE_FS: Final = 0x200
CLONE_FILES: Final = 0x400
CLONE_SIGHAND: Final = 0x800
CLONE_PARENT: Final = 0x8000
CLONE_THREAD: Final = 0x10000
CLONE_NEWNS: Final = 0x20000
CLONE_SYSVSEM: Final = 0x40000
CLONE_NEWCGROUP: Final = 0x2000000
CLONE_NEWUTS: Final = 0x4000000
CLONE_NEWIPC: Final = 0x8000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000
CLONE_NEWTIME: Final = 0x80

CLONE_ARGS_BYTES: Final = 88


class CloneArgs(ctypes.Structure):
    """`struct clone_args` of <linux/sched.h>, version 2 (88 bytes)."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup"
        ).split()
    ]


def fork_with_ids(flags: int = 0, pids: Sequence[Pid] = ()) -> Pid:
    """Fork this process; return 0 in the child, the child's pid in the parent.

    Args:
        flags: CLONE_NEW* namespaces for the child.
        pids: The child's pid in its innermost pid namespace, then in each outer one, as many as
            are to be chosen. Empty: the kernel chooses.

    Raises:
        FileExistsError: A pid is taken.
        PermissionError: Choosing pids needs CAP_CHECKPOINT_RESTORE over the namespace.
        OSError: EINVAL, a pid above the namespace's pid_max.
    """
    ids = (ctypes.c_int32 * max(1, len(pids)))(*pids)
    args = CloneArgs(
        flags=flags,
        exit_signal=signal.SIGCHLD,
        set_tid=ctypes.addressof(ids) if pids else 0,
        set_tid_size=len(pids),
    )
    return Pid(abi.syscall_locked("clone3", args, CLONE_ARGS_BYTES))
