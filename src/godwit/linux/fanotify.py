"""What is changed on a whole file system, told by handles: fanotify(7)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from godwit.linux import abi
from godwit.types import Fd, OwnedFd

FAN_MODIFY: Final = 0x2
FAN_ATTRIB: Final = 0x4
FAN_CLOSE_WRITE: Final = 0x8
FAN_MOVED_FROM: Final = 0x40
FAN_MOVED_TO: Final = 0x80
FAN_CREATE: Final = 0x100
FAN_DELETE: Final = 0x200
FAN_Q_OVERFLOW: Final = 0x4000
FAN_ONDIR: Final = 0x40000000

_FAN_CLOEXEC: Final = 0x1
_FAN_NONBLOCK: Final = 0x2
_FAN_UNLIMITED_QUEUE: Final = 0x10
_FAN_REPORT_TID: Final = 0x100
_FAN_REPORT_FID: Final = 0x200
_FAN_REPORT_DIR_FID: Final = 0x400
_FAN_REPORT_NAME: Final = 0x800
_FAN_REPORT_TARGET_FID: Final = 0x1000
_REPORTS: Final = (
    _FAN_REPORT_TID | _FAN_REPORT_FID | _FAN_REPORT_DIR_FID | _FAN_REPORT_NAME | _FAN_REPORT_TARGET_FID
)
_FAN_MARK_ADD: Final = 0x1
_FAN_MARK_FILESYSTEM: Final = 0x100
_INFO_TYPE_FID: Final = 1
_INFO_TYPE_DFID_NAME: Final = 2
_METADATA: Final = struct.Struct("=IBBHQii")  # event_len vers reserved metadata_len mask fd pid
_INFO: Final = struct.Struct("=BBH8s")  # info_type pad len, fsid; then struct file_handle, and a name
_FILE_HANDLE: Final = struct.Struct("=Ii")
_BUFFER_BYTES: Final = 65536


@dataclass(frozen=True, slots=True)
class Event:
    """One change: `mask` says which, `tid` who made it. Handles are for `handles.open_by_handle`."""

    mask: int
    tid: int
    fsid: bytes
    handle: bytes  # of what was changed; empty: not told
    directory: bytes  # of the directory in which it is, or was; empty: not told
    name: bytes


def open_watch() -> OwnedFd:
    """Return a group that tells of files by handle, and of changes by the thread that made them.

    Its queue has no limit. Raises PermissionError: we lack CAP_SYS_ADMIN; OSError: EINVAL, before Linux 5.17.
    """
    flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_UNLIMITED_QUEUE | _REPORTS
    return OwnedFd(abi.syscall("fanotify_init", flags, os.O_RDONLY | os.O_LARGEFILE))


def mark_file_system(watch: Fd, file: Fd, mask: int) -> None:
    """Have every change of the kinds in `mask` told, on the whole file system of an open file.

    Raises:
        OSError: ENODEV or EOPNOTSUPP, the file system has no id, or no handles; EXDEV, a btrfs subvolume.
    """
    abi.syscall("fanotify_mark", watch, _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM, mask, file, 0)


def read_events(watch: Fd) -> list[Event]:
    """Return the changes since the last call. Raises BlockingIOError: there are none."""
    return list(_events(os.read(watch, _BUFFER_BYTES)))


def _events(raw: bytes) -> Iterator[Event]:
    at = 0
    while at < len(raw):
        length, _, _, start, mask, _, tid = _METADATA.unpack_from(raw, at)
        found = {
            kind: (fsid, handle, name) for kind, fsid, handle, name in _infos(raw[at + start : at + length])
        }
        fsid, handle, _ = found.get(_INFO_TYPE_FID, (b"", b"", b""))
        other, directory, name = found.get(_INFO_TYPE_DFID_NAME, (b"", b"", b""))
        yield Event(mask, tid, fsid or other, handle, directory, name)
        at += length


def _infos(raw: bytes) -> Iterator[tuple[int, bytes, bytes, bytes]]:
    at = 0
    while at + _INFO.size <= len(raw):
        kind, _, length, fsid = _INFO.unpack_from(raw, at)
        start = at + _INFO.size
        handle_bytes, _ = _FILE_HANDLE.unpack_from(raw, start)
        end = start + _FILE_HANDLE.size + handle_bytes
        yield kind, fsid, raw[start:end], raw[end : at + length].split(b"\0")[0]
        at += length
