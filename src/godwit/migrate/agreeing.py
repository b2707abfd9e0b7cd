"""Coming to terms with the destination: what comes, what it lacks, which files are brought along."""

from __future__ import annotations

import os
import time

from godwit.engine import capture, clocks, view
from godwit.engine.view import TreeView
from godwit.errors import BusyError, InternalError, MigrationError, RefusedError, Survivor
from godwit.images import codec
from godwit.migrate import carried, sending
from godwit.migrate.channel import Channel
from godwit.migrate.entries import ErrorEntry, VerdictEntry, error_from
from godwit.migrate.move import Move
from godwit.resources.objects import ObjectKind
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry
from godwit.wire.frames import FrameKind


def expect(channel: Channel, *kinds: FrameKind) -> tuple[FrameKind, memoryview]:
    """Read a frame of one of the kinds; an ABORT raises what the destination says."""
    kind, payload = channel.expect(*kinds, FrameKind.ABORT)
    if kind is FrameKind.ABORT:
        error = error_from(codec.decode(payload, ErrorEntry))
        if isinstance(error, MigrationError | InternalError):
            raise MigrationError(f"the destination gave up: {error.message}", survivor=Survivor.SOURCE)
        raise error
    return kind, payload


def agree(move: Move, channel: Channel) -> TreeView:
    """Have the destination ready for the tree as it is now; return the look that this rests on.

    Nothing is said if nothing has changed since the last time.

    Raises:
        RefusedError: It lacks something.
    """
    wanted, tree = _offer(move, channel)
    if wanted:
        _bring_along(move, wanted)
        wanted, tree = _offer(move, channel)
        if wanted:
            raise BusyError(
                f"the program writes to new files all the time ({os.fsdecode(wanted[0])})",
                remedy="try again in a moment",
            )
    return tree


def _offer(move: Move, channel: Channel) -> tuple[tuple[bytes, ...], TreeView]:
    """Describe the tree to the destination; return the files that it asks to be brought along."""
    tree, (shape, demand) = view.settled(
        move.pid, move.memory, lambda seen: capture.outline(seen, resident=not move.in_rounds)
    )
    move.offered = capture.written_files(tree)
    # One that the program has closed meanwhile does not go along; another may get its number.
    move.memory.carried &= {
        key for key, found in tree.objects.items() if found.kind is ObjectKind.CARRIED_FILE
    }
    if move.told is not None and move.told == (shape, demand):
        return (), tree
    move.tell("spawn")
    return _told(move, channel, tree, shape, demand), tree


def _told(
    move: Move, channel: Channel, tree: TreeView, shape: OutlineEntry, demand: DemandEntry
) -> tuple[bytes, ...]:
    monotonic_ns, boottime_ns = clocks.seen_by(move.pid)
    clock = ClockEntry(
        monotonic_ns=monotonic_ns,
        boottime_ns=boottime_ns,
        since_hello_ns=time.monotonic_ns() - move.greeted_ns,
    )
    sending.send_outline(channel, shape, demand, clock)
    _, payload = expect(channel, FrameKind.VERDICT)
    verdict = codec.decode(payload, VerdictEntry)
    if verdict.refusals:
        raise RefusedError(verdict.refusals)
    if not verdict.prepared:
        return verdict.carry
    move.armed = verdict.postcopy
    if move.copying is not None:
        move.copying.adapt(tree, move.told[0] if move.told else None, shape)
    move.told = (shape, demand)
    missing = {os.fsdecode(path) for path in verdict.carry}
    move.offered -= {(file.device, file.inode) for file in tree.files if file.link in missing}
    return ()


def _bring_along(move: Move, paths: tuple[bytes, ...]) -> None:
    """Have the files at these paths go along as memory objects."""
    _, more = view.settled(move.pid, move.memory, lambda tree: carried.choose(tree, paths))
    keys = {file.key for file in more}
    for file in move.carried:
        if file.key in keys:
            file.close()
    move.carried = [file for file in move.carried if file.key not in keys] + more
    move.memory.carried |= keys
    # Their mappings are now of objects.
    move.memory.spaces.clear()
