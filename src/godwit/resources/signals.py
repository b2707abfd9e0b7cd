"""Signal actions and waiting signals of a process: sigaction(2), rt_sigqueueinfo(2), signal(7)."""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from godwit.linux import ptrace
from godwit.tracee.calls import Batch
from godwit.types import RemoteAddr, Tid

# The kernel's own struct sigaction, not the C library's: handler, flags, restorer, mask.
_KERNEL_SIGACTION: Final = struct.Struct("<QQQQ")
_DEFAULT: Final = bytes(_KERNEL_SIGACTION.size)
SIGNAL_SET_BYTES: Final = 8
HIGHEST_SIGNAL: Final = 64
_UNCHANGEABLE: Final = (signal.SIGKILL, signal.SIGSTOP)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalAction:
    """What a process does about one signal."""

    number: int
    handler: int  # address; 0 default, 1 ignore
    flags: int  # SA_*
    restorer: int
    mask: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalsEntry:
    """Signal actions that are not the default, and the signals waiting for the process as a whole."""

    actions: tuple[SignalAction, ...]
    pending: tuple[bytes, ...]  # siginfo_t, oldest first


def collect(batch: Batch, leader: Tid) -> Callable[[], SignalsEntry]:
    """Queue the questions; after the batch has run the answer is the entry.

    All are asked for: /proc/PID/status shows no default action that has flags (SA_NOCLDWAIT).
    """
    numbers = [n for n in range(1, HIGHEST_SIGNAL + 1) if n not in _UNCHANGEABLE]
    spaces: list[RemoteAddr] = []
    for number in numbers:
        space = batch.space(_KERNEL_SIGACTION.size)
        batch.add("rt_sigaction", number, 0, space, SIGNAL_SET_BYTES)
        spaces.append(space)
    pending = ptrace.peek_signals(leader, shared=True)

    def answer() -> SignalsEntry:
        actions: list[SignalAction] = []
        for number, space in zip(numbers, spaces, strict=True):
            raw = batch.answer(space, _KERNEL_SIGACTION.size)
            if raw == _DEFAULT:
                continue
            handler, flags, restorer, mask = _KERNEL_SIGACTION.unpack(raw)
            actions.append(
                SignalAction(number=number, handler=handler, flags=flags, restorer=restorer, mask=mask)
            )
        return SignalsEntry(actions=tuple(actions), pending=pending)

    return answer


def restore(entry: SignalsEntry, batch: Batch) -> None:
    """Queue every action, the default ones too: a stub inherits what its maker ignored."""
    default = batch.data(_DEFAULT)
    special = {action.number: action for action in entry.actions}
    for number in range(1, HIGHEST_SIGNAL + 1):
        if number in _UNCHANGEABLE:
            continue
        action = special.get(number)
        address = default
        if action is not None:
            words = (action.handler, action.flags, action.restorer, action.mask)
            address = batch.data(_KERNEL_SIGACTION.pack(*words))
        batch.add("rt_sigaction", number, address, 0, SIGNAL_SET_BYTES)


def queue_for_process(pending: tuple[bytes, ...], batch: Batch, pid: int) -> None:
    """Queue the waiting signals to the process from within, where any siginfo is allowed."""
    for info in pending:
        batch.make_room()
        batch.add("rt_sigqueueinfo", pid, number_of(info), info)


def queue_for_thread(pending: tuple[bytes, ...], batch: Batch, pid: int, tid: int) -> None:
    """Queue the waiting signals to one thread from within."""
    for info in pending:
        batch.make_room()
        batch.add("rt_tgsigqueueinfo", pid, tid, number_of(info), info)


def number_of(info: bytes) -> int:
    """Return the signal number in a siginfo_t."""
    return int(struct.unpack_from("<i", info)[0])
