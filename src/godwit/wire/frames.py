"""The migration stream: a preamble, then frames. `docs/formats/stream.md` is the specification.

A checkpoint on disk is the same stream in a file. Little-endian throughout.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

from godwit.errors import ImageError
from godwit.types import PAGE_SIZE

MAGIC: Final = b"GODWIT\r\n"
FORMAT: Final = 1
_PREAMBLE: Final = struct.Struct("<8sHHI")
PREAMBLE_BYTES: Final = _PREAMBLE.size
_FRAME: Final = struct.Struct("<IIQQ")
FRAME_HEADER_BYTES: Final = _FRAME.size
_PAGES: Final = struct.Struct("<IIII")
_RUN: Final = struct.Struct("<QQ")

CHUNK_BYTES: Final = 1 << 20
CHUNK_RUNS: Final = 2048
PAGES_LIMIT_BYTES: Final = CHUNK_BYTES + _PAGES.size + CHUNK_RUNS * _RUN.size
RUNS_LIMIT_BYTES: Final = _PAGES.size + CHUNK_RUNS * _RUN.size
COPIES_LIMIT_BYTES: Final = RUNS_LIMIT_BYTES + CHUNK_BYTES // PAGE_SIZE * 4
ENTRIES_LIMIT_BYTES: Final = 256 << 20
OBJECT: Final = 0xFFFFFFFF


class FrameKind(enum.IntEnum):
    """What a frame holds. A number, once released, keeps its meaning."""

    HEADER = 1  # source: who writes this, for what machine
    HELLO = 2  # destination: what it is and has
    OUTLINE = 3  # source: what to prepare, while the program still runs
    VERDICT = 4  # destination: refusals; none means that all is prepared
    TREE = 5  # source: the frozen tree
    FILES = 6  # source: its open files
    PAGES = 7  # source: pages of a process or of a memory object
    END = 8  # source: how much there was
    READY = 9  # destination: complete, verified, one call away from running
    GO = 10  # source: the commit decision is in its journal
    RUNNING = 11  # destination: it runs here
    ABORT = 12  # either: why not
    QUERY = 13  # source, on a new connection: what became of a move
    ANSWER = 14  # destination: this
    ZEROES = 15  # source: where pages are zero
    COPIES = 16  # source: pages that came before, by their slot
    PACKED = 17  # source: pages, compressed or to be kept for COPIES; see `packing`
    DROP = 18  # source: pages that came before and are not there any more
    ROUND = 19  # source: a round of copying ends; destination: all of it is in place
    LEFT = 20  # source: ranges that stay behind, and are asked for or follow when the tree runs
    REQUEST = 21  # destination, running: pages that somebody waits for
    CREDIT = 22  # destination, running: so many frames were dealt with
    DRAINED = 23  # source: nothing is left behind; destination: nor awaited
    RESUME = 24  # source, on a new connection: more of what was left; destination: go on
    LANE = 25  # source, on a new connection: pages of rounds come here too; destination: let them come


_LIMITS_BYTES: Final = {
    FrameKind.PAGES: PAGES_LIMIT_BYTES,
    FrameKind.ZEROES: RUNS_LIMIT_BYTES,
    FrameKind.COPIES: COPIES_LIMIT_BYTES,
    FrameKind.PACKED: PAGES_LIMIT_BYTES,
    FrameKind.DROP: RUNS_LIMIT_BYTES,
    FrameKind.LEFT: RUNS_LIMIT_BYTES,
    FrameKind.REQUEST: RUNS_LIMIT_BYTES,
}


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The fixed part of a frame."""

    kind: FrameKind
    length_bytes: int
    checksum: int


def preamble() -> bytes:
    """Return the first bytes of a stream."""
    head = struct.pack("<8sHH", MAGIC, FORMAT, 0)
    return head + struct.pack("<I", xxhash.xxh32_intdigest(head))


def check_preamble(raw: bytes) -> int:
    """Return the format of a stream that begins so.

    Raises:
        ImageError: It is no stream of ours, is damaged, or newer than we are.
    """
    if len(raw) < PREAMBLE_BYTES or raw[: len(MAGIC)] != MAGIC:
        raise ImageError("not a Godwit image: it does not begin with the magic bytes")
    _, version, _, checksum = _PREAMBLE.unpack_from(raw)
    if checksum != xxhash.xxh32_intdigest(raw[: PREAMBLE_BYTES - 4]):
        raise ImageError("the image's first bytes are damaged", remedy="copy it again from the original")
    if version > FORMAT:
        raise ImageError(
            f"the image has format {version}; this Godwit reads up to {FORMAT}",
            remedy="use the Godwit version that wrote it, or a newer one",
        )
    return int(version)


