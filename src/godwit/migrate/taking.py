"""Images of a tree: one, or one after the other, each of what has changed since the one before.

Memory goes into the file while the program runs, in rounds as for a move; frozen it is only for the rest,
which is kept in memory meanwhile. What an image goes on from is known by the outline that the one before
has left: see `engine/reshape.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any, Final

from godwit import __version__
from godwit.engine import capture, clocks, freeze, plan, reshape, target, view
from godwit.engine.capture import Capture
from godwit.engine.freeze import FrozenTree
from godwit.engine.view import TreeView
from godwit.errors import Refusal, RefusedError, Survivor
from godwit.images import codec
from godwit.migrate import convergence, sending
from godwit.migrate.apart import Line
from godwit.migrate.channel import Channel
from godwit.migrate.convergence import Limits, Round, Step, Strategy
from godwit.migrate.copying import Copying, can_track, fixed_freeze_s
from godwit.migrate.entries import HeaderEntry, RoundEntry
from godwit.migrate.imagefile import Held, ImageFile
from godwit.migrate.pagestream import PageStream, buffer_of_pages
from godwit.migrate.report import ProgressEvent, Report, Stopwatch
from godwit.resources import regular
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry, outline_of
from godwit.types import PAGE_SIZE, Pid, Tid
from godwit.wire.frames import FrameKind

_ROOM_BYTES: Final = 256 << 20  # kept in memory during a freeze, as far as it is expected
_SPARE_BYTES: Final = 8 << 20  # ... and beyond that
_UNABLE: Final = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENOTTY)


@dataclass(frozen=True, slots=True)
class Parent:
    """The image that another goes on from."""

    ident: str
    digest: bytes


@dataclass(slots=True)
class _Image:
    """One image under way."""

    file: ImageFile
    header: HeaderEntry
    leave_running: bool
    watch: Stopwatch = field(default_factory=Stopwatch)
    done: list[Round] = field(default_factory=list[Round])
    rest_bytes: int = _ROOM_BYTES  # expected in the freeze
    anew: bool = False  # what the file has by now is of no use
    freeze_ms: float = 0.0

    @property
    def parent(self) -> bool:
        """Whether it goes on from another."""
        return bool(self.header.parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A finished image."""

    report: Report
    ident: str
    digest: bytes
    whole: bool  # it goes on from no other

    def as_parent(self) -> Parent:
        """Return what the next image notes of this one."""
        return Parent(self.ident, self.digest)


