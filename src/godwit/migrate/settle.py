"""Deciding what a dead mover left undecided.

At the destination the journal alone decides. At the source a committed move is decided by asking the
destination; without an answer it stays undecided, and the copy here stays stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from godwit.engine import freeze
from godwit.errors import GodwitError, ImageError
from godwit.images import codec
from godwit.linux import pidfd
from godwit.migrate import draining, home, journal, lanes, pending
from godwit.migrate.channel import Channel
from godwit.migrate.entries import AnswerEntry, QueryEntry
from godwit.migrate.journal import Carried, Member, Record, State
from godwit.migrate.pageserver import CopyLostError
from godwit.procfs import stat
from godwit.resources import fdtable
from godwit.tracee import calls, gadgets
from godwit.types import Pid
from godwit.wire.frames import FrameKind

Connect = Callable[[str], Channel]
_DRAIN_TRIES: Final = 20
# A move given up of which nothing was here is remembered so long: a READY would have come by then.
_REMEMBERED_S: Final = 24 * 3600.0
STILL_UNDECIDED: Final = "still undecided"
LATER: Final = "run `godwit recover` when it can be reached again; until then the copy here stays stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What became of a move that was left undecided."""

    migration: str
    role: str
    outcome: str
    pid: int  # of the root, where it runs here; else 0


def _alive(member: Member) -> bool:
    try:
        found = stat.read(Pid(member.pid))
    except ProcessLookupError:
        return False
    return found.starttime == member.starttime and found.state not in "ZX"


def _signal(member: Member, number: int) -> None:
    """Signal exactly the process that the record means."""
    with contextlib.suppress(ProcessLookupError), pidfd.pidfd_open(Pid(member.pid)) as held:
        if _alive(member):
            pidfd.send_signal(held.number, number)


def destination(migration: str) -> Recovered:
    """Settle a move whose builder died here: end what it built, or let it run."""
    record = journal.read(migration, "destination")
    if record is None or record.state is not State.RUNNING:
        # Whoever was at work with it is dead.
        pending.remove(migration)
    if record is None:
        # Everything it had made was to die with it (PTRACE_O_EXITKILL).
        return Recovered(migration=migration, role="destination", outcome="nothing was built", pid=0)
    state = journal.decide(migration, State.ABORTED)
    if state is State.RUNNING:
        for member in _everyone(record):
            if _stopped(member):
                _signal(member, signal.SIGCONT)
        root = record.members[0] if record.members else None
        return Recovered(
            migration=migration, role="destination", outcome="runs here", pid=root.pid if root else 0
        )
    for member in _everyone(record):
        _signal(member, signal.SIGKILL)
    # Who asks from now on is answered the same, and whom it could have been kept from is dead.
    journal.remove(migration, "destination")
    return Recovered(migration=migration, role="destination", outcome="ended here; it never ran", pid=0)


def let_run(record: Record) -> None:
    """Let a destination's processes run, whichever of them were left stopped."""
    for member in _everyone(record):
        if not member.stopped:
            # Whoever was about to stop does not.
            _signal(member, signal.SIGCONT)


def ask(channel: Channel, migration: str) -> AnswerEntry:
    """Ask a destination what became of a move. From then on the answer's state holds for good."""
    draining.be_patient(channel)
    channel.open_stream()
    channel.send(FrameKind.QUERY, codec.encode(QueryEntry(migration=migration)))
    channel.accept_stream()
    _, payload = channel.expect(FrameKind.ANSWER)
    answer = codec.decode(payload, AnswerEntry)
    if answer.state not in (State.RUNNING, State.ABORTED):
        raise ImageError(f"the destination answers {answer.state.value!r}, which decides nothing")
    return answer


def source(record: Record, connect: Connect) -> Recovered:
    """Settle a committed move at its source.

    Raises:
        GodwitError, OSError: The destination does not answer; nothing was changed.
    """
    channel = connect(record.peer)
    try:
        answer = ask(channel, record.migration)
    finally:
        channel.close()
    root = record.members[0]
    drained: Channel | None = None
    if answer.state is State.RUNNING:
        outcome, pid = f"ended here; it runs at {record.peer}", 0
        if answer.draining:
            try:
                drained = _drain(record, connect)
            except CopyLostError as error:
                outcome = f"lost: {error.line()}"
        for each in record.carried:
            _remove(root, each)
        if record.cookie:
            home.settle_deputies(record)
        else:
            for member in record.members:
                _signal(member, signal.SIGKILL)
    elif not _alive(root):
        outcome, pid = "lost: it runs at neither end", 0
    else:
        resume(record)
        if record.cookie:
            home.stay(record.migration)
        outcome, pid = "resumed here", root.pid
    journal.remove(record.migration, "source")
    if drained is not None:
        # Last: the destination then forgets that it runs there, and who asked again would be told to resume.
        with contextlib.suppress(OSError), contextlib.closing(drained):
            drained.send(FrameKind.END)
    return Recovered(migration=record.migration, role="source", outcome=outcome, pid=pid)


