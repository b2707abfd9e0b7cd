"""A pod's init as the keeper of descriptors that must live as long as the pod does."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from typing import Final

from godwit.engine.stub import Stub, Transfer
from godwit.errors import BusyError
from godwit.linux import pidfd, ptrace
from godwit.linux.pause import pause
from godwit.tracee import calls, gadgets
from godwit.tracee.task import Tracee
from godwit.types import Fd, OwnedFd, Pid, Tid

_LET_GO_WITHIN_S: Final = 1.0
_AGAIN_S: Final = 0.002


def take(init: Pid, number: int) -> OwnedFd:
    """Duplicate a descriptor that an init keeps. Raises ProcessLookupError, OSError: EBADF."""
    with pidfd.pidfd_open(init) as process:
        return pidfd.pidfd_getfd(process.number, Fd(number))


def keep(init: Pid, fd: Fd) -> int:
    """Have a running init keep a descriptor too; return its number there.

    Raises:
        GodwitError, OSError: It cannot be stopped, or has ended.
    """
    with _stopped(init) as (task, workshop):
        batch = workshop.batch(task)
        pair = batch.space(8)
        batch.add("socketpair", socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, pair)
        batch.run()
        near, far = struct.unpack("<ii", batch.answer(pair, 8))
        with take(init, near) as ours, socket.socket(fileno=ours.detach()) as connection:
            workshop.call(task, "close", near)
            stub = Stub(1, task, workshop, Transfer(connection, connection), far)
            (number,) = stub.deliver([fd])
            workshop.call(task, "close", far)
        return number


def let_go(init: Pid, numbers: Iterable[int]) -> None:
    """Have a running init close what it kept. One that has ended has closed it already."""
    wanted = [number for number in numbers if number >= 0]
    if not wanted:
        return
    with contextlib.suppress(ProcessLookupError), _stopped(init) as (task, workshop):
        batch = workshop.batch(task)
        for number in wanted:
            batch.make_room()
            batch.add("close", number)
        batch.run()


def _seized(init: Pid) -> Tracee:
    """Seize an init; who is about to let go of it is given a moment."""
    deadline = time.monotonic() + _LET_GO_WITHIN_S
    while True:
        try:
            return Tracee.seize(init, Tid(init))
        except BusyError:
            if time.monotonic() > deadline:
                raise
            pause(_AGAIN_S)


@contextlib.contextmanager
def _stopped(init: Pid) -> Iterator[tuple[Tracee, calls.Workshop]]:
    task = _seized(init)
    try:
        ptrace.interrupt(task.tid)
        task.wait_until_stopped()
        task.save()
        # Should we be killed meanwhile, it must go on, or everything in the pod ends with it.
        with calls.opened(task, gadgets=gadgets.of_process(init)) as workshop:
            yield task, workshop
    finally:
        task.detach()
