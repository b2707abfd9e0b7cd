"""The receiving end of a move: RECEIVING, BUILT, READY, RUNNING.

It never runs without GO. A warden stays behind the builder: should the builder be killed, the warden
reads its journal and either ends what was built or lets it run.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Final

from godwit import __version__
from godwit.engine import missing, ownpages, pod
from godwit.engine.build import Builder
from godwit.errors import (
    DestinationError,
    GodwitError,
    ImageError,
    InternalError,
    MigrationError,
    Survivor,
)
from godwit.images import codec
from godwit.linux.arch import MACHINE
from godwit.log import log
from godwit.migrate import agreement, apart, faults, filling, home, journal, lanes, pending, receiving, settle
from godwit.migrate.channel import Channel, Closed
from godwit.migrate.entries import (
    AnswerEntry,
    EndEntry,
    FilesEntry,
    GoEntry,
    HeaderEntry,
    HelloEntry,
    LaneEntry,
    QueryEntry,
    ReadyEntry,
    ResumeEntry,
    RoundEntry,
    RunningEntry,
    VerdictEntry,
    error_entry,
)
from godwit.migrate.filling import Filling
from godwit.migrate.home import Lodging
from godwit.migrate.journal import Member, Record, State
from godwit.migrate.lanes import Meeting
from godwit.migrate.paging import Paging
from godwit.migrate.report import Stopwatch, silent
from godwit.procfs import stat
from godwit.resources import registry
from godwit.resources.process import ProcessState, TreeEntry
from godwit.types import OwnedFd
from godwit.wire.frames import FrameKind

ROLE: Final = "destination"
FEATURES_EVERYWHERE: Final = ("rounds", "packing", "lanes")
_LAST_KINDS: Final = (*filling.KINDS, FrameKind.DRAINED, FrameKind.END)


def _features() -> tuple[str, ...]:
    able = (("postcopy", missing.available()), (home.FEATURE, home.available()))
    return (*FEATURES_EVERYWHERE, *(name for name, here in able if here))


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What came of serving one connection."""

    migration: str
    pid: int  # 0: nothing came to run


def serve(channel: Channel) -> Received:
    """Serve one connection, from its first byte to its last.

    Raises:
        GodwitError: The move failed; the source was told, and nothing is left here.
    """
    channel.open_stream()
    channel.accept_stream()
    kind, payload = channel.expect(FrameKind.HEADER, FrameKind.QUERY, FrameKind.RESUME, FrameKind.LANE)
    if kind is FrameKind.QUERY:
        return _answer(channel, codec.decode(payload, QueryEntry))
    if kind is FrameKind.RESUME:
        return _resume(channel, codec.decode(payload, ResumeEntry).migration)
    if kind is FrameKind.LANE:
        return _lane(channel, codec.decode(payload, LaneEntry).migration)
    header = codec.decode(payload, HeaderEntry)
    try:
        return apart.run(lambda _: _receive(channel, header), Received, silent)
    except apart.WorkerDied:
        lanes.forget(header.migration)
        outcome = settle.destination(header.migration)
        return Received(migration=header.migration, pid=outcome.pid)
    except GodwitError as error:
        record = journal.read(header.migration, ROLE)
        if isinstance(error, InternalError) or record is None or record.state is not State.RUNNING:
            # What it left undone is settled as after a death.
            settle.destination(header.migration)
        raise


def _answer(channel: Channel, query: QueryEntry) -> Received:
    state = journal.decide(query.migration, State.ABORTED)
    record = journal.read(query.migration, ROLE)
    if record is not None and settle.abandoned(record):
        settle.destination(query.migration)
    draining = state is State.RUNNING and pending.exists(query.migration)
    channel.send(FrameKind.ANSWER, codec.encode(AnswerEntry(state=state, draining=draining)))
    return Received(migration=query.migration, pid=0)


def _lane(channel: Channel, migration: str) -> Received:
    """Be a further connection of a move that another process receives."""
    try:
        lanes.relay(channel, migration)
    except GodwitError as error:
        _tell(channel, error)
        channel.linger()
        raise
    return Received(migration=migration, pid=0)


