"""Pages on their way out: read in chunks, packed, and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from godwit.engine.pages import chunks
from godwit.engine.ranges import Range, Ranges
from godwit.images import codec
from godwit.migrate.channel import Channel
from godwit.migrate.entries import EndEntry
from godwit.types import PAGE_SIZE
from godwit.wire import frames
from godwit.wire.frames import FrameKind

if TYPE_CHECKING:
    from godwit.wire.packing import Packer

Owner = tuple[int, int]
"""Whose pages: (index of a process, 0), or (frames.OBJECT, id of a memory object)."""

Read = Callable[[Sequence[Range], memoryview], tuple[Sequence[Range], int]]
"""Reads runs into a buffer, one after the other; returns those that could be read, and their bytes."""


def buffer_of_pages() -> bytearray:
    """Return a buffer for pages, touched: a fresh one costs most at its first use."""
    return bytearray(bytes(frames.CHUNK_BYTES))


@dataclass(slots=True)
class PageStream:
    """All pages of one stream, in as many rounds as it takes."""

    channel: Channel
    buffer: bytearray
    packer: Packer | None = None
    after_chunk: Callable[[int], None] = lambda _: None  # gets the bytes so far; what it raises ends it
    pages: int = 0
    frames: int = 0

    def send(self, owner: Owner, groups: Iterable[Sequence[Range]], read: Read) -> int:
        """Send pages in groups of up to a chunk; return how many. Runs that cannot be read are left out."""
        view, before = memoryview(self.buffer), self.pages
        for wanted in groups:
            runs, length = read(wanted, view)
            if not length:
                continue
            self._send_chunk(owner, runs, view[:length])
            self.pages += length // PAGE_SIZE
            self.after_chunk(self.pages * PAGE_SIZE)
        return self.pages - before

    def _send_chunk(self, owner: Owner, runs: Sequence[Range], data: memoryview) -> None:
        if self.packer is None:
            self.channel.send(FrameKind.PAGES, frames.pages_head(*owner, runs), data)
            self.frames += 1
            return
        for kind, parts in self.packer.pack(*owner, runs, data):
            self.channel.send(kind, *parts)
            self.frames += 1

    def drop(self, owner: Owner, runs: Ranges) -> None:
        """Tell that pages are not there any more."""
        self._tell(FrameKind.DROP, owner, runs)

    def leave(self, process: int, runs: Ranges) -> None:
        """Tell that pages of a process come later."""
        self._tell(FrameKind.LEFT, (process, 0), runs)

    def _tell(self, kind: FrameKind, owner: Owner, runs: Ranges) -> None:
        for first in range(0, len(runs), frames.CHUNK_RUNS):
            self.channel.send(kind, frames.pages_head(*owner, runs[first : first + frames.CHUNK_RUNS]))
            self.frames += 1

    def end(self) -> None:
        """Say how much there was."""
        self.channel.send(FrameKind.END, codec.encode(EndEntry(pages=self.pages, frames=self.frames)))


def in_chunks(runs: Iterable[Range]) -> Iterable[list[Range]]:
    """Cut runs as frames hold them."""
    return chunks(runs, frames.CHUNK_BYTES, frames.CHUNK_RUNS)