class Taker:
    """Takes images of one tree."""

    def __init__(self, pid: Pid, line: Line[Any], *, rounds: bool, tcp_close: bool) -> None:
        """Begin without a look. With `rounds`, writes of the program are noted from the first image on."""
        self.pid = pid
        self._line = line
        self._rounds = rounds
        self._memory = view.of_mover(closes_connections=tcp_close)
        self._memory.tracked = rounds
        self._buffer = buffer_of_pages()
        self._copying: Copying | None = None
        self._shape: OutlineEntry | None = None  # what those who read so far have; None: nothing

    def close(self) -> None:
        """End the watch over the program."""
        if self._copying is not None:
            self._copying.close()

    def take(self, file: ImageFile, parent: Parent | None = None, *, leave_running: bool) -> Taken:
        """Write an image and publish it; then let the program run on, or end it.

        Args:
            file: To be written from its start.
            parent: The image before, taken by us: this one may go on from it. None: it must not.
            leave_running: False: the program ends once the image is safe.

        Raises:
            GodwitError: There is no such image. The program runs on, and the next image will be whole.
        """
        try:
            return self._take(file, parent, leave_running=leave_running)
        except BaseException:
            # What was told has gone with the file.
            self._shape = None
            raise

    def _take(self, file: ImageFile, parent: Parent | None, *, leave_running: bool) -> Taken:
        watch = Stopwatch()
        self._tell("inspect")
        # Others' descriptors may be others by now, and a freeze has forbidden a closer look.
        self._memory.outside, self._memory.may_walk = None, True
        # Advice of a mapping changes without a trace in maps.
        self._memory.smaps.clear()
        target.check(self.pid)
        plan.movable(self.pid, self._memory)
        tree, (shape, demand), header = self._look_first()
        if parent is None or self._shape is None or not reshape.adaptable(self._shape, shape):
            self._shape = None
        else:
            header = replace(header, parent=parent.ident, parent_digest=parent.digest)
        image = _Image(file, header, leave_running, watch)
        channel = Channel(file)
        channel.open_stream()
        channel.send(FrameKind.HEADER, codec.encode(header))
        copying = self._on(channel)
        watch.lap("prepare")
        if self._rounds:
            self._tell_outline(channel, tree, shape, demand)
            self._go_round(image, channel, copying, tree)
            watch.lap("rounds")
        return self._freeze(image, copying)

    def _look_first(self) -> tuple[TreeView, tuple[OutlineEntry, DemandEntry], HeaderEntry]:
        tree, outline = self._look()
        machine = capture.machine(tree)
        return tree, outline, sending.header_of(tree, machine, secrets.token_hex(16), __version__)

    def _look(self) -> tuple[TreeView, tuple[OutlineEntry, DemandEntry]]:
        return view.settled(self.pid, self._memory, lambda seen: capture.outline(seen, resident=False))

    def _on(self, channel: Channel) -> Copying:
        stream = PageStream(channel, self._buffer)
        if self._copying is None:
            self._copying = Copying(stream)
        self._copying.stream = stream
        return self._copying

    def _tell(self, stage: str) -> None:
        self._line.progress(ProgressEvent(stage=stage))

    def _tell_outline(
        self, channel: Channel, tree: TreeView, shape: OutlineEntry, demand: DemandEntry
    ) -> None:
        assert self._copying is not None
        sending.send_outline(channel, shape, demand, self._clock())
        self._copying.adapt(tree, self._shape, shape)
        self._shape = shape

    def _clock(self) -> ClockEntry:
        monotonic_ns, boottime_ns = clocks.seen_by(self.pid)
        return ClockEntry(monotonic_ns=monotonic_ns, boottime_ns=boottime_ns, since_hello_ns=0)

    # --- while it runs ------------------------------------------------------------------------

    def _go_round(self, image: _Image, channel: Channel, copying: Copying, first: TreeView) -> None:
        """Write memory in rounds, for as long as that makes the freeze shorter."""
        tree = first
        watch_over(copying, tree)
        while True:
            decision = convergence.decide(Strategy.PRECOPY, image.done, limits(tree))
            if image.done:
                # Before the freeze too: what is known of mappings need not be learnt while they stand still.
                tree, (shape, demand) = self._look()
                assert self._shape is not None
                if not reshape.adaptable(self._shape, shape):
                    return  # Nothing of what was written counts now, and soon again nothing might.
                if shape != self._shape:
                    self._tell_outline(channel, tree, shape, demand)
            if decision.step is not Step.ROUND:
                image.rest_bytes = 2 * decision.pages * PAGE_SIZE
                return
            self._round(image, channel, copying, tree)

    def _round(self, image: _Image, channel: Channel, copying: Copying, tree: TreeView) -> None:
        stream, number = copying.stream, len(image.done) + 1
        mark = copying.mark()
        total = image.done[-1].dirty_pages * PAGE_SIZE if image.done else 0
        if not image.done and not image.parent:
            total = image.header.private_bytes

        def after_chunk(done: int) -> None:
            part = done - mark.pages * PAGE_SIZE
            self._line.progress(
                ProgressEvent(stage="round", done_bytes=part, total_bytes=max(part, total), round=number)
            )
            self._line.give_up_if_cancelled()

        stream.after_chunk = after_chunk
        assert self._shape is not None
        copying.round(tree, self._shape)
        channel.send(FrameKind.ROUND, codec.encode(RoundEntry(number=number)))
        image.done.append(copying.measure(tree, mark))
        image.file.begin_writeback()
        self._line.give_up_if_cancelled()

    # --- frozen -------------------------------------------------------------------------------

    def _freeze(self, image: _Image, copying: Copying) -> Taken:
        held = Held(image.file, self._room_bytes(image))
        copying.stream.channel = Channel(held)
        self._line.give_up_if_cancelled()
        self._tell("freeze")
        frozen_at = 0.0

        def begin() -> None:
            nonlocal frozen_at
            frozen_at = time.monotonic()

        stopping = plan.frozen(self.pid, self._memory, begin, self._line.give_up_if_cancelled)
        with freeze.beside(Tid(self.pid)), stopping as (frozen, tree):
            tree_entry = self._keep(image, copying, held, frozen, tree)
            if not image.leave_running:
                self._finish(image, held)
                frozen.kill()
        image.freeze_ms = (time.monotonic() - frozen_at) * 1000
        image.watch.lap("freeze")
        if image.leave_running:
            self._finish(image, held)
        image.watch.lap("write")
        self._tell("done")
        return Taken(
            report=self._report(image, copying, tree_entry),
            ident=image.header.migration,
            digest=image.file.digest,
            whole=not image.parent,
        )

    def _room_bytes(self, image: _Image) -> int:
        """Return how much memory to have ready for the pages of the freeze."""
        if not image.leave_running:
            return 0  # It has no business any more that could wait.
        return min(image.rest_bytes, image.header.private_bytes, _ROOM_BYTES) + _SPARE_BYTES

    def _keep(
        self, image: _Image, copying: Copying, held: Held, frozen: FrozenTree, tree: TreeView
    ) -> Capture:
        """Note everything of the frozen tree that the image lacks."""
        machine = capture.machine_now(image.header.machine, tree)
        with contextlib.closing(capture.capture(frozen, tree, machine)) as captured:
            # Read last: a timer's remaining time, read before, must not run out early by these clocks.
            clock = self._clock()
            shape = outline_of(captured.tree)
            if self._shape is not None and not reshape.adaptable(self._shape, shape):
                image.anew, self._shape = True, None
                image.header = replace(image.header, parent="", parent_digest=b"")
                copying.stream.pages = copying.stream.frames = 0
            copying.adapt(tree, self._shape, shape)
            held.before = lambda: _write_entries(image, captured, clock)
            pages, total = copying.stream.pages, image.header.private_bytes if not image.done else 0

            def after_chunk(done: int) -> None:
                part = done - pages * PAGE_SIZE
                self._line.progress(
                    ProgressEvent(stage="pages", done_bytes=part, total_bytes=max(part, total))
                )
                self._line.give_up_if_cancelled()

            copying.stream.after_chunk = after_chunk
            copying.last(tree, captured)
            copying.stream.end()
            self._shape = shape
            return captured

    @staticmethod
    def _finish(image: _Image, held: Held) -> None:
        held.release()
        image.file.publish()

    def _report(self, image: _Image, copying: Copying, captured: Capture) -> Report:
        processes = captured.tree.processes
        return Report(
            migration=image.header.migration,
            strategy="precopy" if image.done else "stopcopy",
            freeze_ms=round(image.freeze_ms, 3),
            total_ms=round(image.watch.total_ms(), 3),
            bytes_sent=image.file.bytes,
            pages=copying.stream.pages,
            rounds=len(image.done) + 1,
            source=os.uname().nodename,
            destination=str(image.file.path.parent),
            pid=self.pid,
            survivor=Survivor.SOURCE.value,
            processes=len(processes),
            threads=sum(len(process.threads) for process in processes),
            steps=tuple(image.watch.steps),
        )


