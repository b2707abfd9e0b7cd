"""Samples of every entry, for `tests/golden/formatN`.

`python -m tests.golden.samples` writes those that the newest format lacks. One that is there is never
written again: it is what a released Godwit wrote.
"""

# ruff: noqa: ANN401

from __future__ import annotations

import dataclasses
import enum
import itertools
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from godwit.images import codec
from godwit.migrate import entries
from godwit.resources import registry
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry
from godwit.resources.process import TreeEntry
from godwit.types import PAGE_SIZE
from godwit.wire import frames
from godwit.wire.frames import FrameKind

DIRECTORY = Path(__file__).parent
NEWEST = DIRECTORY / f"format{frames.FORMAT}"
STREAM = "stream.bin"
INCREMENT = "increment.bin"

# As many as the largest enumeration has members: each member is in some sample.
_REPEATED = 4


def kinds() -> dict[str, Any]:
    """Return every type that a stream holds, by the name of its sample."""
    found: dict[str, Any] = {
        "header": entries.HeaderEntry,
        "hello": entries.HelloEntry,
        "outline": tuple[OutlineEntry, DemandEntry, ClockEntry],
        "verdict": entries.VerdictEntry,
        "tree": TreeEntry,
        "files": entries.FilesEntry,
        "end": entries.EndEntry,
        "ready": entries.ReadyEntry,
        "running": entries.RunningEntry,
        "abort": entries.ErrorEntry,
        "query": entries.QueryEntry,
        "answer": entries.AnswerEntry,
        "lane": entries.LaneEntry,
    }
    for kind in registry.KINDS:
        if dataclasses.fields(kind.entry):  # those that no image holds have none
            found[f"file-{kind.tag:02}-{kind.name.replace(' ', '-')}"] = kind.entry
    return found


class Maker:
    """Makes values of any entry's type; the same ones each time."""

    def __init__(self) -> None:
        self._numbers = itertools.cycle(range(1, 100))
        self._members: dict[type[enum.Enum], Iterator[enum.Enum]] = {}

    def value(self, kind: Any) -> Any:
        """Return a value with every optional part there."""
        if isinstance(kind, typing.NewType):
            return self.value(kind.__supertype__)
        if kind in (int, bool, str, bytes, float):
            return self._leaf(kind)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return next(self._members.setdefault(kind, itertools.cycle(kind)))
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            hints = typing.get_type_hints(kind, include_extras=True)
            return kind(**{each.name: self.value(hints[each.name]) for each in dataclasses.fields(kind)})
        return self._of_alias(typing.get_origin(kind), typing.get_args(kind))

    def _leaf(self, kind: type) -> Any:
        number = next(self._numbers)
        if kind is bytes:
            return b"\x00\xff" + str(number).encode()
        return f"text {number}" if kind is str else kind(number % 2 if kind is bool else number)

    def _of_alias(self, origin: Any, arguments: tuple[Any, ...]) -> Any:
        if origin is tuple and arguments[-1:] == (Ellipsis,):
            return tuple(self.value(arguments[0]) for _ in range(_REPEATED))
        if origin is tuple:
            return tuple(map(self.value, arguments))
        if origin is typing.Annotated:
            return self.value(arguments[0])
        assert origin in (typing.Union, types.UnionType), f"a field of type {origin}"
        return self.value(next(each for each in arguments if each is not type(None)))


def stream() -> bytes:
    """Return a whole stream: the frames of a checkpoint, with two runs of pages."""
    known = kinds()
    maker = Maker()
    runs = [(PAGE_SIZE, 2 * PAGE_SIZE), (4 * PAGE_SIZE, 6 * PAGE_SIZE)]
    pages = frames.pages_head(0, 0, runs) + b"".join(bytes([number]) * PAGE_SIZE for number in (1, 2, 3))
    parts = [
        (FrameKind.HEADER, codec.encode(maker.value(known["header"]))),
        (FrameKind.OUTLINE, codec.encode(maker.value(known["outline"]))),
        (FrameKind.TREE, codec.encode(maker.value(known["tree"]))),
        (FrameKind.FILES, codec.encode(maker.value(known["files"]))),
        (FrameKind.PAGES, pages),
        (FrameKind.END, codec.encode(entries.EndEntry(pages=3, frames=1))),
    ]
    bodies = (frames.frame_header(kind, [payload]) + payload for kind, payload in parts)
    return frames.preamble() + b"".join(bodies)


def increment() -> bytes:
    """Return a checkpoint that goes on from that of `stream`, with a round, and pages that went away."""
    known = kinds()
    maker = Maker()
    header = dataclasses.replace(
        maker.value(known["header"]), parent="0123456789abcdef" * 2, parent_digest=bytes(range(16))
    )
    outline = codec.encode(maker.value(known["outline"]))
    run = [(PAGE_SIZE, 2 * PAGE_SIZE)]
    parts = [
        (FrameKind.HEADER, codec.encode(header)),
        (FrameKind.OUTLINE, outline),
        (FrameKind.DROP, frames.pages_head(0, 0, run)),
        (FrameKind.PAGES, frames.pages_head(0, 0, run) + b"\x01" * PAGE_SIZE),
        (FrameKind.ROUND, codec.encode(entries.RoundEntry(number=1))),
        (FrameKind.OUTLINE, outline),
        (FrameKind.TREE, codec.encode(maker.value(known["tree"]))),
        (FrameKind.FILES, codec.encode(maker.value(known["files"]))),
        (FrameKind.PAGES, frames.pages_head(frames.OBJECT, 1, run) + b"\x02" * PAGE_SIZE),
        (FrameKind.END, codec.encode(entries.EndEntry(pages=2, frames=3))),
    ]
    bodies = (frames.frame_header(kind, [payload]) + payload for kind, payload in parts)
    return frames.preamble() + b"".join(bodies)


def write() -> None:
    """Write what is missing of the newest format."""
    NEWEST.mkdir(exist_ok=True)
    for name, kind in kinds().items():
        if not (NEWEST / f"{name}.bin").exists():
            entry = Maker().value(kind)
            (NEWEST / f"{name}.bin").write_bytes(codec.encode(entry))
            (NEWEST / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(entry)) + b"\n")
    for name, made in ((STREAM, stream), (INCREMENT, increment)):
        if not (NEWEST / name).exists():
            (NEWEST / name).write_bytes(made())


if __name__ == "__main__":
    write()