def _resume(channel: Channel, migration: str) -> Received:
    """Go on serving pages that a line broke over, or a pager's death."""

    def work(_: object) -> Received:
        try:
            paging = Paging.take_over(migration)
            drained = paging.resume(channel)
        except GodwitError as error:
            _tell(channel, error)
            channel.linger()
            raise
        _forget_at_end(channel, migration)
        log.info("all pages are here: %d were waited for", drained.faults)
        return Received(migration=migration, pid=0)

    try:
        return apart.run(work, Received, silent)
    except apart.WorkerDied as error:
        raise MigrationError(
            f"the pager was killed ({error}); whoever waits for a page goes on waiting",
            survivor=Survivor.DESTINATION,
        ) from error


def _receive(channel: Channel, header: HeaderEntry) -> Received:
    """Build what the source sends; tell the source of any failure before GO."""
    builder = Builder(in_pod=True, postcopy=header.postcopy and missing.available())
    lodging = home.Lodging.of(header)
    paging: Paging | None = None
    try:
        with receiving.honest(), lanes.meeting(header.migration, wanted=header.lanes) as meeting:
            paging = _build(channel, builder, header, meeting, lodging)
        faults.at(ROLE, "built")
    except (GodwitError, OSError) as error:
        # Told first: the source waits frozen, and what was built here has not run and never will.
        _tell(channel, error)
        builder.destroy()
        lodging.give_up()
        channel.linger()
        raise _as_godwit(error) from error
    except BaseException:
        builder.destroy()
        lodging.give_up()
        raise
    with lodging:
        return _commit(channel, builder, header, paging, lodging)


def _tell(channel: Channel, error: Exception) -> None:
    with contextlib.suppress(OSError):
        channel.send(FrameKind.ABORT, codec.encode(error_entry(_as_godwit(error))))


def _as_godwit(error: Exception) -> GodwitError:
    if isinstance(error, GodwitError):
        return error
    if isinstance(error, ConnectionError):
        return MigrationError(f"the source went silent ({error})", survivor=Survivor.SOURCE)
    notes = "; ".join(getattr(error, "__notes__", ()))
    return DestinationError(f"{error}{f' ({notes})' if notes else ''}", remedy="choose another machine")


def _build(
    channel: Channel, builder: Builder, header: HeaderEntry, meeting: Meeting | None, lodging: Lodging
) -> Paging | None:
    hello = HelloEntry(
        version=__version__,
        architecture=MACHINE,
        hostname=os.fsencode(os.uname().nodename),
        features=_features(),
        cpus=os.cpu_count() or 1,
    )
    machine = OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
    greeted_ns = time.monotonic_ns()
    channel.send(FrameKind.HELLO, codec.encode(hello))
    faults.at(ROLE, "greeted")
    agreed = agreement.agree(channel, header, builder, lodging)
    clock, heard_ns = agreed.clock, agreed.heard_ns
    # The reading is older than it arrived by no more than the round trip. Clocks may jump ahead by
    # that much, and never go back.
    builder.clock_jump_ns = max(0, heard_ns - greeted_ns - clock.since_hello_ns)
    age_ns = builder.clock_jump_ns + time.monotonic_ns() - heard_ns
    builder.clock_shift_ns = pod.enter(
        header.machine, clock.monotonic_ns + age_ns, clock.boottime_ns + age_ns
    )
    builder.prepare(agreed.shape)
    faults.at(ROLE, "prepared")
    codec.prime(TreeEntry, FilesEntry, EndEntry, GoEntry, *(kind.entry for kind in registry.KINDS))
    channel.touch_buffer()
    ownpages.unshare()
    channel.send(
        FrameKind.VERDICT,
        codec.encode(VerdictEntry(refusals=(), carry=agreed.missing, postcopy=builder.armed)),
    )
    filled = Filling(builder)
    watch = Stopwatch()
    payload = _until_tree(channel, builder, header, filled, meeting)
    watch.lap("rounds")
    with builder.beside():
        tree = receiving.receive_tree(channel, builder, header, payload, filled, watch)
    faults.at(ROLE, "received")
    record = _record(header, builder, tree)
    paging = Paging.begin(builder, record, machine)
    pod.complete_init(builder)
    builder.park()
    faults.at(ROLE, "parked")
    if journal.announce(record) is not State.READY:
        if paging is not None:
            paging.abandon()
        raise MigrationError("the source has given this move up", survivor=Survivor.SOURCE)
    builder.outlive()
    faults.at(ROLE, "journalled")
    watch.lap("park")
    ready = ReadyEntry(pid=builder.root_pid(), steps=tuple(watch.steps))
    channel.send(FrameKind.READY, codec.encode(ready))
    return paging