def _drain(record: Record, connect: Connect) -> Channel:
    """Let the destination have the pages that it still lacks, out of the stopped copy; return the line.

    Raises:
        CopyLostError: They are lost.
    """
    left = draining.left_of([Pid(member.pid if _alive(member) else 0) for member in record.members])
    try:
        _, channel, _ = draining.drain(
            record.migration, None, left, lambda: connect(record.peer), lambda _: None, tries=_DRAIN_TRIES
        )
    finally:
        for each in left.values():
            each.table.close()
    return channel


def _remove(root: Member, file: Carried) -> None:
    """Remove the name of a file that went along, if it still is that file's."""
    if not _alive(root):
        return
    path = os.fsencode(f"/proc/{root.pid}/root") + file.path
    with contextlib.suppress(OSError):
        found = os.stat(path, follow_symlinks=False)
        if (found.st_dev, found.st_ino) == (file.device, file.inode):
            os.unlink(path)


def resume(record: Record) -> None:
    """Let stopped processes go on, those that live, with the locks that they had."""
    if record.locks and _alive(record.members[0]):
        tree = freeze.freeze(Pid(record.members[0].pid))
        try:
            retake_locks(tree, record)
        finally:
            tree.thaw()
    for member in record.members:
        if not member.stopped:
            _signal(member, signal.SIGCONT)


def retake_locks(tree: freeze.FrozenTree, record: Record) -> None:
    """Take record locks back inside a frozen and saved tree. Raises OSError if somebody else has one."""
    outer = {member.inner: Pid(member.pid) for member in record.members}
    for lock in record.locks:
        leader = tree.leader(outer[lock.holder])
        with calls.opened(leader, gadgets=gadgets.of_process(leader.pid)) as workshop:
            name, arguments = fdtable.lock_call(lock, take=True)
            workshop.call(leader, name, *arguments)


def everything(connect: Connect) -> tuple[Recovered, ...]:
    """Settle every move that is left undecided on this machine, as far as it can be."""
    found: list[Recovered] = []
    for record in journal.every():
        if record.role == "destination":
            if abandoned(record):
                found.append(destination(record.migration))
            elif record.state is State.ABORTED and journal.age_s(record) > _REMEMBERED_S:
                journal.remove(record.migration, "destination")
            continue
        if any(_traced(member) for member in record.members):
            continue  # Its mover lives.
        try:
            found.append(source(record, connect))
        except (GodwitError, OSError) as error:
            found.append(_unsettled(record, error))
    _forget_lists()
    lanes.sweep()
    return tuple(found)


def _unsettled(record: Record, error: Exception) -> Recovered:
    """Say that a move could not be settled at its source; if nothing of it lives here, nothing is to be."""
    if any(_alive(member) for member in record.members):
        outcome, pid = f"{STILL_UNDECIDED}: {error}", record.members[0].pid
    else:
        outcome, pid = f"ended here; whether it runs at {record.peer} is to be seen there ({error})", 0
        journal.remove(record.migration, "source")
    return Recovered(migration=record.migration, role="source", outcome=outcome, pid=pid)


def _forget_lists() -> None:
    """Remove lists of pending pages that nobody lacks any more: the tree is dead, or has never run."""
    for migration in pending.forgotten():
        record = journal.read(migration, "destination")
        members = _everyone(record) if record is not None and record.state is State.RUNNING else ()
        if not any(_alive(member) for member in members):
            pending.remove(migration)


def abandoned(record: Record) -> bool:
    """Tell whether a destination's record needs settling: its builder is dead, and its decision not done."""
    living = [member for member in _everyone(record) if _alive(member)]
    if not living or any(_traced(member) for member in living):
        return False
    return record.state is not State.RUNNING or any(_stopped(member) for member in living)


def _everyone(record: Record) -> tuple[Member, ...]:
    return record.members if record.pod_init is None else (*record.members, record.pod_init)


def _traced(member: Member) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return _alive(member) and stat.read(Pid(member.pid)).state == "t"
    return False


def _stopped(member: Member) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return _alive(member) and not member.stopped and stat.read(Pid(member.pid)).state == "T"
    return False
