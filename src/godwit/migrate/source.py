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
from dataclasses import replace

from godwit import __version__
from godwit.engine import capture, flushing, freeze, missing, ownpages, plan, target, view
from godwit.engine.capture import Capture
from godwit.engine.freeze import FrozenTree
from godwit.engine.view import TreeView
from godwit.errors import GodwitError, MigrationError, Refusal, RefusedError, Survivor
from godwit.images import codec
from godwit.log import log
from godwit.migrate import (
    agreeing,
    apart,
    carried,
    commit,
    faults,
    home,
    journal,
    lanes,
    outfile,
    sending,
    settle,
)
from godwit.migrate import copying as copying_of
from godwit.migrate.apart import Line
from godwit.migrate.channel import Channel, Closed
from godwit.migrate.convergence import Step, Strategy
from godwit.migrate.copying import Copying
from godwit.migrate.entries import HelloEntry, ReadyEntry, RunningEntry
from godwit.migrate.journal import Record
from godwit.migrate.lanes import Lanes
from godwit.migrate.move import PACKING, POSTCOPY, ROLE, ROUNDS, Move
from godwit.migrate.options import Options
from godwit.migrate.pagestream import PageStream, buffer_of_pages
from godwit.migrate.patience import Patience
from godwit.migrate.report import Progress, Report
from godwit.migrate.rounds import Rounds
from godwit.resources.outline import outline_of
from godwit.types import PAGE_SIZE, Pid, Tid
from godwit.wire.frames import FrameKind

_COMMIT_S = 1.5e-3  # from READY until the program runs at the destination, at the least


def migrate(
    pid: Pid, host: str, connect: Callable[[], Channel], options: Options, *, progress: Progress
) -> Report:
    """Move a process tree to another machine.

    Args:
        pid: The root of the tree.
        host: The machine's name, for the report and for settling.
        connect: Opens a channel to it; called again should the first break after GO.
        options: How.
        progress: Told where the move stands.

    Raises:
        RefusedError: Something cannot be carried. Nothing was changed.
        MigrationError: It failed on the way; `survivor` says which copy lives.
        GodwitError: It could not begin.
    """
    migration = secrets.token_hex(16)
    target.check(pid)
    if options.trace is not None:
        outfile.check(options.trace)

    def work(line: Line[Report]) -> Report:
        move = Move.begin(pid, host, connect, line, migration, options)
        try:
            return _run(move)
        finally:
            if options.home and not move.away:
                home.stay(migration)
            _write_timeline(move)

    try:
        return apart.run(work, Report, progress)
    except apart.WorkerDied as error:
        if options.home and journal.read(migration, ROLE) is None:
            home.stay(migration)
        return _settle_after_death(migration, host, connect, str(error))


def _write_timeline(move: Move) -> None:
    """Write the timeline down, of a failed move too. That this fails is no reason for a move to fail."""
    if move.options.trace is None:
        return
    move.timeline.strategy = move.strategy
    try:
        move.timeline.write(move.options.trace)
    except GodwitError as error:
        log.warning("%s", error.line())


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
    except MigrationError as error:
        return error
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
        channel.patience = move.patience = Patience(move.check_all)
        faults.at(ROLE, "connected")
        try:
            return _converse(move, channel)
        except OSError as error:
            raise failed(error, committed=move.committed) from error


def failed(error: OSError, *, committed: bool) -> MigrationError:
    """Say what an error of the system means for a move: who survives it."""
    if committed:
        return MigrationError(
            f"the source failed after the commit: {error}", survivor=Survivor.UNDECIDED, remedy=settle.LATER
        )
    if isinstance(error, Closed):
        return MigrationError(f"the destination went silent ({error})", survivor=Survivor.SOURCE)
    notes = "; ".join(getattr(error, "__notes__", ()))
    return MigrationError(
        f"the source failed: {error}{f' ({notes})' if notes else ''}",
        survivor=Survivor.SOURCE,
        remedy="try again; if it persists, report it as a bug",
    )


def _open(move: Move) -> Channel:
    move.tell("inspect")
    return move.connect()


def _converse(move: Move, channel: Channel) -> Report:
    target.check(move.pid)
    plan.movable(move.pid, move.memory)
    if move.options.home:
        home.check(move.pid)
    faults.at(ROLE, "planned")
    greet(move, channel)
    if move.options.home:
        home.depart(move.migration, move.pid, move.host, move.features)
    ownpages.unshare()
    copying = _copying(move, channel)
    with contextlib.closing(copying):
        if not _copies_before(move):
            agreeing.agree(move, channel)
            faults.at(ROLE, "prepared")
            return _freeze(move, channel, copying)
        move.copying, move.in_rounds, move.memory.tracked = copying, True, True
        rounds = Rounds(move, channel, copying)
        decision = rounds.until_freeze()
        move.strategy, move.rounds = "precopy", len(rounds.done) + 1
        if decision.step is Step.HYBRID:
            move.strategy = "hybrid" if rounds.done else "postcopy"
        faults.at(ROLE, "prepared")
        return _freeze(move, channel, copying, along_pages=decision.pages)


