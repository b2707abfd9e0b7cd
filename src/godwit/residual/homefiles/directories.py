"""Listing directories, with and without what their entries are: getdents64(2)."""

from __future__ import annotations

import contextlib
import os
from typing import Final

from godwit.linux import fuse, getdents
from godwit.residual.homefiles import names
from godwit.residual.homefiles.export import Export
from godwit.residual.homefiles.files import Entry, OpenFile
from godwit.residual.homefiles.messages import Parts, Request, fields
from godwit.types import Fd

_NO_ENTRY: Final = bytes(fuse.fuse_entry_out.size + fuse.fuse_attr.size)
_SELF_AND_PARENT: Final = frozenset({b".", b".."})


def readdir(export: Export, request: Request) -> Parts:
    """Answer FUSE_READDIR and FUSE_READDIRPLUS: as many entries as fit, none at the end."""
    fh, offset, size, *_ = fields(request, fuse.fuse_read_in)
    file = export.files.get(fh)
    if file.node.device.is_of_the_kernel or file.node.special:
        return ()
    plus = request.opcode == fuse.FUSE_READDIRPLUS
    if offset != file.next_offset:
        os.lseek(file.fd.number, offset, os.SEEK_SET)
        file.entries.clear()
        file.next_offset = offset
    room = min(size, fuse.MAX_WRITE_BYTES)
    parts: list[bytes] = []
    directory = export.nodes.fd(file.node)
    while entry := _next(file):
        record = _record(entry, with_node=plus)
        if len(record) > room:
            break
        if plus:
            parts.append(_told(export, directory, entry[3]))
            record = record[len(_NO_ENTRY) :]
            room -= len(_NO_ENTRY)
        parts.append(record)
        room -= len(record)
        file.entries.pop()
        file.next_offset = entry[1]
    # One part: writev(2) takes no more than 1024.
    return (b"".join(parts),)


def _next(file: OpenFile) -> Entry | None:
    """Return the next entry without taking it; the entries lie in reverse order."""
    if not file.entries:
        file.entries = getdents.read_entries(file.fd.number)[::-1]
    return file.entries[-1] if file.entries else None


def _record(entry: Entry, *, with_node: bool) -> bytes:
    inode, offset, kind, name = entry
    before = _NO_ENTRY if with_node else b""
    dirent = fuse.fuse_dirent.pack(inode, offset, len(name), kind) + name
    return before + dirent + fuse.padding(len(dirent))


def _told(export: Export, directory: Fd, name: bytes) -> bytes:
    """Return an entry's node, as a lookup tells of it; none for what cannot be looked at or is gone."""
    if name not in _SELF_AND_PARENT:
        with contextlib.suppress(OSError):
            return b"".join(names.entry(export, directory, name))
    return _NO_ENTRY
