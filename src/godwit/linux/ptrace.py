"""ptrace(2): stop a task, read and write its registers, let it go.

A task answers only the OS thread that seized it; every function here must be called from that
thread.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Final

from godwit.linux import abi
from godwit.linux.arch import UserRegs
from godwit.types import Pid, RemoteAddr, Tid

PTRACE_CONT: Final = 7
PTRACE_SINGLESTEP: Final = 9
PTRACE_GETREGS: Final = 12
PTRACE_SETREGS: Final = 13
PTRACE_DETACH: Final = 17
PTRACE_SYSCALL: Final = 24
PTRACE_SETOPTIONS: Final = 0x4200
PTRACE_GETEVENTMSG: Final = 0x4201
PTRACE_GETSIGINFO: Final = 0x4202
PTRACE_GETREGSET: Final = 0x4204
PTRACE_SETREGSET: Final = 0x4205
PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_LISTEN: Final = 0x4208
PTRACE_PEEKSIGINFO: Final = 0x4209
PTRACE_GETSIGMASK: Final = 0x420A
PTRACE_SETSIGMASK: Final = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION: Final = 0x420F

PTRACE_O_TRACEFORK: Final = 1 << 1
PTRACE_O_TRACEVFORK: Final = 1 << 2
PTRACE_O_TRACECLONE: Final = 1 << 3
PTRACE_O_TRACEEXEC: Final = 1 << 4
PTRACE_O_EXITKILL: Final = 1 << 20

PTRACE_EVENT_FORK: Final = 1
PTRACE_EVENT_VFORK: Final = 2
PTRACE_EVENT_CLONE: Final = 3
PTRACE_EVENT_EXEC: Final = 4
PTRACE_EVENT_STOP: Final = 128

PTRACE_PEEKSIGINFO_SHARED: Final = 1
NT_X86_XSTATE: Final = 0x202

WALL: Final = 0x40000000  # __WALL: children of every kind
WNOTHREAD: Final = 0x20000000  # __WNOTHREAD: not those of other threads

SIGINFO_BYTES: Final = 128
_XSTATE_LIMIT_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Stop:
    """A wait status taken apart: what a tracee told its tracer."""

    status: int

    @property
    def exited(self) -> bool:
        """The task is gone."""
        return os.WIFEXITED(self.status) or os.WIFSIGNALED(self.status)

    @property
    def event(self) -> int:
        """The PTRACE_EVENT_ number, 0 for a stop at a signal."""
        return self.status >> 16

    @property
    def signal(self) -> int:
        """The signal of the stop."""
        return os.WSTOPSIG(self.status)

    @property
    def group_stopped(self) -> bool:
        """The task is stopped by job control (SIGSTOP and its kin)."""
        return self.event == PTRACE_EVENT_STOP and self.signal != 5


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class RseqConfiguration(ctypes.Structure):
    """`struct ptrace_rseq_configuration` of <linux/ptrace.h>."""

    _fields_ = [
        ("rseq_abi_pointer", ctypes.c_uint64),
        ("rseq_abi_size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


class _PeekSiginfoArgs(ctypes.Structure):
    _fields_ = [("off", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("nr", ctypes.c_int32)]


def _ptrace(request: int, tid: Tid, address: object = 0, data: object = 0) -> int:
    return abi.syscall("ptrace", request, tid, address, data)


def seize(tid: Tid, options: int = 0) -> None:
    """Become the tracer of `tid` without stopping it.

    Raises:
        PermissionError: Already traced, or out of our reach.
        ProcessLookupError: The task is gone.
    """
    _ptrace(PTRACE_SEIZE, tid, 0, options)


def interrupt(tid: Tid) -> None:
    """Ask a seized task to stop; `wait_stop` tells when it has."""
    _ptrace(PTRACE_INTERRUPT, tid)


def detach(tid: Tid, signal: int = 0) -> None:
    """Let a stopped task run on untraced, delivering `signal` in place of the one it stopped at."""
    _ptrace(PTRACE_DETACH, tid, 0, signal)


def resume(tid: Tid, signal: int = 0) -> None:
    """Let a stopped task run on under trace."""
    _ptrace(PTRACE_CONT, tid, 0, signal)


def listen(tid: Tid) -> None:
    """Leave a task stopped by job control, until SIGCONT; that shows as a stop of its own."""
    _ptrace(PTRACE_LISTEN, tid)


def single_step(tid: Tid) -> None:
    """Let a stopped task run one instruction."""
    _ptrace(PTRACE_SINGLESTEP, tid)


def resume_to_call(tid: Tid) -> None:
    """Let a stopped task run to the entry of its next system call, or from there to its exit."""
    _ptrace(PTRACE_SYSCALL, tid)


def set_options(tid: Tid, options: int) -> None:
    """Replace the PTRACE_O_ options of a stopped task."""
    _ptrace(PTRACE_SETOPTIONS, tid, 0, options)


def event_message(tid: Tid) -> int:
    """Return what the last event carried: for a clone, the new task's id in our pid namespace."""
    word = (ctypes.c_ulong * 1)()
    _ptrace(PTRACE_GETEVENTMSG, tid, 0, word)
    return int(word[0])


