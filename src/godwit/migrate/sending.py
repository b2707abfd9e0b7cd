"""Writing a tree to a stream: to another machine or into a file."""

from __future__ import annotations

from collections.abc import Callable

from godwit.engine.capture import Capture
from godwit.engine.pages import PageSource, chunks, read_pages
from godwit.engine.view import TreeView
from godwit.images import codec
from godwit.linux.arch import MACHINE
from godwit.migrate.channel import Channel
from godwit.migrate.entries import EndEntry, FileEntry, FilesEntry, HeaderEntry
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry
from godwit.resources.process import MachineEntry
from godwit.types import PAGE_SIZE
from godwit.wire import frames
from godwit.wire.frames import FrameKind


def header_of(view: TreeView, machine: MachineEntry, migration: str, version: str) -> HeaderEntry:
    """Describe a stream about a tree."""
    private = sum(
        mapping.anonymous_bytes + mapping.swap_bytes
        for process in view.processes
        for mapping in process.mappings
    )
    return HeaderEntry(
        migration=migration,
        program=view.root.stat.comm.encode("utf-8", "surrogateescape"),
        pid=view.root.status.nspid[-1],
        version=version,
        architecture=MACHINE,
        machine=machine,
        private_bytes=private,
    )


def send_outline(channel: Channel, shape: OutlineEntry, demand: DemandEntry, clock: ClockEntry) -> None:
    """Write what the destination prepares by."""
    channel.send(FrameKind.OUTLINE, codec.encode((shape, demand, clock)))


def send_tree(channel: Channel, captured: Capture) -> None:
    """Write the frozen tree and its open files."""
    channel.send(FrameKind.TREE, codec.encode(captured.tree))
    files = tuple(FileEntry(tag=kind.tag, body=codec.encode(entry)) for kind, entry in captured.files)
    channel.send(FrameKind.FILES, codec.encode(FilesEntry(files=files)))


def page_buffer() -> bytearray:
    """Return a buffer for `send_pages`, touched: a fresh one costs most at its first use."""
    return bytearray(bytes(frames.CHUNK_BYTES))


def send_pages(
    channel: Channel, captured: Capture, buffer: bytearray, after_chunk: Callable[[int], None]
) -> int:
    """Write all pages and the END frame; return how many pages there were.

    `after_chunk` is called with the bytes so far; what it raises ends the sending.
    """
    view = memoryview(buffer)
    done_bytes, count = 0, 0
    for source in captured.sources:
        for runs in chunks(source.runs(), frames.CHUNK_BYTES, frames.CHUNK_RUNS):
            length = read_pages(source, runs, view)
            head = frames.pages_head(*_target(source), runs)
            channel.send(FrameKind.PAGES, head, view[:length])
            done_bytes += length
            count += 1
            after_chunk(done_bytes)
    pages = done_bytes // PAGE_SIZE
    channel.send(FrameKind.END, codec.encode(EndEntry(pages=pages, frames=count)))
    return pages


def _target(source: PageSource) -> tuple[int, int]:
    if source.pid is None:
        return frames.OBJECT, source.object_id
    return source.process, 0
