"""Post-copy at the destination, from the agreement to the last page: see `pager` for the serving itself."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from godwit.engine import keeper
from godwit.engine.build import Builder
from godwit.errors import GodwitError, ImageError, MigrationError, Survivor
from godwit.images import codec
from godwit.linux import ns
from godwit.log import log
from godwit.migrate import journal, pending, settle
from godwit.migrate.channel import Channel
from godwit.migrate.entries import DrainedEntry, ResumeEntry
from godwit.migrate.journal import Member, Record, State
from godwit.migrate.pager import Pager
from godwit.migrate.pending import Pending
from godwit.procfs import stat
from godwit.types import OwnedFd, Pid
from godwit.wire import frames
from godwit.wire.frames import FrameKind


@dataclass(slots=True)
class Paging:
    """What a destination needs to serve missing pages. Made before READY, in use from RUNNING on."""

    migration: str
    pending: Pending
    init: Member
    home: OwnedFd
    """Our own mount namespace: while a pod is built, we are in the pod's."""
    uffds: dict[int, OwnedFd] = field(default_factory=dict[int, OwnedFd])
    _resumed_ms: float = 0.0
    _done: bool = False  # nothing is missing any more

    @classmethod
    def begin(cls, builder: Builder, record: Record, home: OwnedFd) -> Paging | None:
        """Note what is missing; None if nothing is."""
        if not builder.left:
            return None
        assert record.pod_init is not None
        made = cls(record.migration, Pending.create(record.migration), record.pod_init, home)
        try:
            made._note_all(builder)
        except BaseException:
            made.abandon()
            raise
        return made

    def _note_all(self, builder: Builder) -> None:
        assert builder.shape is not None
        uffds = builder.take_uffds()
        for index, space in enumerate(builder.shape.spaces):
            if space.pid not in builder.left:
                continue
            lacking = self.pending.add(index, builder.kept_at[space.pid])
            self.uffds[lacking.number] = uffds[space.pid]
            for start, end in builder.left[space.pid]:
                self.pending.leave(lacking, start, end)

    @classmethod
    def take_over(cls, migration: str) -> Paging:
        """Go on where another pager of the move has stopped.

        Raises:
            MigrationError: There is nothing to go on with.
        """
        record = journal.read(migration, "destination")
        if record is None or record.pod_init is None or record.state is not State.RUNNING:
            raise MigrationError("this move does not run here", survivor=Survivor.UNDECIDED)
        try:
            known = Pending.take_over(migration)
        except FileNotFoundError:
            # All has come, and only the word of it was lost with the line.
            known = Pending.create(migration)
            known.note_released()
        if not known.released:
            # Killed while it let them go: some may be stopped still.
            settle.let_run(record)
            known.note_released()
        home = OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        made = cls(migration, known, record.pod_init, home)
        made._take_uffds()
        return made

    def _take_uffds(self) -> None:
        alive = self._init_lives()
        for space in self.pending.spaces.values():
            if space.dead:
                continue
            if not alive:
                self.pending.dead(space)
                continue
            if space.kept_at < 0:
                raise ImageError(f"nobody has kept the memory of process {space.number} together")
            self.uffds[space.number] = keeper.take(Pid(self.init.pid), space.kept_at)

    def _init_lives(self) -> bool:
        with contextlib.suppress(ProcessLookupError):
            found = stat.read(Pid(self.init.pid))
            return found.starttime == self.init.starttime and found.state not in "ZX"
        return False

    def serve(self, channel: Channel, release: Callable[[], None] = lambda: None) -> DrainedEntry:
        """Serve until nothing is missing, and leave nothing behind.

        `release` lets the processes run. It is called when pages are being served already: a signal that
        waits for a thread is delivered by it, and its frame may go to a page that is missing.

        Raises:
            MigrationError: The line broke, or there is no room. Whoever waits for a page goes on waiting, and
                the source opens another line.
        """
        from godwit.wire.packing import Unpacker

        # Before there is a second thread, as the kernel wants it.
        ns.setns(self.home.number, ns.CLONE_NEWNS)
        pager = Pager(channel, self.pending, self.uffds, Unpacker(), self._adopt)
        began = time.monotonic()
        with (
            contextlib.closing(self.pending),  # the pager may be done before all is released
            concurrent.futures.ThreadPoolExecutor(1, "pager") as beside,
        ):
            served = beside.submit(self._serve, pager)
            # Whoever asks us to go asks the pager, which knows when it may.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            release()
            self.pending.note_released()
            self._resumed_ms = round((time.monotonic() - began) * 1000, 3)
            return served.result()

    def _serve(self, pager: Pager) -> DrainedEntry:
        try:
            pager.run()
            # Before the source is told: whoever closes last must not leave a range behind in which somebody
            # waits for a page that nobody will bring.
            while not self._let_go():
                pager.step()
            self._done = True
            return pager.finish(self._resumed_ms)
        except OSError as error:
            raise MigrationError(
                f"not all of the last pages came ({error}); who waits for one waits until the source is back",
                survivor=Survivor.DESTINATION,
            ) from error
        finally:
            pager.close()
            if not self._done:
                # At once: what is being released may wait for a page that only a successor can bring.
                self.pending.close()

    def _let_go(self) -> bool:
        """Have the pod's init close what it kept; tell whether it did."""
        kept = [space.kept_at for space in self.pending.spaces.values()]
        try:
            keeper.let_go(Pid(self.init.pid), kept)
        except (GodwitError, OSError) as error:
            if self._init_lives():
                log.warning("the pod's init cannot be stopped just now: %s", error)
                return False
            # The pod has ended, and what its init kept is closed.
        pending.remove(self.migration)
        return True

    def resume(self, channel: Channel) -> DrainedEntry:
        """Tell a source on a new line what is still missing, and serve. Raises as `serve` does."""
        if self.pending.torn:
            raise MigrationError(
                "a pager was killed while a child was born, and took along what would have filled its memory",
                survivor=Survivor.DESTINATION,
                remedy="the program waits where it is; end it, and restart it from a checkpoint",
            )
        for space in self.pending.spaces.values():
            for shift, found in space.pending.items():
                runs = [] if space.dead else sorted((start - shift, end - shift) for start, end in found)
                for first in range(0, len(runs), frames.CHUNK_RUNS):
                    part = runs[first : first + frames.CHUNK_RUNS]
                    channel.send(FrameKind.LEFT, frames.pages_head(space.source, 0, part))
        entry = ResumeEntry(migration=self.migration, epoch=self.pending.epoch)
        channel.send(FrameKind.RESUME, codec.encode(entry))
        return self.serve(channel)

    def abandon(self) -> None:
        """Forget everything: what was built is not going to run."""
        for uffd in self.uffds.values():
            uffd.close()
        self.pending.close()
        pending.remove(self.migration)

    def _adopt(self, uffd: OwnedFd) -> int:
        try:
            return keeper.keep(Pid(self.init.pid), uffd.number)
        except (GodwitError, OSError) as error:
            log.warning("the pod's init cannot keep a child's memory together: %s", error)
            return -1