def wait_stop(tid: Tid) -> Stop:
    """Wait until a tracee stops or ends.

    Raises:
        ChildProcessError: It is not (or no longer) ours.
    """
    while True:
        try:
            _, status = os.waitpid(tid, WALL)
        except InterruptedError:  # pragma: no cover
            continue
        return Stop(status)


def poll_stop(tid: Tid) -> Stop | None:
    """Return the stop that is already there, or None."""
    pid, status = os.waitpid(tid, WALL | os.WNOHANG)
    return Stop(status) if pid else None


def poll_any() -> tuple[Tid, Stop] | None:
    """Return a stop that some tracee (or child) of the calling thread has come to, or None."""
    try:
        tid, status = os.waitpid(-1, WALL | WNOTHREAD | os.WNOHANG)
    except ChildProcessError:
        return None
    return (Tid(tid), Stop(status)) if tid else None


def get_siginfo(tid: Tid) -> bytes:
    """Return the siginfo_t of the signal that a task is stopped at."""
    buffer = (ctypes.c_char * SIGINFO_BYTES)()
    _ptrace(PTRACE_GETSIGINFO, tid, 0, buffer)
    return buffer.raw


def get_registers(tid: Tid) -> UserRegs:
    """Read the general registers of a stopped task."""
    regs = UserRegs()
    _ptrace(PTRACE_GETREGS, tid, 0, regs)
    return regs


def set_registers(tid: Tid, regs: UserRegs) -> None:
    """Write the general registers of a stopped task."""
    _ptrace(PTRACE_SETREGS, tid, 0, regs)


def get_xstate(tid: Tid) -> bytes:
    """Read the extended state (FPU, SSE, AVX...) in the machine's XSAVE layout."""
    buffer = (ctypes.c_char * _XSTATE_LIMIT_BYTES)()
    iov = _IoVec(ctypes.addressof(buffer), _XSTATE_LIMIT_BYTES)
    _ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, iov)
    return buffer.raw[: iov.length]


def set_xstate(tid: Tid, state: bytes) -> None:
    """Write the extended state; its length must be exactly this machine's."""
    buffer = (ctypes.c_char * len(state)).from_buffer_copy(state)
    _ptrace(PTRACE_SETREGSET, tid, NT_X86_XSTATE, _IoVec(ctypes.addressof(buffer), len(state)))


def get_signal_mask(tid: Tid) -> int:
    """Read the set of blocked signals. Inside sigsuspend(2) and its kin: the set to come back to."""
    word = (ctypes.c_uint64 * 1)()
    _ptrace(PTRACE_GETSIGMASK, tid, 8, word)
    return int(word[0])


def set_signal_mask(tid: Tid, mask: int) -> None:
    """Write the set of blocked signals."""
    _ptrace(PTRACE_SETSIGMASK, tid, 8, (ctypes.c_uint64 * 1)(mask))


def get_rseq(tid: Tid) -> RseqConfiguration:
    """Read where the task registered its restartable sequences (pointer 0: nowhere).

    Raises:
        OSError: EIO or EINVAL where the kernel has no such request.
    """
    configuration = RseqConfiguration()
    _ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, ctypes.sizeof(configuration), configuration)
    return configuration


def peek_signals(tid: Tid, *, shared: bool) -> tuple[bytes, ...]:
    """Return the siginfo of every pending signal of the task, or of its whole process, oldest first."""
    found: list[bytes] = []
    batch = 32
    buffer = (ctypes.c_char * (SIGINFO_BYTES * batch))()
    while True:
        request = _PeekSiginfoArgs(len(found), PTRACE_PEEKSIGINFO_SHARED if shared else 0, batch)
        count = _ptrace(PTRACE_PEEKSIGINFO, tid, request, buffer)
        raw = bytes(buffer)
        found += [raw[i * SIGINFO_BYTES : (i + 1) * SIGINFO_BYTES] for i in range(count)]
        if count < batch:
            return tuple(found)


def get_robust_list(tid: Tid) -> tuple[RemoteAddr, int]:
    """Return head address and length of the task's robust futex list. get_robust_list(2)."""
    head = (ctypes.c_uint64 * 1)()
    length = (ctypes.c_size_t * 1)()
    abi.syscall("get_robust_list", tid, head, length)
    return RemoteAddr(int(head[0])), int(length[0])


def kill_thread(pid: Pid, tid: Tid, signal: int) -> None:
    """Send a signal to one thread. tgkill(2)."""
    abi.syscall("tgkill", pid, tid, signal)
