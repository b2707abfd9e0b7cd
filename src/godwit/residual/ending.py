"""What is done to one deputy: calls in it, and what its parent is to see of the program's stops and end."""

from __future__ import annotations

import contextlib
import signal
import struct
from dataclasses import dataclass
from typing import Final

from godwit.errors import RequestError
from godwit.linux import abi, ptrace
from godwit.linux.arch import NR
from godwit.linux.ptrace import SIGINFO_BYTES
from godwit.residual import scratch
from godwit.residual.deputy import Deputy
from godwit.residual.reports import Reports
from godwit.residual.waiting import SI_KERNEL, code_of, number_of
from godwit.tracee.gadgets import Gadgets
from godwit.tracee.task import ALL_SIGNALS, Tracee

_PR_SET_DUMPABLE: Final = 4
_SI_QUEUE: Final = -1
_SI_VALUE_AT: Final = 24
_SI_VALUE_BYTES: Final = 8
_STOPS: Final = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_HARMLESS: Final = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH})
_HIGHEST_SIGNAL: Final = 64


@dataclass(slots=True)
class Kept:
    """A deputy under trace."""

    deputy: Deputy
    task: Tracee
    reports: Reports
    gadgets: Gadgets
    stopped: int = 0  # the signal that stopped it; 0: it runs
    imitated: int = 0  # the signal that we have sent it for its default action, until it is delivered


def check_stops(number: int) -> None:
    """Raise RequestError if the signal stops nobody."""
    if number not in _STOPS:
        raise RequestError(f"signal {number} stops no process")


def check_kills(number: int) -> None:
    """Raise RequestError if the signal by default kills nobody."""
    if not 1 <= number <= _HIGHEST_SIGNAL or number in _STOPS or number in _HARMLESS:
        raise RequestError(f"signal {number} kills no process")


def be_stopped(kept: Kept, number: int) -> None:
    """Send a halted deputy a signal whose default action it will take, and let it go on."""
    kept.imitated = number
    ptrace.set_signal_mask(kept.task.tid, ALL_SIGNALS & ~(1 << (number - 1)))
    ptrace.kill_thread(kept.deputy.pid, kept.task.tid, number)
    with contextlib.suppress(ProcessLookupError):  # killed already, if it was by SIGKILL
        ptrace.resume(kept.task.tid)


def go_on(kept: Kept) -> None:
    """Continue a stopped deputy. The SIGCONT bears a mark: it is not for the program."""
    if kept.stopped:
        info = bytearray(SIGINFO_BYTES)
        struct.pack_into("<iii", info, 0, signal.SIGCONT, 0, _SI_QUEUE)
        info[_SI_VALUE_AT : _SI_VALUE_AT + _SI_VALUE_BYTES] = kept.deputy.cookie[:_SI_VALUE_BYTES]
        # For the thread: a SIGCONT that somebody sends to the process must not be lost in it.
        abi.syscall("rt_tgsigqueueinfo", kept.deputy.pid, kept.task.tid, signal.SIGCONT, bytes(info))


def is_ours(kept: Kept, info: bytes) -> bool:
    """Tell whether a signal is a keeper's doing, this one's or an earlier one's, and not for the program."""
    number, code = number_of(info), code_of(info)
    if number == signal.SIGTRAP and code == SI_KERNEL:
        # What becomes of a stop at a system call whose tracer died; no process can send that.
        return True
    value = info[_SI_VALUE_AT : _SI_VALUE_AT + _SI_VALUE_BYTES]
    marked = value == kept.deputy.cookie[:_SI_VALUE_BYTES]
    return marked and number == signal.SIGCONT and code == _SI_QUEUE


def begin_exit(kept: Kept, code: int) -> None:
    """Let a halted deputy go on into exit_group(2)."""
    registers = kept.task.registers.copy()
    registers.aim_at_call(kept.gadgets.call, NR["exit_group"], (code & 0xFF,))
    ptrace.set_registers(kept.task.tid, registers)
    ptrace.resume(kept.task.tid)


def begin_death(kept: Kept, number: int) -> None:
    """Let a halted deputy die by a signal. It dumps no core: that would overwrite the program's own."""
    scratch.call(kept.task, kept.gadgets, "prctl", _PR_SET_DUMPABLE, 0)
    be_stopped(kept, number)


def let_go(kept: Kept) -> None:
    """Let a halted deputy go on: to run, or to be stopped as it was."""
    with contextlib.suppress(ProcessLookupError):
        kept.task.restore()
        if kept.stopped:
            # A call has taken it out of its stop, and an interrupt takes it there again.
            ptrace.interrupt(kept.task.tid)
        ptrace.resume(kept.task.tid)
