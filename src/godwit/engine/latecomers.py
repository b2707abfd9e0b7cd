"""Signals that reach a frozen tree after it was captured: they go along with the decision.

signal(7), rt_sigqueueinfo(2). What a timer of the tree sends is left out: the timer goes along, with the
time that it had left, and sends it again. A SIGKILL is no latecomer but the end: the move is given up.
"""

from __future__ import annotations

import contextlib
import signal
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from godwit.engine.freeze import FrozenTree
from godwit.errors import NoProcessError
from godwit.linux import abi, ptrace
from godwit.procfs import stat
from godwit.resources.process import ProcessEntry
from godwit.resources.signals import number_of
from godwit.types import Pid, Tid

_SI_KERNEL: Final = 0x80
_SI_TIMER: Final = -2
_SI_TKILL: Final = -6
_OF_INTERVAL_TIMERS: Final = (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF)


@dataclass(frozen=True, slots=True, kw_only=True)
class LateSignal:
    """A signal on its way. Ids are the tree's own."""

    pid: int
    tid: int  # 0: for the process as a whole
    info: bytes  # siginfo_t


def check_alive(frozen: FrozenTree) -> None:
    """See that nobody has killed a process of the frozen tree. Raises NoProcessError."""
    for pid in frozen.tracees:
        state = ""
        with contextlib.suppress(ProcessLookupError):
            state = stat.read(pid).state
        if state != "t":
            raise NoProcessError(f"pid {pid} was killed while it was frozen")


def collect(
    frozen: FrozenTree, processes: Iterable[ProcessEntry], outer: Mapping[int, Pid]
) -> tuple[LateSignal, ...]:
    """Return what waits now and did not when the processes were captured.

    `outer` maps the tree's own pids to ours.
    """
    return tuple(
        late for process in processes for late in _of_process(frozen, process, outer[process.identity.pid])
    )


def _of_process(frozen: FrozenTree, process: ProcessEntry, pid: Pid) -> Iterator[LateSignal]:
    inner = process.identity.pid
    shared = ptrace.peek_signals(frozen.leader(pid).tid, shared=True)
    for info in _new(shared, process.signals.pending):
        yield LateSignal(pid=inner, tid=0, info=info)
    # In the order of the image: the leader, then by number.
    tids = sorted(frozen.tracees[pid], key=lambda tid: (tid != Tid(pid), tid))
    for tid, own in zip(tids, process.threads, strict=True):
        for info in _new(ptrace.peek_signals(tid, shared=False), own.pending):
            yield LateSignal(pid=inner, tid=own.tid, info=info)


def _new(now: tuple[bytes, ...], before: tuple[bytes, ...]) -> list[bytes]:
    known = Counter(before)
    found: list[bytes] = []
    for info in now:
        if known[info]:
            known[info] -= 1
        elif not _is_ours_or_a_timers(info):
            found.append(info)
    return found


def _is_ours_or_a_timers(info: bytes) -> bool:
    number, code = number_of(info), struct.unpack_from("<i", info, 8)[0]
    if number == signal.SIGSTOP or code == _SI_TIMER:
        return True
    return code == _SI_KERNEL and number in _OF_INTERVAL_TIMERS


def deliver(late: LateSignal, pid: Pid, tid: Tid | None) -> None:
    """Queue a latecomer to a stopped process of ours, or to one of its threads.

    What somebody sent with kill(2) comes from us instead: the kernel lets nobody write his name there.
    """
    number, code = number_of(late.info), struct.unpack_from("<i", late.info, 8)[0]
    with contextlib.suppress(ProcessLookupError):
        if code < 0 and code != _SI_TKILL:
            if tid is None:
                abi.syscall("rt_sigqueueinfo", pid, number, late.info)
            else:
                abi.syscall("rt_tgsigqueueinfo", pid, tid, number, late.info)
        elif tid is None:
            abi.syscall("kill", pid, number)
        else:
            ptrace.kill_thread(pid, tid, number)
