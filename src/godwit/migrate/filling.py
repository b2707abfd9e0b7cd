"""Pages on their way in: unpacked, checked and put where they belong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from godwit.engine.ranges import Ranges, total
from godwit.errors import ImageError
from godwit.images import codec
from godwit.migrate.entries import EndEntry
from godwit.types import PAGE_SIZE
from godwit.wire import frames
from godwit.wire.frames import FrameKind

if TYPE_CHECKING:
    from godwit.wire.packing import Unpacker

KINDS: Final = (
    FrameKind.PAGES,
    FrameKind.ZEROES,
    FrameKind.COPIES,
    FrameKind.PACKED,
    FrameKind.DROP,
    FrameKind.LEFT,
)


def _unpacker() -> Unpacker:
    from godwit.wire.packing import Unpacker

    return Unpacker()


class Ground(Protocol):
    """Where pages are put: a `Groundwork`, or what stands before one."""

    def write_process_pages(self, index: int, runs: Ranges, data: memoryview | None) -> None:
        """Write pages of a process, zeroes without data."""
        ...

    def drop_process_pages(self, index: int, runs: Ranges) -> None:
        """Give up pages of a process."""
        ...

    def write_object_pages(self, object_id: int, runs: Ranges, data: memoryview | None) -> None:
        """Write pages of a memory object, zeroes without data."""
        ...

    def drop_object_pages(self, object_id: int, runs: Ranges) -> None:
        """Punch holes into a memory object."""
        ...

    def leave(self, index: int, runs: Ranges) -> None:
        """Take note that pages of a process come later."""
        ...


@dataclass(slots=True)
class Filling:
    """All pages of one stream, in as many rounds as it takes."""

    ground: Ground
    unpacker: Unpacker = field(default_factory=_unpacker)
    pages: int = 0
    frames: int = 0

    def take(self, kind: FrameKind, payload: memoryview) -> None:
        """Take a frame of one of KINDS. Raises ImageError if it is dishonest."""
        self.frames += 1
        if kind in (FrameKind.DROP, FrameKind.LEFT):
            self._take_runs(kind, payload)
            return
        for process, object_id, runs, data in self.unpacker.unpack(kind, payload):
            if process == frames.OBJECT:
                self.ground.write_object_pages(object_id, runs, data)
            else:
                self.ground.write_process_pages(process, runs, data)
            self.pages += total(runs) // PAGE_SIZE

    def _take_runs(self, kind: FrameKind, payload: memoryview) -> None:
        head = frames.read_runs(payload, kind)
        if head.length_bytes != len(payload):
            raise ImageError(f"a {kind.name} frame holds more than its runs")
        if kind is FrameKind.LEFT:
            self.ground.leave(head.process, head.runs)
        elif head.process == frames.OBJECT:
            self.ground.drop_object_pages(head.object_id, head.runs)
        else:
            self.ground.drop_process_pages(head.process, head.runs)

    def check_end(self, payload: memoryview) -> None:
        """See that everything came that an END frame announces. Raises ImageError."""
        end = codec.decode(payload, EndEntry)
        if (end.pages, end.frames) != (self.pages, self.frames):
            raise ImageError(f"the image announces {end.pages} pages and holds {self.pages}")
