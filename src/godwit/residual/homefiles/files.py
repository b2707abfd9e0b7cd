"""The open files of the host: what its `fh` numbers mean."""

from __future__ import annotations

import errno
import os
from typing import Final

from godwit.residual.homefiles.messages import Identity, fail
from godwit.residual.homefiles.nodes import Node
from godwit.types import OwnedFd

MAX_OPEN_FILES: Final = 1 << 16
Entry = tuple[int, int, int, bytes]
"""One entry of a directory: inode number, offset of the next, type, name."""


class OpenFile:
    """One open file description of the host, and its twin at home."""

    __slots__ = ("appends", "entries", "fd", "identity", "next_offset", "node", "shares_offset")

    def __init__(self, fd: OwnedFd, node: Node, identity: Identity, flags: int) -> None:
        self.fd = fd
        self.node = node
        self.identity = identity
        self.appends = bool(flags & os.O_APPEND)
        self.shares_offset = False  # its description is also somebody else's, who minds lseek(2)
        self.entries: list[Entry] = []  # of a directory: read, and not yet told
        self.next_offset = 0  # where the first of them is, or where to read on


class Files:
    """The table of open files and directories."""

    def __init__(self) -> None:
        self._last = 0
        self._open: dict[int, OpenFile] = {}

    def __contains__(self, fh: int) -> bool:
        return fh in self._open

    def __len__(self) -> int:
        return len(self._open)

    def add(self, file: OpenFile) -> int:
        """Enter an open file and return its number. Raises OSError: ENFILE, and the file is closed."""
        if len(self._open) >= MAX_OPEN_FILES:
            file.fd.close()
            raise fail(errno.ENFILE)
        self._last += 1
        self._open[self._last] = file
        return self._last

    def get(self, fh: int) -> OpenFile:
        """Return an open file. Raises OSError: EBADF."""
        file = self._open.get(fh)
        if file is None:
            raise fail(errno.EBADF)
        return file

    def duplicate(self, fh: int) -> OwnedFd:
        """Return a descriptor of the same open file that another thread may use, whatever becomes of `fh`."""
        return OwnedFd(os.dup(self.get(fh).fd.number))

    def remove(self, fh: int) -> OpenFile:
        """Close an open file. Raises OSError: EBADF."""
        file = self.get(fh)
        del self._open[fh]
        file.fd.close()
        return file

    def close(self) -> None:
        """Close all."""
        for file in self._open.values():
            file.fd.close()
        self._open.clear()
