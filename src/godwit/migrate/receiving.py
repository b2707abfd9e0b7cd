"""Reading a tree from a stream and building it: from another machine or from a file."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

from godwit.engine.build import Builder
from godwit.errors import ImageError
from godwit.images import codec
from godwit.migrate import admit, filling
from godwit.migrate.channel import Channel
from godwit.migrate.entries import FilesEntry, HeaderEntry
from godwit.migrate.filling import Filling
from godwit.migrate.report import Stopwatch
from godwit.resources import memory, registry, thread
from godwit.resources.base import FileKind
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry, outline_of
from godwit.resources.process import ProcessState, TreeEntry
from godwit.wire.frames import FrameKind


@contextlib.contextmanager
def honest() -> Iterator[None]:
    """Turn what numbers out of range do to the block into the error that they are.

    Entries are checked where a wrong one could do harm; elsewhere the kernel's structures refuse them.
    """
    try:
        yield
    except (struct.error, OverflowError, ValueError, KeyError, IndexError) as error:
        raise ImageError(f"the image is malformed: {type(error).__name__}: {error}") from error


def read_outline(payload: memoryview) -> tuple[OutlineEntry, DemandEntry, ClockEntry]:
    """Decode an OUTLINE frame. Raises ImageError."""
    return codec.decode(payload, tuple[OutlineEntry, DemandEntry, ClockEntry])


def check_tree(header: HeaderEntry, tree: TreeEntry) -> None:
    """Raise ImageError if a frozen tree holds what no honest source sends."""
    wrong = admit.problem(header, outline_of(tree))
    if wrong:
        raise ImageError(f"the image is malformed: {wrong}")
    living = [identity for identity in tree.identities if identity.state is not ProcessState.ZOMBIE]
    if [process.identity for process in tree.processes] != living:
        raise ImageError("the image is malformed: its processes are not those it lists")
    for process in tree.processes:
        wrong = memory.problem(process.memory)
        for own in process.threads:
            wrong = wrong or thread.problem(own)
        if tuple(own.tid for own in process.threads) != process.identity.tids:
            wrong = wrong or "its threads are not those it lists"
        indexes = [process.exe, process.cwd, process.root + 1, *(vma.file for vma in process.memory.vmas)]
        if any(index > len(tree.path_files) for index in indexes) or min(process.exe, process.cwd) < 0:
            wrong = wrong or "it refers to a file that is not listed"
        if wrong:
            raise ImageError(f"the image is malformed: pid {process.identity.pid}: {wrong}")


def read_files(payload: memoryview) -> tuple[tuple[FileKind, Any], ...]:
    """Decode a FILES frame. Raises ImageError."""
    found = codec.decode(payload, FilesEntry)
    decoded: list[tuple[FileKind, Any]] = []
    for file in found.files:
        kind = registry.kind_by_tag(file.tag)
        decoded.append((kind, codec.decode(file.body, kind.entry)))
    return tuple(decoded)


def receive_tree(
    channel: Channel,
    builder: Builder,
    header: HeaderEntry,
    payload: memoryview,
    filled: Filling,
    watch: Stopwatch,
) -> TreeEntry:
    """Read FILES, pages and END into a prepared builder; complete every process.

    `payload` is that of the TREE frame, just read; `filled` is what has come before it.

    Raises:
        ImageError, DestinationError, Closed: The builder must be destroyed.
    """
    tree = codec.decode(payload, TreeEntry)
    check_tree(header, tree)
    _, payload = channel.expect(FrameKind.FILES)
    files = read_files(payload)
    builder.prepare(outline_of(tree))
    builder.equip(tree, files)
    watch.lap("entries")
    while True:
        kind, payload = channel.expect(*filling.KINDS, FrameKind.END)
        if kind is FrameKind.END:
            break
        filled.take(kind, payload)
    filled.check_end(payload)
    watch.lap("pages")
    builder.complete()
    watch.lap("complete")
    return tree