def checksum_of(parts: Sequence[bytes | bytearray | memoryview]) -> int:
    """Return the checksum of a payload given in parts."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()


def frame_header(kind: FrameKind, parts: Sequence[bytes | bytearray | memoryview]) -> bytes:
    """Return the header that goes before the parts of a payload."""
    return _FRAME.pack(kind, 0, sum(len(part) for part in parts), checksum_of(parts))


def read_frame_header(raw: bytes | memoryview) -> FrameHeader:
    """Take a frame's header apart.

    Raises:
        ImageError: Unknown kind, or a length beyond the kind's limit.
    """
    number, flags, length, checksum = _FRAME.unpack_from(raw)
    try:
        kind = FrameKind(number)
    except ValueError:
        raise ImageError(
            f"the stream has a frame of kind {number}, which this Godwit does not know"
        ) from None
    limit = _LIMITS_BYTES.get(kind, ENTRIES_LIMIT_BYTES)
    if flags or length > limit:
        raise ImageError(f"the stream has a {kind.name} frame of {length} bytes; the limit is {limit}")
    return FrameHeader(kind, length, checksum)


def check_payload(header: FrameHeader, payload: memoryview) -> None:
    """Raise ImageError unless the payload is what the header announced."""
    if xxhash.xxh3_64_intdigest(payload) != header.checksum:
        raise ImageError(
            f"a {header.kind.name} frame is damaged: its checksum is wrong",
            remedy="copy the image again from the original",
        )


def pages_head(process: int, object_id: int, runs: Sequence[tuple[int, int]]) -> bytes:
    """Return what precedes the pages in a PAGES frame.

    Args:
        process: Index into the tree's processes, or OBJECT.
        object_id: With OBJECT: which.
        runs: (start, end) by address or offset.
    """
    return _PAGES.pack(process, object_id, len(runs), 0) + b"".join(_RUN.pack(*run) for run in runs)


@dataclass(frozen=True, slots=True)
class RunsHead:
    """What PAGES, ZEROES and COPIES begin with: whose pages, and which."""

    process: int  # index into the tree's processes, or OBJECT
    object_id: int
    runs: list[tuple[int, int]]
    pages_bytes: int  # of all runs together
    length_bytes: int  # of this head


def read_runs(payload: memoryview, kind: FrameKind) -> RunsHead:
    """Take the head of a frame about pages apart.

    Raises:
        ImageError: The runs are not made of pages, are out of order, or end before their number says.
    """
    if len(payload) < _PAGES.size:
        raise ImageError(f"a {kind.name} frame is too short")
    process, object_id, count, _ = _PAGES.unpack_from(payload)
    data_at = _PAGES.size + count * _RUN.size
    if count > CHUNK_RUNS or data_at > len(payload):
        raise ImageError(f"a {kind.name} frame claims {count} runs")
    runs: list[tuple[int, int]] = []
    total, last = 0, 0
    for start, end in _RUN.iter_unpack(payload[_PAGES.size : data_at]):
        if start % PAGE_SIZE or end % PAGE_SIZE or not last <= start < end:
            raise ImageError(f"a {kind.name} frame has an impossible run {start:#x}-{end:#x}")
        runs.append((start, end))
        total += end - start
        last = end
    return RunsHead(process, object_id, runs, total, data_at)


def read_pages(payload: memoryview) -> tuple[int, int, list[tuple[int, int]], memoryview]:
    """Take a PAGES payload apart: process index or OBJECT, object id, runs, the pages.

    Raises:
        ImageError: The runs are not made of pages, are out of order, or do not match the data.
    """
    head = read_runs(payload, FrameKind.PAGES)
    data = payload[head.length_bytes :]
    if head.pages_bytes != len(data):
        raise ImageError(f"a PAGES frame holds {len(data)} bytes for {head.pages_bytes} bytes of pages")
    return head.process, head.object_id, head.runs, data