def _copies_before(move: Move) -> bool:
    """Tell whether memory goes over before the freeze, or after it.

    Raises:
        RefusedError: The strategy that was asked for cannot be had between these machines.
    """
    strategy = move.options.strategy
    if strategy is Strategy.STOPCOPY:
        return False
    able = ROUNDS in move.features and copying_of.can_track(move.pid)
    if not able and strategy is not Strategy.AUTO:
        raise RefusedError([_cannot_track(move)])
    if strategy in (Strategy.POSTCOPY, Strategy.HYBRID) and POSTCOPY not in move.features:
        raise RefusedError([missing.refusal()])
    return able


def _cannot_track(move: Move) -> Refusal:
    old = ROUNDS not in move.features
    return Refusal(
        what=f"strategy {move.options.strategy.value}",
        where="destination" if old else "this machine",
        why="its Godwit is older and knows only stopcopy"
        if old
        else "the kernel cannot note what a program writes (userfaultfd WP_ASYNC, Linux 6.7)",
        remedy="use --strategy stopcopy",
    )


def _copying(move: Move, channel: Channel) -> Copying:
    packer = None
    if PACKING in move.features:
        from godwit.wire.packing import Packer

        packer = Packer(link_bytes_per_s=move.options.bandwidth_bytes_per_s)
    channel.limit_bytes_per_s = move.options.bandwidth_bytes_per_s
    return Copying(PageStream(channel, buffer_of_pages(), packer), lanes=Lanes(move.check_all))


def _freeze(move: Move, channel: Channel, copying: Copying, *, along_pages: int = 0) -> Report:
    codec.prime(ReadyEntry, RunningEntry)
    move.check()
    move.lap("prepare")
    move.tell("freeze")
    with contextlib.ExitStack() as stack:
        stack.enter_context(freeze.beside(Tid(move.pid)))
        stopping = plan.frozen(move.pid, move.memory, move.begin_freeze, move.check)
        frozen, tree = stack.enter_context(stopping)
        faults.at(ROLE, "frozen")
        move.lap("stop")
        return _move_frozen(move, channel, copying, frozen, tree, along_pages)


def greet(move: Move, channel: Channel) -> None:
    """Tell the destination what is to come, and learn what it is."""
    move.tell("plan")
    tree, machine = view.settled(move.pid, move.memory, capture.machine)
    move.machine = machine
    wanted = move.options.strategy in (Strategy.AUTO, Strategy.POSTCOPY, Strategy.HYBRID)
    header = sending.header_of(tree, machine, move.migration, __version__, postcopy=wanted)
    lanes_wanted = lanes.connections(move.options, lanes.LIMIT) > 1
    header = replace(header, lanes=lanes_wanted, home=move.options.home)
    channel.open_stream()
    channel.send(FrameKind.HEADER, codec.encode(header))
    channel.accept_stream()
    _, payload = agreeing.expect(channel, FrameKind.HELLO)
    move.greeted_ns = time.monotonic_ns()
    hello = codec.decode(payload, HelloEntry)
    move.destination = os.fsdecode(hello.hostname)
    move.features = frozenset(hello.features)
    move.cpus_there = hello.cpus


def prepare(move: Move, channel: Channel) -> None:
    """Tell the destination what comes, and wait until all that can be prepared is."""
    greet(move, channel)
    agreeing.agree(move, channel)


def _move_frozen(
    move: Move,
    channel: Channel,
    copying: Copying,
    frozen: FrozenTree,
    tree: TreeView,
    along_pages: int,
) -> Report:
    assert move.machine is not None
    if capture.written_files(tree) - move.offered:
        # Opened since the destination was asked: it is asked again, rather than finding out too late.
        agreeing.agree(move, channel)
        tree = view.look(move.pid, move.memory)
    machine = capture.machine_now(move.machine, tree)
    move.carried = carried.still(tree, move.carried)
    flushing.flush_shared(tree)
    captured = capture.capture(frozen, tree, machine)
    faults.at(ROLE, "captured")
    move.lap("capture")
    with contextlib.closing(captured):
        sending.send_tree(channel, captured)
        copying.adapt(tree, move.told[0] if move.told else None, outline_of(captured.tree))
        move.lap("tree")
        _send_rest(move, channel, copying, tree, captured, along_pages)
    faults.at(ROLE, "sent")
    move.lap("pages")
    _, payload = agreeing.expect(channel, FrameKind.READY)
    ready = codec.decode(payload, ReadyEntry)
    faults.at(ROLE, "ready")
    move.lap("ready")
    move.add_steps(ready.steps)
    move.check()
    move.check_freeze(_COMMIT_S)
    record = commit.record_of(move, tree, captured.tree)
    return commit.commit(move, channel, frozen, captured.tree, record, ready)


def _send_rest(
    move: Move, channel: Channel, copying: Copying, tree: TreeView, captured: Capture, along_pages: int
) -> None:
    stream = copying.stream
    before = stream.pages * PAGE_SIZE
    total = 0 if move.in_rounds else tree.private_bytes

    def after_chunk(done: int) -> None:
        move.tell("pages", done - before, max(done - before, total))
        move.check()
        move.check_freeze()
        if channel.has_word():
            # It has nothing to say now but why it gives up.
            agreeing.expect(channel)

    stream.after_chunk = after_chunk
    if move.strategy in ("hybrid", "postcopy"):
        move.left = copying.last_in_part(tree, captured, along_pages)
    else:
        copying.last(tree, captured)
    stream.end()
    move.pages = copying.pages
