"""Writing a tree to a stream: to another machine or into a file."""

from __future__ import annotations

from godwit.engine.capture import Capture
from godwit.engine.view import TreeView
from godwit.images import codec
from godwit.linux.arch import MACHINE
from godwit.migrate.channel import Channel
from godwit.migrate.entries import FileEntry, FilesEntry, HeaderEntry
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry
from godwit.resources.process import MachineEntry
from godwit.wire.frames import FrameKind


def header_of(
    view: TreeView, machine: MachineEntry, migration: str, version: str, *, postcopy: bool = False
) -> HeaderEntry:
    """Describe a stream about a tree."""
    return HeaderEntry(
        migration=migration,
        program=view.root.stat.comm.encode("utf-8", "surrogateescape"),
        pid=view.root.status.nspid[-1],
        version=version,
        architecture=MACHINE,
        machine=machine,
        private_bytes=view.private_bytes,
        postcopy=postcopy,
    )


def send_outline(channel: Channel, shape: OutlineEntry, demand: DemandEntry, clock: ClockEntry) -> None:
    """Write what the destination prepares by."""
    channel.send(FrameKind.OUTLINE, codec.encode((shape, demand, clock)))


def send_tree(channel: Channel, captured: Capture) -> None:
    """Write the frozen tree and its open files."""
    channel.send(FrameKind.TREE, codec.encode(captured.tree))
    files = tuple(FileEntry(tag=kind.tag, body=codec.encode(entry)) for kind, entry in captured.files)
    channel.send(FrameKind.FILES, codec.encode(FilesEntry(files=files)))
