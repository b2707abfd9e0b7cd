"""An image taken apart into frames, changed and put together again with checksums that are right."""

# ruff: noqa: ANN401

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from godwit.images import codec
from godwit.migrate.entries import EndEntry, FilesEntry, HeaderEntry
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry
from godwit.resources.process import TreeEntry
from godwit.wire import frames
from godwit.wire.frames import FrameKind

TYPES: dict[FrameKind, Any] = {
    FrameKind.HEADER: HeaderEntry,
    FrameKind.OUTLINE: tuple[OutlineEntry, DemandEntry, ClockEntry],
    FrameKind.TREE: TreeEntry,
    FrameKind.FILES: FilesEntry,
    FrameKind.END: EndEntry,
}


@dataclass(frozen=True)
class Frame:
    """One frame of an image, with the offset at which it began."""

    kind: FrameKind
    payload: bytes
    offset: int


def split(raw: bytes) -> list[Frame]:
    """Take an image apart."""
    found = []
    at = frames.PREAMBLE_BYTES
    while at < len(raw):
        header = frames.read_frame_header(raw[at : at + frames.FRAME_HEADER_BYTES])
        body_at = at + frames.FRAME_HEADER_BYTES
        found.append(Frame(header.kind, raw[body_at : body_at + header.length_bytes], at))
        at = body_at + header.length_bytes
    return found


def join(parts: list[Frame]) -> bytes:
    """Put an image together, with right lengths and checksums."""
    bodies = (frames.frame_header(each.kind, [each.payload]) + each.payload for each in parts)
    return frames.preamble() + b"".join(bodies)


def changed(raw: bytes, kind: FrameKind, change: Callable[[Any], Any]) -> bytes:
    """Return the image with the entry of its first frame of a kind changed."""
    parts = split(raw)
    at = next(index for index, each in enumerate(parts) if each.kind is kind)
    entry = change(codec.decode(parts[at].payload, TYPES[kind]))
    parts[at] = replace(parts[at], payload=codec.encode(entry))
    return join(parts)


def payload_changed(raw: bytes, kind: FrameKind, change: Callable[[bytes], bytes]) -> bytes:
    """Return the image with the bytes of its first frame of a kind changed."""
    parts = split(raw)
    at = next(index for index, each in enumerate(parts) if each.kind is kind)
    parts[at] = replace(parts[at], payload=change(parts[at].payload))
    return join(parts)


def announcing(raw: bytes, kind: FrameKind, length: int) -> bytes:
    """Return the image cut after the header of a frame that announces `length` bytes."""
    part = next(each for each in split(raw) if each.kind is kind)
    return raw[: part.offset] + struct.pack("<IIQQ", kind, 0, length, 0)


def deep(entry: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """Return the entry with what lies at a path of field names and indexes replaced."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        return (*entry[:step], deep(entry[step], rest, value), *entry[step + 1 :])
    return replace(entry, **{step: deep(getattr(entry, step), rest, value)})


def leaves(entry: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield every number, string and byte string of an entry with its path."""
    if is_dataclass(entry):
        for field in fields(entry):
            yield from leaves(getattr(entry, field.name), (*path, field.name))
    elif isinstance(entry, tuple):
        for index, each in enumerate(entry):
            yield from leaves(each, (*path, index))
    else:
        yield path, entry