def _until_tree(
    channel: Channel, builder: Builder, header: HeaderEntry, filled: Filling, meeting: Meeting | None
) -> memoryview:
    """Take pages in rounds; return the payload of the TREE frame.

    When the tree changes before that, it is agreed on again.
    """
    while True:
        if meeting is not None:
            meeting.turn(channel, builder)
        kind, payload = channel.expect(*filling.KINDS, FrameKind.ROUND, FrameKind.TREE, FrameKind.OUTLINE)
        if kind is FrameKind.TREE:
            if meeting is not None:
                meeting.finish()
            return payload
        if kind is FrameKind.OUTLINE:
            agreement.agree_again(channel, header, builder, payload)
        elif kind is FrameKind.ROUND:
            entry = codec.decode(payload, RoundEntry)
            faults.at(ROLE, "round")
            channel.send(FrameKind.ROUND, codec.encode(entry))
        else:
            filled.take(kind, payload)


def _record(header: HeaderEntry, builder: Builder, tree: TreeEntry) -> Record:
    stopped = {each.pid for each in tree.identities if each.state is ProcessState.STOPPED}
    init = builder.init_pid()
    return Record(
        migration=header.migration,
        role=ROLE,
        state=State.READY,
        peer="",
        members=tuple(
            Member(pid=pid, starttime=stat.read(pid).starttime, inner=inner, stopped=inner in stopped)
            for inner, pid in builder.outer_pids().items()
        ),
        pod_init=(
            None
            if init is None
            else Member(pid=init, starttime=stat.read(init).starttime, inner=1, stopped=False)
        ),
    )


def _commit(
    channel: Channel, builder: Builder, header: HeaderEntry, paging: Paging | None, lodging: Lodging
) -> Received:
    """Wait for GO; run, or undo everything."""
    try:
        kind, payload = channel.expect(FrameKind.GO, FrameKind.ABORT)
        late = codec.decode(payload, GoEntry).signals if kind is FrameKind.GO else ()
    except (Closed, OSError, ImageError) as error:
        if journal.decide(header.migration, State.ABORTED) is State.ABORTED:
            _undo(builder, paging)
        raise _as_godwit(error) from error
    if kind is FrameKind.ABORT:
        journal.decide(header.migration, State.ABORTED)
        _undo(builder, paging)
        journal.remove(header.migration, ROLE)
        return Received(migration=header.migration, pid=0)
    watch = Stopwatch()
    try:
        builder.check_alive()
        builder.take_locks()
    except (GodwitError, OSError) as error:
        journal.decide(header.migration, State.ABORTED)
        _undo(builder, paging)
        _tell(channel, error)
        raise _as_godwit(error) from error
    if journal.decide(header.migration, State.RUNNING) is not State.RUNNING:
        _undo(builder, paging)
        raise MigrationError("the source has given this move up", survivor=Survivor.SOURCE)
    root = builder.root_pid()
    builder.deliver(late)
    lodging.arrived(builder.outer_pids())
    if paging is None:
        _release(builder, watch)
        _tell_running(channel, watch)
    else:
        # Told first: the source has to serve the pages that are touched on the way.
        _tell_running(channel, watch)
        # A line that breaks now is the source's to open again: see `_resume`.
        drained = paging.serve(channel, lambda: _release(builder, watch))
        log.info("all pages are here: %d were waited for", drained.faults)
    _forget_at_end(channel, header.migration)
    return Received(migration=header.migration, pid=root)


def _release(builder: Builder, watch: Stopwatch) -> None:
    builder.release()
    faults.at(ROLE, "released")
    watch.lap("resume")


def _undo(builder: Builder, paging: Paging | None) -> None:
    builder.destroy()
    if paging is not None:
        paging.abandon()


def _tell_running(channel: Channel, watch: Stopwatch) -> None:
    with contextlib.suppress(OSError):
        entry = RunningEntry(resumed_ms=watch.total_ms(), steps=tuple(watch.steps))
        channel.send(FrameKind.RUNNING, codec.encode(entry))
        faults.at(ROLE, "told")


def _forget_at_end(channel: Channel, migration: str) -> None:
    """Forget the move once the source has ended its copy."""
    with contextlib.suppress(OSError, ImageError):
        # Pages may still be on their way to processes that have ended meanwhile.
        while channel.expect(*_LAST_KINDS)[0] is not FrameKind.END:
            pass
        journal.remove(migration, ROLE)
