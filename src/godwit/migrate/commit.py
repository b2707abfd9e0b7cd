"""Committing a move at its source: from here on it is the destination that may run.

The decision is in the journal and every thread parked before GO is sent, so that whatever dies, at
most one copy runs. See `source` for what comes before.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Final

from godwit.engine import latecomers
from godwit.engine.freeze import FrozenTree
from godwit.engine.latecomers import LateSignal
from godwit.engine.view import TreeView
from godwit.errors import GodwitError, ImageError, MigrationError, Survivor
from godwit.images import codec
from godwit.migrate import draining, faults, home, journal, settle
from godwit.migrate.channel import Channel
from godwit.migrate.entries import ErrorEntry, GoEntry, ReadyEntry, RunningEntry, error_from
from godwit.migrate.journal import Carried, Member, Record, State
from godwit.migrate.move import ROLE, Move
from godwit.migrate.pageserver import CopyLostError
from godwit.migrate.report import Report
from godwit.residual import deputy
from godwit.resources import fdtable
from godwit.resources.process import ProcessState, TreeEntry
from godwit.tracee import calls, gadgets
from godwit.tracee.task import Tracee
from godwit.types import Pid
from godwit.wire.frames import FrameKind

_ASK_AGAIN_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Gone:
    """A tree that runs elsewhere now, as it was when it left."""

    record: Record
    tree: TreeEntry
    late: tuple[LateSignal, ...]


def record_of(move: Move, view: TreeView, tree: TreeEntry) -> Record:
    """Describe the move for the journal: whom it takes, and what they hold locked."""
    stopped = {each.pid for each in tree.identities if each.state is ProcessState.STOPPED}
    return Record(
        migration=move.migration,
        role=ROLE,
        state=State.COMMITTED,
        peer=move.host,
        members=tuple(
            Member(
                pid=process.pid,
                starttime=process.stat.starttime,
                inner=process.status.nspid[-1],
                stopped=process.status.nspid[-1] in stopped,
            )
            for process in view.processes
            if not process.zombie
        ),
        locks=tree.locks,
        carried=tuple(Carried(path=file.path, device=file.device, inode=file.inode) for file in move.carried),
        cookie=deputy.new_cookie() if move.options.home else b"",
    )


def commit(
    move: Move, channel: Channel, frozen: FrozenTree, tree: TreeEntry, record: Record, ready: ReadyEntry
) -> Report:
    """Give the process away and end it here, once all of it has gone over; return what there is to tell.

    Raises:
        MigrationError: The line broke or the destination turned it down; `survivor` says who lives.
        GodwitError: As the destination raised it; the process runs on here.
    """
    move.tell("commit")
    latecomers.check_alive(frozen)
    # The record first: it names whom to wake should we die while they are being parked. GO has surely
    # not been sent by then, and the destination will say so.
    journal.write(record)
    faults.at(ROLE, "committed")
    late = _let_go(frozen, tree, record)
    gone = Gone(record, tree, late)
    move.committed = True
    try:
        if channel.patience is not None:
            channel.patience.commit(_ASK_AGAIN_S)
        channel.send(FrameKind.GO, codec.encode(GoEntry(signals=late)))
        faults.at(ROLE, "gone")
        kind, payload = channel.expect(FrameKind.RUNNING, FrameKind.ABORT)
        if kind is FrameKind.ABORT:
            refused = error_from(codec.decode(payload, ErrorEntry))
            _take_back(frozen, record)
            raise refused
        running = codec.decode(payload, RunningEntry)
    except (OSError, ImageError) as error:
        return _after_lost_go(move, frozen, gone, str(error))
    move.end_freeze()
    move.lap("commit")
    move.add_steps(running.steps)
    if move.left:
        channel = _drain(move, frozen, gone, channel)
    _end_here(move, frozen, gone)
    with contextlib.suppress(OSError):
        channel.send(FrameKind.END)
    move.lap("end")
    move.tell("done")
    return _report(move, channel, tree, ready.pid)


def _let_go(frozen: FrozenTree, tree: TreeEntry, record: Record) -> tuple[LateSignal, ...]:
    """Do here all that comes before GO; return the signals that go along with it.

    Raises:
        OSError, GodwitError: The process is ours again, or dead.
    """
    try:
        frozen.park()
        faults.at(ROLE, "parked")
        _drop_locks(frozen, record)
        faults.at(ROLE, "unlocked")
        outer = {member.inner: Pid(member.pid) for member in record.members}
        return latecomers.collect(frozen, tree.processes, outer)
    except (OSError, GodwitError):
        try:
            latecomers.check_alive(frozen)
        finally:
            # Nobody has said GO.
            frozen.thaw()
            settle.resume(record)
            journal.remove(record.migration, ROLE)
        raise


def _drain(move: Move, frozen: FrozenTree, gone: Gone, channel: Channel | None) -> Channel:
    """Serve what was left behind until all of it has gone over; return the line it went over last."""
    total = sum(left.ranges.total() for left in move.left.values())

    def progress(still: int) -> None:
        move.tell("drain", total - still, total)

    def connect() -> Channel:
        line = move.connect()
        line.limit_bytes_per_s = move.options.bandwidth_bytes_per_s
        return line

    if channel is not None and channel.patience is not None:
        channel.patience.commit(draining.SILENT_S)
    try:
        drained, channel, pages = draining.drain(
            move.migration, channel, move.left, connect, progress, timeline=move.timeline
        )
    except CopyLostError:
        # What there still is here is of no use to anybody.
        _end_here(move, frozen, gone)
        raise
    move.pages += pages
    move.drained = drained
    move.lengthen_freeze(drained.resumed_ms)
    move.lap("drain")
    return channel


def _end_here(move: Move, frozen: FrozenTree, gone: Gone) -> None:
    """End the copy here, or leave deputies if the job's home is here. Raises GodwitError."""
    if move.options.home:
        move.away = True
        home.leave_deputies(gone.record, frozen, gone.tree.processes, gone.late)
    else:
        frozen.kill()
    for left in move.left.values():
        left.table.close()
    for file in move.carried:
        file.remove()
    faults.at(ROLE, "killed")
    journal.remove(move.migration, ROLE)


