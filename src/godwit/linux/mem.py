"""Foreign memory: process_vm_readv(2), process_vm_writev(2) and /proc/PID/mem."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Final

from godwit.linux import abi
from godwit.types import OwnedFd, Pid, RemoteAddr

IOV_MAX: Final = 1024


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of the interpreter."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


def address_of(buffer: memoryview) -> int:
    """Return the address of a buffer's first byte in this process; good for as long as the buffer is held."""
    if not buffer.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    found = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(found), 0)
    try:
        return int(found.buf or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(found))


def _vectors(runs: Sequence[tuple[int, int]]) -> ctypes.Array[_IoVec]:
    return (_IoVec * len(runs))(*(_IoVec(start, length) for start, length in runs))


def read_runs(pid: Pid, runs: Sequence[tuple[RemoteAddr, int]], into: memoryview) -> int:
    """Read (start, length) runs of a process one after another into the buffer.

    At most IOV_MAX runs. Returns the bytes read, fewer where a page is absent or unreadable.
    """
    total = sum(length for _, length in runs)
    local = _vectors([(address_of(into), total)])
    return abi.syscall("process_vm_readv", pid, local, 1, _vectors(runs), len(runs), 0)


def write_runs(pid: Pid, runs: Sequence[tuple[RemoteAddr, int]], data: memoryview) -> int:
    """Write the buffer to (start, length) runs of a process. Returns the bytes written."""
    total = sum(length for _, length in runs)
    local = _vectors([(address_of(data), total)])
    return abi.syscall("process_vm_writev", pid, local, 1, _vectors(runs), len(runs), 0)


def open_memory(pid: Pid, proc: str = "/proc") -> OwnedFd:
    """Open /proc/PID/mem, which reads and writes past page protections (proc(5))."""
    return OwnedFd(os.open(f"{proc}/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))


def read_all(pid: Pid, runs: Sequence[tuple[int, int]], into: memoryview) -> int:
    """Read (start, end) runs of a process, whatever their protection, one after another.

    Returns the bytes read, always all of them.

    Raises:
        OSError: EIO or EFAULT, a page is not there.
    """
    total = sum(end - start for start, end in runs)
    pairs = [(RemoteAddr(start), end - start) for start, end in runs]
    done = 0
    for first in range(0, len(pairs), IOV_MAX):
        batch = pairs[first : first + IOV_MAX]
        length = sum(size for _, size in batch)
        try:
            got = read_runs(pid, batch, into[done : done + length])
        except OSError:
            got = 0
        if got < length:
            _read_protected(pid, batch, into[done : done + length])
        done += length
    return total


def _read_protected(pid: Pid, runs: Sequence[tuple[RemoteAddr, int]], into: memoryview) -> None:
    """Read through /proc/PID/mem, which does not mind PROT_NONE."""
    with open_memory(pid) as memory:
        at = 0
        for start, length in runs:
            got = 0
            while got < length:
                count = os.preadv(memory.number, [into[at + got : at + length]], start + got)
                if count == 0:
                    abi.fail(errno.EIO, f"page at {start + got:#x} of pid {pid}")
                got += count
            at += length


def write_all(pid: Pid, memory: OwnedFd, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
    """Write the buffer over (start, end) runs of a process, whatever their protection.

    Args:
        pid: The process.
        memory: Its /proc/PID/mem.
        runs: In address order; together as long as `data`.
        data: A writable buffer (its address is taken).
    """
    pairs = [(RemoteAddr(start), end - start) for start, end in runs]
    at = 0
    for first in range(0, len(pairs), IOV_MAX):
        batch = pairs[first : first + IOV_MAX]
        length = sum(size for _, size in batch)
        try:
            done = write_runs(pid, batch, data[at : at + length])
        except OSError:
            done = 0
        if done < length:
            _write_protected(memory, batch, data[at : at + length])
        at += length


def _write_protected(memory: OwnedFd, runs: Sequence[tuple[RemoteAddr, int]], data: memoryview) -> None:
    at = 0
    for start, length in runs:
        done = 0
        while done < length:
            done += os.pwritev(memory.number, [data[at + done : at + length]], start + done)
        at += length
