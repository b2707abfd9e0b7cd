"""A program that holds one thing and counts into a file: `holder.py WHAT LOG`. Run by test_bad_targets."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import pty
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

from godwit.linux import abi, ptrace
from godwit.types import Tid

LIBC = ctypes.CDLL(None, use_errno=True)
NO_SUCH = 77  # exit status: this kernel has no such thing
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 38, 22
_CLONE_FILES, _CLONE_NEWUTS = 0x400, 0x4000000
_MAP_NORESERVE = 0x4000
_MAP_HUGETLB = 0x40000
_F_SETSIG = 10


class _SockFilter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def _seccomp() -> object:
    allow = ctypes.create_string_buffer(struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000), 8)
    program = _SockFilter(1, ctypes.addressof(allow))
    assert LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert LIBC.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0
    return None


def _sysv() -> object:
    LIBC.shmat.restype = ctypes.c_void_p
    ident = LIBC.shmget(0, 4096, 0o1600)
    assert ident >= 0
    address = LIBC.shmat(ident, None, 0)
    LIBC.shmctl(ident, 0, None)  # IPC_RMID: it ends with its last user
    return address


def _connected() -> object:
    return socket.create_connection(("127.0.0.1", int(os.environ["HOLDER_PORT"])))


def _async() -> object:
    """Signals about a file go to our parent, which stays; SIGURG does nothing to it."""
    left, right = socket.socketpair()
    fcntl.fcntl(left, _F_SETSIG, signal.SIGURG)
    fcntl.fcntl(left, fcntl.F_SETOWN, os.getppid())
    fcntl.fcntl(left, fcntl.F_SETFL, fcntl.fcntl(left, fcntl.F_GETFL) | os.O_ASYNC)
    return left, right


def _lease() -> object:
    fd = os.open(sys.argv[2] + ".leased", os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    return fd


def _aio() -> object:
    context = ctypes.c_ulong(0)
    abi.syscall("io_setup", 8, ctypes.addressof(context))
    return context


def _hugetlb() -> object:
    # Without a reservation, so that a machine without huge pages has the mapping all the same.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB | _MAP_NORESERVE
    return mmap.mmap(-1, 2 << 20, flags)


def _unshared_thread() -> object:
    def work() -> None:
        assert LIBC.unshare(_CLONE_FILES) == 0
        threading.Event().wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _child() -> int:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    return pid


def _tracing() -> object:
    pid = _child()
    ptrace.seize(Tid(pid), 0)
    return pid


def _child_in_a_namespace() -> object:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        assert LIBC.unshare(_CLONE_NEWUTS) == 0
        os.write(writing, b"x")
        os.close(reading)
        os.close(writing)
        signal.pause()
        os._exit(0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return pid


def _perf() -> object:
    attributes = struct.pack("<IIQQQQQ", 1, 112, 0, 0, 0, 0, 0x20) + bytes(64)
    return abi.syscall("perf_event_open", attributes, 0, -1, -1, 0)


MAKERS: dict[str, Callable[[], Any]] = {
    "terminal": pty.openpty,
    "inotify": lambda: LIBC.inotify_init1(0),
    "fanotify": lambda: abi.syscall("fanotify_init", 0, 0),
    "io_uring": lambda: abi.syscall("io_uring_setup", 4, bytes(120)),
    "userfaultfd": lambda: abi.syscall("userfaultfd", 1),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
    "perf": _perf,
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "proc": lambda: os.open("/proc/self/maps", os.O_RDONLY),
    "seccomp": _seccomp,
    "sysv": _sysv,
    "tcp": _connected,
    "async": _async,
    "lease": _lease,
    "aio": _aio,
    "hugetlb": _hugetlb,
    "thread_with_files": _unshared_thread,
    "tracing": _tracing,
    "child_in_namespace": _child_in_a_namespace,
    "inherited": lambda: None,
}


def main() -> None:
    what, log = sys.argv[1:3]
    try:
        held = MAKERS[what]()
    except (OSError, KeyError):
        sys.exit(NO_SUCH)
    with open(log, "ab", buffering=0) as file:
        number = 0
        while True:
            file.write(b"%d\n" % number)
            number += 1
            select.select([], [], [], 0.002)
    del held


if __name__ == "__main__":
    main()