def _report(move: Move, channel: Channel, tree: TreeEntry, pid: int) -> Report:
    return Report(
        migration=move.migration,
        strategy=move.strategy,
        freeze_ms=round(move.freeze_ms, 3),
        total_ms=round(move.watch.total_ms(), 3),
        bytes_sent=channel.bytes_sent + (move.copying.lanes.bytes_sent if move.copying else 0),
        pages=move.pages,
        rounds=move.rounds,
        source=os.uname().nodename,
        destination=move.destination,
        pid=pid,
        survivor=Survivor.DESTINATION.value,
        processes=len(tree.processes),
        threads=sum(len(process.threads) for process in tree.processes),
        faults=move.drained.faults,
        fault_median_us=move.drained.median_us,
        fault_p99_us=move.drained.p99_us,
        steps=tuple(move.watch.steps),
    )


def _drop_locks(frozen: FrozenTree, record: Record) -> None:
    """Let record locks go, so that the destination can take them."""
    outer = {member.inner: Pid(member.pid) for member in record.members}
    for lock in record.locks:
        leader = frozen.leader(outer[lock.holder])
        _inject(leader, *fdtable.lock_call(lock, take=False))


def _inject(leader: Tracee, name: str, arguments: tuple[int | bytes, ...]) -> None:
    leader.save()
    with calls.opened(leader, gadgets=gadgets.of_process(leader.pid)) as workshop:
        workshop.call(leader, name, *arguments)
    leader.restore()


def _take_back(frozen: FrozenTree, record: Record) -> None:
    """Undo a commit that the destination has turned down: the process is ours again."""
    frozen.unpark()
    if record.locks:
        for task in frozen.threads():
            task.save()
        settle.retake_locks(frozen, record)
    journal.remove(record.migration, ROLE)


def _after_lost_go(move: Move, frozen: FrozenTree, gone: Gone, why: str) -> Report:
    """The line broke when GO may have arrived: ask again, on a new one, what became of it."""
    record = gone.record
    deadline = time.monotonic() + _ASK_AGAIN_S
    last = why
    while time.monotonic() < deadline:
        try:
            with contextlib.closing(move.connect()) as channel:
                state = settle.ask(channel, record.migration).state
        except (GodwitError, OSError) as error:
            last = str(error)
            move.line.wait(0.2)
            continue
        if state is State.RUNNING:
            if move.left:
                with contextlib.closing(_drain(move, frozen, gone, None)) as channel:
                    _end_here(move, frozen, gone)
                    channel.send(FrameKind.END)
            else:
                _end_here(move, frozen, gone)
            raise MigrationError(
                f"the line broke after the commit ({why}); it runs at {move.host}",
                survivor=Survivor.DESTINATION,
            )
        _take_back(frozen, record)
        raise MigrationError(f"the line broke before the commit arrived ({why})", survivor=Survivor.SOURCE)
    # Letting go of a parked thread leaves it stopped.
    raise MigrationError(
        f"{move.host} does not answer since the commit ({last})",
        survivor=Survivor.UNDECIDED,
        remedy=settle.LATER,
    )
