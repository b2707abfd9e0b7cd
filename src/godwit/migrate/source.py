"""The sending end of a move: INSPECT, PLAN, FROZEN, COMMITTED, GONE.

Until GO whatever fails lets the process run on. Before GO the decision is in the journal and every
thread is parked, so that even our death leaves it stopped, never running twice.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable

from godwit import __version__
from godwit.engine import capture, clocks, freeze, plan, view
from godwit.engine.freeze import FrozenTree
from godwit.engine.view import TreeView
from godwit.errors import (
    GodwitError,
    InternalError,
    MigrationError,
    RefusedError,
    Survivor,
)
from godwit.images import codec
from godwit.migrate import apart, carried, commit, faults, journal, sending, settle
from godwit.migrate.apart import Line
from godwit.migrate.channel import Channel, Closed
from godwit.migrate.entries import (
    ErrorEntry,
    HelloEntry,
    ReadyEntry,
    RunningEntry,
    VerdictEntry,
    error_from,
)
from godwit.migrate.journal import Record
from godwit.migrate.move import ROLE, Move
from godwit.migrate.patience import Patience
from godwit.migrate.report import Progress, Report, Stopwatch
from godwit.resources.outline import ClockEntry
from godwit.types import Pid, Tid
from godwit.wire.frames import FrameKind


def migrate(
    pid: Pid,
    host: str,
    connect: Callable[[], Channel],
    *,
    timeout_s: float | None,
    tcp_close: bool = False,
    progress: Progress,
) -> Report:
    """Move a process tree to another machine by stop-and-copy.

    Args:
        pid: The root of the tree.
        host: The machine's name, for the report and for settling.
        connect: Opens a channel to it; called again should the first break after GO.
        timeout_s: Undo the move if it is not committed by then.
        tcp_close: TCP connections may break: the program finds them reset.
        progress: Told where the move stands.

    Raises:
        RefusedError: Something cannot be carried. Nothing was changed.
        MigrationError: It failed on the way; `survivor` says which copy lives.
        GodwitError: It could not begin.
    """
    migration = secrets.token_hex(16)
    plan.check_target(pid)

    def work(line: Line[Report]) -> Report:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        move = Move(
            pid,
            host,
            connect,
            line,
            deadline,
            migration,
            Stopwatch(),
            view.of_mover(closes_connections=tcp_close),
        )
        return _run(move)

    try:
        return apart.run(work, Report, progress)
    except apart.WorkerDied as error:
        return _settle_after_death(migration, host, connect, str(error))


def _settle_after_death(migration: str, host: str, connect: Callable[[], Channel], status: str) -> Report:
    record = journal.read(migration, ROLE)
    if record is None:
        raise MigrationError(
            f"the mover was killed (wait status {status}) before the commit", survivor=Survivor.SOURCE
        )
    raise _settled(record, host, lambda _: connect(), f"the mover was killed (wait status {status})")


def _settled(record: Record, host: str, connect: settle.Connect, what: str) -> MigrationError:
    """Settle a committed move whose end was not seen; return the error that names the survivor."""
    try:
        outcome = settle.source(record, connect)
    except (GodwitError, OSError) as error:
        return MigrationError(
            f"{what} after the commit, and {host} does not answer ({error})",
            survivor=Survivor.UNDECIDED,
            remedy=settle.LATER,
        )
    survivor = Survivor.SOURCE if outcome.pid else Survivor.DESTINATION
    return MigrationError(f"{what} after the commit; {outcome.outcome}", survivor=survivor)


def _run(move: Move) -> Report:
    with contextlib.closing(_open(move)) as channel:
        channel.patience = Patience(move.check)
        faults.at(ROLE, "connected")
        try:
            return _converse(move, channel)
        except Closed as error:
            raise MigrationError(
                f"the destination went silent ({error})", survivor=Survivor.SOURCE
            ) from error
        except OSError as error:
            notes = "; ".join(getattr(error, "__notes__", ()))
            raise MigrationError(
                f"the source failed: {error}{f' ({notes})' if notes else ''}",
                survivor=Survivor.SOURCE,
                remedy="try again; if it persists, report it as a bug",
            ) from error


def _open(move: Move) -> Channel:
    move.tell("inspect")
    return move.connect()


def _converse(move: Move, channel: Channel) -> Report:
    plan.check_target(move.pid)
    plan.movable(move.pid, move.memory)
    faults.at(ROLE, "planned")
    prepare(move, channel)
    faults.at(ROLE, "prepared")
    codec.prime(ReadyEntry, RunningEntry)
    move.buffer = sending.page_buffer()
    move.check()
    move.watch.lap("prepare")
    move.tell("freeze")
    with contextlib.ExitStack() as stack:
        stack.enter_context(freeze.beside(Tid(move.pid)))
        stopping = plan.frozen(move.pid, move.memory, move.begin_freeze, move.check)
        frozen, tree = stack.enter_context(stopping)
        faults.at(ROLE, "frozen")
        return _move_frozen(move, channel, frozen, tree)


def prepare(move: Move, channel: Channel) -> None:
    """Tell the destination what comes, and wait until all that can be prepared is."""
    move.tell("plan")
    tree, machine = view.settled(move.pid, move.memory, capture.machine)
    move.machine = machine
    header = sending.header_of(tree, machine, move.migration, __version__)
    channel.open_stream()
    channel.send(FrameKind.HEADER, codec.encode(header))
    channel.accept_stream()
    _, payload = _expect(channel, FrameKind.HELLO)
    greeted_ns = time.monotonic_ns()
    move.destination = os.fsdecode(codec.decode(payload, HelloEntry).hostname)
    _agree(move, channel, greeted_ns)


def _agree(move: Move, channel: Channel, greeted_ns: int) -> None:
    """Come to terms with the destination about what comes, and which files come along."""
    wanted = _offer(move, channel, greeted_ns)
    if wanted:
        _bring_along(move, wanted)
        _offer(move, channel, greeted_ns)


def _offer(move: Move, channel: Channel, greeted_ns: int) -> tuple[bytes, ...]:
    """Describe the tree to the destination; return the files that it asks to be brought along.

    Raises:
        RefusedError: It lacks something else.
    """
    tree, (shape, demand) = view.settled(move.pid, move.memory, capture.outline)
    move.offered = capture.written_files(tree)
    move.tell("spawn")
    monotonic_ns, boottime_ns = clocks.seen_by(move.pid)
    clock = ClockEntry(
        monotonic_ns=monotonic_ns,
        boottime_ns=boottime_ns,
        since_hello_ns=time.monotonic_ns() - greeted_ns,
    )
    sending.send_outline(channel, shape, demand, clock)
    _, payload = _expect(channel, FrameKind.VERDICT)
    verdict = codec.decode(payload, VerdictEntry)
    if verdict.refusals:
        raise RefusedError(verdict.refusals)
    if not verdict.prepared:
        return verdict.carry
    missing = {os.fsdecode(path) for path in verdict.carry}
    move.offered -= {(file.device, file.inode) for file in tree.files if file.link in missing}
    return ()


def _bring_along(move: Move, paths: tuple[bytes, ...]) -> None:
    """Have the files at these paths go along as memory objects."""
    _, more = view.settled(move.pid, move.memory, lambda tree: carried.choose(tree, paths))
    move.carried += more
    move.memory.carried |= {(file.device, file.inode) for file in more}
    # Their mappings are now of objects.
    move.memory.spaces.clear()


def _expect(channel: Channel, *kinds: FrameKind) -> tuple[FrameKind, memoryview]:
    """Read a frame of one of the kinds; an ABORT raises what the destination says."""
    kind, payload = channel.expect(*kinds, FrameKind.ABORT)
    if kind is FrameKind.ABORT:
        error = error_from(codec.decode(payload, ErrorEntry))
        if isinstance(error, MigrationError | InternalError):
            raise MigrationError(f"the destination gave up: {error.message}", survivor=Survivor.SOURCE)
        raise error
    return kind, payload


def _move_frozen(move: Move, channel: Channel, frozen: FrozenTree, tree: TreeView) -> Report:
    assert move.machine is not None
    if capture.written_files(tree) - move.offered:
        # Opened since the destination was asked: it is asked again, rather than finding out too late.
        _agree(move, channel, time.monotonic_ns())
        tree = view.look(move.pid, move.memory)
    machine = capture.machine_now(move.machine, tree)
    captured = capture.capture(frozen, tree, machine)
    faults.at(ROLE, "captured")
    move.watch.lap("capture")
    with contextlib.closing(captured):
        sending.send_tree(channel, captured)
        total = sum(
            mapping.anonymous_bytes + mapping.swap_bytes
            for process in tree.processes
            for mapping in process.mappings
        )

        def after_chunk(done: int) -> None:
            move.tell("pages", done, max(done, total))
            move.check()
            if channel.has_word():
                # It has nothing to say now but why it gives up.
                _expect(channel)

        move.pages = sending.send_pages(channel, captured, move.buffer, after_chunk)
    faults.at(ROLE, "sent")
    move.watch.lap("pages")
    _, payload = _expect(channel, FrameKind.READY)
    ready = codec.decode(payload, ReadyEntry)
    faults.at(ROLE, "ready")
    move.watch.lap("ready")
    move.watch.steps += [(f"destination {name}", ms) for name, ms in ready.steps]
    move.check()
    record = commit.record_of(move, tree, captured.tree)
    return commit.commit(move, channel, frozen, captured.tree, record, ready.pid)
