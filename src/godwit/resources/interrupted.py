"""System calls that the freeze interrupted: restart_syscall(2), signal(7).

At the stop the result register tells what the kernel would do next. ERESTARTSYS, ERESTARTNOINTR and
ERESTARTNOHAND need nothing: the kernel that lets the task go acts on the registers alone. Three do:

- EINTR from a call that never restarts (epoll_wait and its kin) was caused by our stop, with no
  signal to deliver. It becomes ERESTARTNOHAND: made again, unless a handler runs first, which is
  what the program would have seen.
- ERESTART_RESTARTBLOCK keeps the time of expiry in the kernel, out of reach. We know the timeout from
  the arguments and when the task last ran from /proc/PID/sched; at the destination the call is made
  once more with what is left, interrupted, and so leaves a restart block there.
- getrandom(2) that has filled some pages returns early, as for a signal handler. It gets the rest.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from godwit.linux.arch import NR, UserRegs
from godwit.types import RemoteAddr

EINTR: Final = -4
ERESTARTNOHAND: Final = -514
ERESTART_RESTARTBLOCK: Final = -516

_NEVER_RESTARTED: Final = frozenset(
    NR[name]
    for name in (
        "epoll_wait epoll_pwait epoll_pwait2 rt_sigtimedwait semop semtimedop io_getevents io_pgetevents"
        " read readv write writev recvfrom recvmsg recvmmsg sendto sendmsg sendmmsg accept accept4"
    ).split()
)
_TIMEOUT_IN_R10: Final = frozenset({NR["epoll_wait"], NR["epoll_pwait"]})
_BY_WAIT_CHANNEL: Final = {
    # The compiler leaves no frame of the sleeps' own, and one of each other call.
    "do_syscall_64": "clock_nanosleep",
    "hrtimer_nanosleep": "clock_nanosleep",
    "hrtimer_nanosleep_restart": "clock_nanosleep",
    "do_nanosleep": "clock_nanosleep",
    "do_sys_poll": "poll",
    "do_poll": "poll",
    "poll_schedule_timeout": "poll",
    "futex_wait_queue": "futex",
    "futex_do_wait": "futex",
    "__futex_wait": "futex",
    "futex_wait": "futex",
}
_TIMESPEC: Final = struct.Struct("<qq")
_NS: Final = 1_000_000_000
_RANDOM_STEP_BYTES: Final = 4096  # the kernel's PAGE_SIZE
_RANDOM_LIMIT_BYTES: Final = 0x7FFFF000  # MAX_RW_COUNT
_TIMER_ABSTIME: Final = 1
_FUTEX_CMD_MASK: Final = 0x7F
_FUTEX_WAIT: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepEntry:
    """A call with a timeout, to be begun again with what is left of it."""

    call: str
    arguments: tuple[int, int, int, int, int, int]
    deadline_ns: int | None  # on the process's CLOCK_MONOTONIC; None: the arguments hold an absolute time


def correct(registers: UserRegs) -> bool:
    """Turn an EINTR that our stop caused into one that only a handler would see; tell whether it was."""
    if registers.result != EINTR or registers.call_number not in _NEVER_RESTARTED:
        return False
    registers.rax = ERESTARTNOHAND & 0xFFFFFFFFFFFFFFFF
    return True


def unfilled(registers: UserRegs) -> tuple[RemoteAddr, int]:
    """Return where a getrandom(2) was to go on when the stop made it return early, and for how many bytes.

    Between whole pages it looks for signals; without one it never gives less than was asked for. (0, 0) for
    everything else.
    """
    if registers.call_number != NR["getrandom"]:
        return RemoteAddr(0), 0
    buffer, wanted, *_ = registers.arguments
    done = registers.result
    if not 0 < done < wanted or done % _RANDOM_STEP_BYTES:
        return RemoteAddr(0), 0
    return RemoteAddr(buffer + done), min(wanted, _RANDOM_LIMIT_BYTES) - done


def has_timeout_register(registers: UserRegs) -> bool:
    """Tell whether the corrected call has a timeout in milliseconds in a register: epoll_wait(2)."""
    return registers.call_number in _TIMEOUT_IN_R10 and 0 < registers.r10 & 0xFFFFFFFF < 1 << 31


def shorten(registers: UserRegs, slept_ns: int) -> None:
    """Take the time slept off that timeout. The register belongs to the callee, as r10 does."""
    left_ms = (registers.r10 & 0xFFFFFFFF) - max(0, slept_ns) // 1_000_000
    registers.r10 = max(0, left_ms)


def is_sleeping(registers: UserRegs) -> bool:
    """Tell whether the task waits in a call whose expiry only the kernel knows."""
    return registers.call_number >= 0 and registers.result == ERESTART_RESTARTBLOCK


def call_of(registers: UserRegs, wait_channel: str) -> str | None:
    """Name the sleeping call; None where it cannot be told.

    A task that was stopped before sits in restart_syscall(2), and its wait channel tells the rest.
    """
    number = registers.call_number
    if number != NR["restart_syscall"]:
        names = ("nanosleep", "clock_nanosleep", "poll", "futex")
        return next((name for name in names if NR[name] == number), None)
    name = _BY_WAIT_CHANNEL.get(wait_channel.partition(".")[0])
    if name == "clock_nanosleep" and not _looks_like_clock(registers):
        return "nanosleep"
    return name


def is_restarted(registers: UserRegs) -> bool:
    """Tell whether the task sleeps in restart_syscall(2), and so was interrupted before."""
    return registers.call_number == NR["restart_syscall"]


def _looks_like_clock(registers: UserRegs) -> bool:
    # clock_nanosleep(clock, flags, ...) against nanosleep(pointer, pointer).
    return registers.rdi < 0x1000 and registers.rsi <= _TIMER_ABSTIME


def timeout_pointer(call: str, arguments: tuple[int, ...]) -> int:
    """Return the address of the call's relative `struct timespec`; 0 if it has none there."""
    match call:
        case "nanosleep":
            return arguments[0]
        case "clock_nanosleep":
            return 0 if arguments[1] & _TIMER_ABSTIME else arguments[2]
        case "futex":
            return arguments[3] if arguments[1] & _FUTEX_CMD_MASK == _FUTEX_WAIT else 0
        case _:
            return 0


def timeout_ns(call: str, arguments: tuple[int, ...], timespec: bytes) -> int | None:
    """Return the call's relative timeout in ns, or None if its time is absolute."""
    if call == "poll":
        milliseconds = arguments[2] & 0xFFFFFFFF
        return None if milliseconds >> 31 else milliseconds * 1_000_000
    if not timespec:
        return None
    seconds, nanoseconds = _TIMESPEC.unpack(timespec)
    return int(seconds * _NS + nanoseconds)


def rearmed(entry: SleepEntry, now_ns: int) -> tuple[tuple[int, ...], bytes]:
    """Return the arguments to begin the call again with, and a timespec to place for it.

    Where the timespec is not empty, its address takes the place of the argument that is -1.
    """
    arguments = list(entry.arguments)
    if entry.deadline_ns is None:
        return tuple(arguments), b""
    left_ns = max(0, entry.deadline_ns - now_ns)
    if entry.call == "poll":
        arguments[2] = min(-(-left_ns // 1_000_000), 0x7FFFFFFF)
        return tuple(arguments), b""
    place = {"nanosleep": 0, "clock_nanosleep": 2, "futex": 3}[entry.call]
    arguments[place] = -1
    return tuple(arguments), _TIMESPEC.pack(left_ns // _NS, left_ns % _NS)
