"""What a chain of images holds besides pages, read before anything is made of it.

Pages are passed over here, unread; their checksums are looked at when they are put where they belong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from godwit.errors import ImageError
from godwit.images import codec
from godwit.migrate import admit, filling, receiving
from godwit.migrate.channel import Closed
from godwit.migrate.entries import HeaderEntry, RoundEntry
from godwit.migrate.store import Opened, about
from godwit.resources.base import FileKind
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry, outline_of
from godwit.resources.process import TreeEntry
from godwit.types import OwnedFd
from godwit.wire import frames
from godwit.wire.frames import FrameKind

_OUTLINES: Final = 10_000  # of a chain; no honest one comes near


@dataclass(slots=True)
class Survey:
    """The entries of a chain."""

    header: HeaderEntry  # of the last image, as all that follows
    shapes: list[OutlineEntry] = field(default_factory=list[OutlineEntry])
    """Of all images: what each OUTLINE and each TREE describes, in their order."""
    shape: OutlineEntry | None = None  # of its last OUTLINE
    demand: DemandEntry | None = None
    clock: ClockEntry | None = None
    tree: TreeEntry | None = None
    files: tuple[tuple[FileKind, Any], ...] = ()


class _Frames:
    """The frames of a file in their order."""

    def __init__(self, fd: OwnedFd) -> None:
        self._fd = fd
        self._at = frames.PREAMBLE_BYTES
        self._size = os.fstat(fd.number).st_size
        frames.check_preamble(self._read(0, frames.PREAMBLE_BYTES))

    def next(self, *kinds: FrameKind) -> tuple[FrameKind, memoryview]:
        """Return a frame, which must be of one of the kinds; of pages, without its payload."""
        header = frames.read_frame_header(self._read(self._at, frames.FRAME_HEADER_BYTES))
        if header.kind not in kinds:
            wanted = " or ".join(each.name for each in kinds)
            raise ImageError(f"the image has {header.kind.name} where {wanted} should come")
        begin = self._at + frames.FRAME_HEADER_BYTES
        self._at = begin + header.length_bytes
        if self._at > self._size:
            raise Closed("the stream ended within a frame")
        if header.kind in filling.KINDS:
            return header.kind, memoryview(b"")
        payload = memoryview(self._read(begin, header.length_bytes))
        frames.check_payload(header, payload)
        return header.kind, payload

    def _read(self, begin: int, length: int) -> bytes:
        found = os.pread(self._fd.number, length, begin) if begin + length <= self._size else b""
        if len(found) < length:
            raise Closed("the stream ended" if begin >= self._size else "the stream ended within a frame")
        return found

    def end(self) -> None:
        """See that nothing follows."""
        if self._at != self._size:
            raise ImageError("the image goes on after its end")


def survey(chain: Sequence[Opened]) -> Survey:
    """Read everything but the pages of a chain, oldest image first.

    Raises:
        ImageError: It is damaged or dishonest.
    """
    found = Survey(chain[-1].header)
    for link in chain:
        with about(link.path), receiving.honest():
            _survey(link, found)
    return found


def _survey(link: Opened, found: Survey) -> None:
    stream = _Frames(link.fd)
    stream.next(FrameKind.HEADER)
    kind, payload = stream.next(FrameKind.OUTLINE)
    while kind is not FrameKind.TREE:
        if kind is FrameKind.OUTLINE:
            found.shape, found.demand, found.clock = receiving.read_outline(payload)
            _note(found, link.header, found.shape)
        elif kind is FrameKind.ROUND:
            # The kind of a frame is in no checksum: an OUTLINE must not pass for one.
            codec.decode(payload, RoundEntry)
        kind, payload = stream.next(*filling.KINDS, FrameKind.ROUND, FrameKind.OUTLINE, FrameKind.TREE)
    found.tree = codec.decode(payload, TreeEntry)
    receiving.check_tree(link.header, found.tree)
    _note(found, link.header, outline_of(found.tree))
    _, payload = stream.next(FrameKind.FILES)
    found.files = receiving.read_files(payload)
    while kind is not FrameKind.END:
        kind, _ = stream.next(*filling.KINDS, FrameKind.END)
    stream.end()


def _note(found: Survey, header: HeaderEntry, shape: OutlineEntry) -> None:
    wrong = admit.problem(header, shape)
    if wrong:
        raise ImageError(f"the image is malformed: {wrong}")
    if len(found.shapes) >= _OUTLINES:
        raise ImageError(f"the image describes its tree more than {_OUTLINES} times")
    found.shapes.append(shape)
