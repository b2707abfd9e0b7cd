"""Post-copy at the destination, from the agreement to the last page: see `pager` for the serving itself."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from godwit.engine import keeper
from godwit.engine.build import Builder
from godwit.errors import GodwitError, ImageError, MigrationError, Survivor
from godwit.images import codec
from godwit.linux import ns
from godwit.log import log
from godwit.migrate import journal, pending
from godwit.migrate.channel import Channel
from godwit.migrate.entries import DrainedEntry, ResumeEntry
from godwit.migrate.journal import Member, Record
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

    @classmethod
    def begin(cls, builder: Builder, record: Record, home: OwnedFd) -> Paging | None:
        """Note what is missing; None if nothing is."""
        if not builder.left:
            return None
        assert builder.shape is not None
        assert record.pod_init is not None
        made = cls(record.migration, Pending.create(record.migration), record.pod_init, home)
        uffds = builder.take_uffds()
        for index, space in enumerate(builder.shape.spaces):
            if space.pid not in builder.left:
                continue
            lacking = made.pending.add(index, builder.kept_at[space.pid])
            for start, end in builder.left[space.pid]:
                made.pending.leave(lacking, start, end)
            made.uffds[lacking.number] = uffds[space.pid]
        return made

    @classmethod
    def take_over(cls, migration: str) -> Paging:
        """Go on where another pager of the move has stopped.

        Raises:
            MigrationError: There is nothing to go on with.
        """
        record = journal.read(migration, "destination")
        try:
            known = Pending.take_over(migration)
        except FileNotFoundError:
            raise MigrationError(
                "no pages are awaited here for this move", survivor=Survivor.UNDECIDED
            ) from None
        if record is None or record.pod_init is None:
            raise MigrationError("this move is not known here", survivor=Survivor.UNDECIDED)
        home = OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        made = cls(migration, known, record.pod_init, home)
        made._take_uffds()
        return made

    def _take_uffds(self) -> None:
        init = self.init
        alive = False
        with contextlib.suppress(ProcessLookupError):
            alive = stat.read(Pid(init.pid)).starttime == init.starttime
        for space in self.pending.spaces.values():
            if space.dead:
                continue
            if not alive:
                self.pending.dead(space)
                continue
            if space.kept_at < 0:
                raise ImageError(f"nobody has kept the memory of process {space.number} together")
            self.uffds[space.number] = keeper.take(Pid(init.pid), space.kept_at)

    def serve(self, channel: Channel) -> DrainedEntry:
        """Serve until nothing is missing, and leave nothing behind.

        Raises:
            Closed, OSError, GodwitError: The line broke. Whoever waits for a page goes on waiting.
        """
        from godwit.wire.packing import Unpacker

        ns.setns(self.home.number, ns.CLONE_NEWNS)
        pager = Pager(channel, self.pending, self.uffds, Unpacker(), self._adopt)
        try:
            drained = pager.run()
        finally:
            pager.close()
            self.pending.close()
        with contextlib.suppress(GodwitError, OSError):
            keeper.let_go(Pid(self.init.pid), [space.kept_at for space in self.pending.spaces.values()])
        pending.remove(self.migration)
        return drained

    def resume(self, channel: Channel) -> DrainedEntry:
        """Tell a source on a new line what is still missing, and serve. Raises as `serve` does."""
        lost = self.pending.torn
        if lost:
            raise MigrationError(
                "a pager was killed while it was told of a change: what is missing is not known for sure",
                survivor=Survivor.UNDECIDED,
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