def _write_entries(image: _Image, captured: Capture, clock: ClockEntry) -> None:
    """Write what comes before the pages of a frozen tree."""
    channel = Channel(image.file)
    if image.anew:
        image.file.restart()
        channel.open_stream()
        channel.send(FrameKind.HEADER, codec.encode(image.header))
    sending.send_outline(channel, outline_of(captured.tree), _demand_of(captured), clock)
    sending.send_tree(channel, captured)


def _demand_of(captured: Capture) -> DemandEntry:
    """Return what a captured tree needs at a destination, as `capture.outline` does for a running one."""
    tree = captured.tree
    vmas = [vma for process in tree.processes for vma in process.memory.vmas]
    return DemandEntry(
        files=tuple(entry for kind, entry in captured.files if kind is regular.KIND),
        written=tuple(sorted({vma.file for vma in vmas if vma.file >= 0 and vma.shared and vma.may_write})),
        limits=tuple(process.limits for process in tree.processes),
    )


def limits(tree: TreeView) -> Limits:
    """Return what rounds are weighed by when nobody limits the freeze."""
    return Limits(max_freeze_s=None, fixed_freeze_s=fixed_freeze_s(tree), seconds_left=None, postcopy=False)


def watch_over(copying: Copying, tree: TreeView) -> None:
    """Begin to note what the tree writes.

    Raises:
        RefusedError: This kernel cannot.
    """
    try:
        copying.watch.update(tree.root.pid, tree.processes, tree.gadgets_of)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        raise unable() from error


def see_that_writes_can_be_noted(pid: Pid) -> None:
    """Raise RefusedError where the kernel cannot tell what a program writes."""
    if not can_track(pid):
        raise unable()


def unable() -> RefusedError:
    """Return the refusal of a kernel that is too old."""
    return RefusedError(
        [
            Refusal(
                what="images of what has changed",
                where="this machine",
                why="the kernel cannot note what a program writes (userfaultfd WP_ASYNC, Linux 6.7)",
                remedy="make whole ones: godwit checkpoint --leave-running, without --interval",
            )
        ]
    )
