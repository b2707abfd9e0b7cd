"""Files by handle, without a path: name_to_handle_at(2), open_by_handle_at(2)."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from godwit.linux import abi
from godwit.types import Fd, OwnedFd

AT_EMPTY_PATH: Final = 0x1000
MAX_HANDLE_BYTES: Final = 128
_FILE_HANDLE: Final = struct.Struct("=Ii")  # handle_bytes handle_type; then f_handle
_ROOM: Final = _FILE_HANDLE.size + MAX_HANDLE_BYTES


def name_to_handle(directory: Fd, name: bytes = b"") -> bytes:
    """Return the `struct file_handle` of an entry of a directory, or of the descriptor itself.

    Any descriptor will do, also O_PATH. A symbolic link is not followed.

    Raises:
        OSError: EOPNOTSUPP, the file system has no handles.
    """
    buffer = ctypes.create_string_buffer(_FILE_HANDLE.pack(MAX_HANDLE_BYTES, 0), _ROOM)
    mount_id = (ctypes.c_int * 1)()
    abi.syscall("name_to_handle_at", directory, name, buffer, mount_id, 0 if name else AT_EMPTY_PATH)
    length, _ = _FILE_HANDLE.unpack_from(buffer)
    return buffer.raw[: _FILE_HANDLE.size + min(length, MAX_HANDLE_BYTES)]


def open_by_handle(mount: Fd, handle: bytes, flags: int) -> OwnedFd:
    """Open a file by its handle, close-on-exec unless `flags` say otherwise.

    Args:
        mount: Any descriptor of the mount that the file is to be seen in, but not O_PATH.
        handle: From `name_to_handle`.
        flags: As for open(2).

    Raises:
        OSError: ESTALE, the file is gone.
        PermissionError: We lack CAP_DAC_READ_SEARCH.
    """
    buffer = ctypes.create_string_buffer(handle, len(handle))
    return OwnedFd(abi.syscall("open_by_handle_at", mount, buffer, flags))
