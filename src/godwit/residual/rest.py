"""Putting the threads of a process that has left to rest: none ever runs code of the program again.

A thread at rest makes pause(2) for ever, with every signal blocked. Nothing but its registers keeps it there,
so it stays whatever happens to its tracer, and injected calls with a way back come back to where it rests.
Its program is overwritten where need be: it will not run again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Final

from godwit.errors import InternalError, UnsupportedStateError
from godwit.linux import mem, ptrace
from godwit.linux.arch import CALL_AND_WAY_BACK, NR, WAY_BACK_AT
from godwit.procfs import maps
from godwit.procfs.maps import Mapping
from godwit.tracee.gadgets import Gadgets
from godwit.tracee.task import ALL_SIGNALS, Tracee
from godwit.types import Pid, Tid

_FRAME_ROOM_BYTES: Final = 32 << 10  # a signal frame with the largest extended state, below the stack pointer


def put_to_rest(threads: Sequence[Tracee]) -> Gadgets:
    """Set registers and mask of all threads of a stopped process; return where calls can be made in it.

    Parked threads are unparked: they need no SIGSTOP to stay. Of a process that was not parked, a thread
    whose turn has not come yet would run on if we died. The threads are left stopped, and saved at rest.

    Args:
        threads: Of one process, the leader first: a SIGSTOP for the process as a whole must reach its hands.

    Raises:
        UnsupportedStateError: The leader has ended, or there is no memory to write to. Nothing was changed.
        NoProcessError: It was killed.
    """
    leader = threads[0]
    if leader.tid != Tid(leader.pid):
        raise UnsupportedStateError(
            "a process whose first thread has ended",
            where=f"pid {leader.pid}",
            why="execve(2) keeps the pid of that thread only",
        )
    mappings = maps.read_maps(leader.pid)
    code, stack = _place_for_code(leader.pid, mappings), _place_for_stack(leader.pid, mappings)
    with mem.open_memory(leader.pid) as memory:
        if os.pwrite(memory.number, CALL_AND_WAY_BACK, code) != len(CALL_AND_WAY_BACK):
            raise InternalError(f"pid {leader.pid}: its code cannot be written to")
    gadgets = Gadgets(code, code + WAY_BACK_AT)
    for task in threads:
        _rest(task, gadgets, stack)
    for task in threads:
        _unpark(task, [other for other in threads if other is not task])
    return gadgets


def _rest(task: Tracee, gadgets: Gadgets, stack: int) -> None:
    task.save()
    task.registers.aim_at_call(gadgets.call, NR["pause"], ())
    task.registers.return_into(stack)
    task.signal_mask = ALL_SIGNALS
    task.replace_all()


def _unpark(task: Tracee, others: Sequence[Tracee]) -> None:
    waiting = ptrace.peek_signals(task.tid, shared=False)
    if any(int.from_bytes(info[:4], "little") == signal.SIGSTOP for info in waiting):
        task.unpark(others)


def _place_for_code(pid: Pid, mappings: Sequence[Mapping]) -> int:
    for mapping in mappings:
        if mapping.executable and not mapping.shared and not mapping.path.startswith("["):
            return mapping.start
    raise UnsupportedStateError(
        "a process without code of its own", where=f"pid {pid}", why="nothing to write to"
    )


def _place_for_stack(pid: Pid, mappings: Sequence[Mapping]) -> int:
    """Return a stack pointer with room below it: the program's own may have none."""
    writable = [each for each in mappings if each.writable and each.readable and not each.shared]
    largest = max(writable, key=lambda each: each.length_bytes, default=None)
    if largest is None or largest.length_bytes < _FRAME_ROOM_BYTES:
        raise UnsupportedStateError("a process without memory", where=f"pid {pid}", why="nothing to write to")
    return largest.start + _FRAME_ROOM_BYTES
