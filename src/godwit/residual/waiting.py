"""Signals that wait for a process while it becomes a deputy: those that went along are dropped, others stay.

signal(7), rt_sigtimedwait(2), rt_sigqueueinfo(2). Every signal is blocked by then.
"""

from __future__ import annotations

import itertools
import signal
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from godwit.linux import ptrace
from godwit.linux.ptrace import SIGINFO_BYTES
from godwit.procfs import status
from godwit.tracee.calls import Workshop
from godwit.tracee.task import Tracee

_SET_BYTES: Final = 8
_NO_WAIT: Final = bytes(16)
SI_KERNEL: Final = 0x80
_OF_INTERVAL_TIMERS: Final = (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF)
_AT_ONCE: Final = 100  # fits the workshop's data area


def number_of(info: bytes) -> int:
    """Return the signal that a siginfo_t is of."""
    return int.from_bytes(info[:4], "little")


def code_of(info: bytes) -> int:
    """Return si_code: how it was sent."""
    return int(struct.unpack_from("<i", info, 8)[0])


def drop_carried(workshop: Workshop, threads: Sequence[Tracee], carried: Iterable[bytes]) -> None:
    """Leave waiting for the process what is not in `carried`, and drop the rest.

    What waited for a thread that ends now waits for the process. What an interval timer sent is dropped
    too: the timer has gone along, with the time that it had left.

    Raises:
        OSError: EAGAIN, the user has too many signals queued (RLIMIT_SIGPENDING).
    """
    leader, *others = threads
    known = Counter(carried)
    waiting = [*ptrace.peek_signals(leader.tid, shared=False), *ptrace.peek_signals(leader.tid, shared=True)]
    touched = {number_of(info) for info in known} | set(_OF_INTERVAL_TIMERS)
    counts = Counter(number for info in waiting if (number := number_of(info)) in touched)
    taken = [info for number, count in counts.items() for info in _take(workshop, leader, number, count)]
    # A thread's SIGSTOP may be ours, of `park`; nobody is told of one that stops the whole process anyway.
    orphaned = itertools.chain.from_iterable(ptrace.peek_signals(task.tid, shared=False) for task in others)
    back = [info for info in (*taken, *orphaned) if number_of(info) != signal.SIGSTOP]
    _queue(workshop, leader, [info for info in _without(back, known) if not _of_interval_timer(info)])


def _without(infos: Iterable[bytes], known: Counter[bytes]) -> Iterator[bytes]:
    for info in infos:
        if known[info]:
            known[info] -= 1
        else:
            yield info


def _of_interval_timer(info: bytes) -> bool:
    return code_of(info) == SI_KERNEL and number_of(info) in _OF_INTERVAL_TIMERS


def _take(workshop: Workshop, leader: Tracee, number: int, count: int) -> Iterator[bytes]:
    for first in range(0, count, _AT_ONCE):
        batch = workshop.batch(leader)
        spaces = [batch.space(SIGINFO_BYTES) for _ in range(min(_AT_ONCE, count - first))]
        one = batch.data(struct.pack("<Q", 1 << (number - 1)))
        at_once = batch.data(_NO_WAIT)
        for space in spaces:
            # SIGCONT throws waiting stop signals away: what was there a moment ago may not be now.
            batch.add("rt_sigtimedwait", one, space, at_once, _SET_BYTES, may_fail=True)
        for result, space in zip(batch.run(), spaces, strict=True):
            if result > 0:
                yield batch.answer(space, SIGINFO_BYTES)


def _queue(workshop: Workshop, leader: Tracee, infos: Sequence[bytes]) -> None:
    """Have the process send signals to itself: only so may si_code say that somebody else did."""
    itself = status.read_inner(leader.pid, leader.tid)
    for first in range(0, len(infos), _AT_ONCE):
        batch = workshop.batch(leader)
        for info in infos[first : first + _AT_ONCE]:
            batch.add("rt_sigqueueinfo", itself, number_of(info), info)
        batch.run()
