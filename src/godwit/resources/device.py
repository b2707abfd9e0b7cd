"""Devices that are the same on every machine: null(4), full(4), random(4). Rebound, not moved."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from godwit.errors import DestinationError, ImageError
from godwit.resources.base import Disposition, FileKind, Finding, OpenFile, RestoreContext, Tree
from godwit.resources.roots import Root
from godwit.types import FileId, OwnedFd

# By minor number; the major is 1, mem.
_MAJOR = 1
_PATHS = {3: b"/dev/null", 5: b"/dev/zero", 7: b"/dev/full", 8: b"/dev/random", 9: b"/dev/urandom"}
# What fcntl(2) cannot set later.
_OPEN_FLAGS = os.O_ACCMODE | os.O_SYNC


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEntry:
    """An open device in an image."""

    file_id: FileId
    minor: int  # of major 1
    path: bytes  # as the program named it
    flags: int  # O_ACCMODE and O_SYNC bits

    @property
    def file_ids(self) -> tuple[FileId, ...]:
        """The open file this restores."""
        return (self.file_id,)


def claims(file: OpenFile) -> bool:
    """Tell whether this module carries the file."""
    same_everywhere = os.major(file.rdevice) == _MAJOR and os.minor(file.rdevice) in _PATHS
    return stat.S_ISCHR(file.mode) and same_everywhere and not file.info.flags & os.O_PATH


def inspect(file: OpenFile, tree: Tree) -> Finding:  # noqa: ARG001
    """Find that the destination's own takes its place."""
    return file.finding(Disposition.REBIND, file.link, "the destination has the same device")


def collect(files: Sequence[OpenFile], tree: Tree) -> Sequence[DeviceEntry]:  # noqa: ARG001
    """Note which device each is."""
    return [
        DeviceEntry(
            file_id=file.file_id,
            minor=os.minor(file.rdevice),
            path=os.fsencode(file.link),
            flags=file.info.flags & _OPEN_FLAGS,
        )
        for file in files
    ]


def restore(entry: DeviceEntry, context: RestoreContext) -> Mapping[FileId, OwnedFd]:
    """Open the same device here, under the program's own name for it if that leads there."""
    usual = _PATHS.get(entry.minor)
    if usual is None or entry.flags & ~_OPEN_FLAGS or b"\0" in entry.path:
        raise ImageError(f"device {entry.file_id} is ({_MAJOR}, {entry.minor}) with flags {entry.flags:#x}")
    for path in (entry.path, usual):
        fd = _open(path, entry, context.root)
        if fd is not None:
            return {entry.file_id: fd}
    raise DestinationError(f"the destination has no {usual.decode()}", remedy="mount devtmpfs at /dev there")


def _open(path: bytes, entry: DeviceEntry, root: Root) -> OwnedFd | None:
    """Open a path if it is the device. Opening another one could already do something: look first."""
    try:
        with root.open(path, os.O_PATH | os.O_NOFOLLOW) as found:
            status = os.fstat(found.number)
            if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(_MAJOR, entry.minor):
                return None
            flags = entry.flags | os.O_NOCTTY | os.O_CLOEXEC
            return OwnedFd(os.open(f"/proc/self/fd/{found.number}", flags))
    except (FileNotFoundError, NotADirectoryError):
        return None


KIND = FileKind(
    name="device",
    tag=17,
    entry=DeviceEntry,
    claims=claims,
    inspect=inspect,
    collect=collect,
    restore=restore,
)
