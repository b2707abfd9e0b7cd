"""A move that leaves the job's home here: both ends of it. Decision 0011.

The keeper at home connects to the host's before the host prepares. There the tree gets the home's files as
its root; here its tasks become deputies when it has gone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Self

from godwit.engine import freeze
from godwit.engine.build import Builder
from godwit.engine.freeze import FrozenTree
from godwit.engine.latecomers import LateSignal
from godwit.errors import DestinationError, GodwitError, NoProcessError, Refusal, RefusedError
from godwit.linux import fuse, mount, ns
from godwit.log import log
from godwit.migrate.entries import HeaderEntry
from godwit.migrate.journal import Member, Record
from godwit.procfs import stat, tasks
from godwit.residual import control, deputy, keeping
from godwit.residual.deputy import Deputy
from godwit.residual.keeping import Arrived, Depart, Deputize, Drop, Pump, Task
from godwit.resources.process import ProcessEntry
from godwit.types import Fd, OwnedFd, Pid

FEATURE: Final = "home"
# What the host gives the tree of its own, besides /proc.
_OWN: Final = ("dev", "sys")


def job_of(migration: str) -> bytes:
    """Return the name of the job that leaves home by this move."""
    return bytes.fromhex(migration)[: control.JOB_BYTES] + b"\0"


# --- home -----------------------------------------------------------------------------------------


def check(root: Pid) -> None:
    """See that every process of a tree could have a deputy here. Raises RefusedError."""
    found = [refusal for pid in _living(root) for refusal in deputy.obstacles(pid)]
    if found:
        raise RefusedError(found)


def _living(root: Pid) -> Iterator[Pid]:
    with contextlib.suppress(ProcessLookupError):
        if stat.read(root).state not in "ZX":
            yield root
            for child in tasks.children(root):
                yield from _living(child)


def depart(migration: str, pid: Pid, host: str, features: frozenset[str]) -> None:
    """Have our keeper connect to the host's, and answer for the files of the job.

    Raises:
        RefusedError: The host's Godwit is too old.
        KeeperError: There is no connection.
    """
    if FEATURE not in features:
        raise RefusedError(
            [
                Refusal(
                    what="leaving its home here",
                    where="destination",
                    why="its Godwit is older, or may not mount file systems",
                    remedy="update it, or move without --home",
                )
            ]
        )
    keeping.ask(Depart(job=job_of(migration), pid=pid, host=host))


def stay(migration: str) -> None:
    """Take `depart` back: the job does not leave, or has not."""
    with contextlib.suppress(GodwitError, OSError):
        keeping.ask_if_there(Drop(job=job_of(migration)))


def leave_deputies(
    record: Record, frozen: FrozenTree, tree: tuple[ProcessEntry, ...], late: tuple[LateSignal, ...]
) -> None:
    """Turn the parked tasks of a tree that runs elsewhere into deputies, and give them to our keeper.

    Raises:
        GodwitError: One of them cannot be; it stays stopped, and `settle` tries again.
    """
    carried = dict(_carried(tree, late))
    inner = {Pid(member.pid): member.inner for member in record.members}
    made = tuple(
        (inner[pid], deputy.become(list(group.values()), record.cookie, carried=carried.get(inner[pid], ())))
        for pid, group in frozen.tracees.items()
    )
    frozen.tracees.clear()
    _hand_over(record, made)


def _carried(
    tree: tuple[ProcessEntry, ...], late: tuple[LateSignal, ...]
) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    """Yield the signals that went along with each process."""
    for process in tree:
        inner = process.identity.pid
        own = (info for thread in process.threads for info in thread.pending)
        after = (each.info for each in late if each.pid == inner)
        yield inner, (*process.signals.pending, *own, *after)


def settle_deputies(record: Record) -> None:
    """Do what `leave_deputies` has left undone, after the death of who did it.

    What signals went along nobody knows any more: those that wait now are delivered once more.
    """
    made: list[tuple[int, Deputy]] = []
    for member in record.members:
        with contextlib.suppress(NoProcessError, ProcessLookupError):
            made.append((member.inner, _deputy_of(member, record.cookie)))
    _hand_over(record, tuple(made), parked=True)


def _deputy_of(member: Member, cookie: bytes) -> Deputy:
    pid = Pid(member.pid)
    if stat.read(pid).starttime != member.starttime:
        raise NoProcessError(f"pid {pid} is another process")
    with contextlib.suppress(NoProcessError):
        return deputy.find(pid, cookie)
    tree = freeze.freeze(pid, alone=True)
    return deputy.become(list(tree.tracees.pop(pid).values()), cookie)


def _hand_over(record: Record, made: tuple[tuple[int, Deputy], ...], *, parked: bool = False) -> None:
    keeping.ask(Deputize(job=job_of(record.migration), deputies=made, parked=parked))


# --- the host -------------------------------------------------------------------------------------


def available() -> bool:
    """Tell whether this machine can mount another's files."""
    return os.path.exists("/dev/fuse")


class Lodging:
    """What a host prepares for a job whose home is elsewhere; for any other, nothing."""

    def __init__(self, job: bytes | None) -> None:
        self._job = job
        self._ends: OwnedFd | None = None  # from which our keeper learns how the job's processes end
        self._status: OwnedFd | None = None  # the pod's init writes them here

    @classmethod
    def of(cls, header: HeaderEntry) -> Self:
        """Return that of a move; nothing has been done yet."""
        return cls(job_of(header.migration) if header.home else None)

    def mount(self, builder: Builder) -> None:
        """Mount the files of the job's home, in a mount namespace of ours, as the root of what is built.

        Raises:
            DestinationError: They cannot be mounted, or home does not answer for them.
        """
        if self._job is None:
            return
        directory = keeping.directory() / "root"
        directory.mkdir(mode=0o700, exist_ok=True)
        try:
            self._mount_at(directory, self._job)
            builder.lodge(directory)
        except OSError as error:
            raise DestinationError(
                f"cannot mount the files of its home: {error}", remedy="run as root"
            ) from error
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self._ends, self._status = OwnedFd(reading), OwnedFd(writing)
        builder.status_fd = Fd(writing)

    @staticmethod
    def _mount_at(directory: Path, job: bytes) -> None:
        ns.unshare(ns.CLONE_NEWNS)
        mount.make_slave()
        # Whoever answers for these files is not to make anybody root here, nor open our devices.
        connection = fuse.mount_new(directory, mount.MS_NOSUID | mount.MS_NODEV)
        with connection.device:
            keeping.ask(Pump(job=job, connection=connection.number), [connection.device.number])
        for name in _OWN:
            mount.bind_all(Path("/", name), directory / name)

    def arrived(self, pids: Mapping[int, Pid]) -> None:
        """Tell our keeper that the job is about to run, by which pids.

        It is too late to fail: should the keeper have died, home is told nothing of the job's end.
        """
        if self._job is None or self._ends is None or self._status is None:
            return
        tasks = tuple(
            Task(pid=pid, starttime=stat.read(pid).starttime, inner=inner) for inner, pid in pids.items()
        )
        self._status.close()
        try:
            keeping.ask(Arrived(job=self._job, tasks=tasks), [self._ends.number])
        except (GodwitError, OSError) as error:
            log.warning("the keeper does not hear of the job: %s", error)
        self._job = None

    def give_up(self) -> None:
        """Have our keeper forget a job that has not arrived."""
        if self._job is not None:
            with contextlib.suppress(GodwitError, OSError):
                keeping.ask_if_there(Drop(job=self._job))
        for fd in (self._ends, self._status):
            if fd is not None:
                fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()
