"""A stream on its way into a file.

While a program stands still, writing waits for no disk: pages are kept in memory prepared for them, and
go into the file when it runs again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import xxhash

from godwit.errors import DestinationError
from godwit.migrate.channel import FdPipe
from godwit.types import OwnedFd

STREAM_NAME: Final = "stream.godwit"
PARTIAL_NAME: Final = "stream.godwit.partial"


class ImageFile(FdPipe):
    """A file under a name of its own until it is whole; knows the digest of all that was written."""

    def __init__(self, directory: Path, fd: OwnedFd) -> None:
        super().__init__(-1, fd.number)
        self.path = directory / STREAM_NAME
        self.bytes = 0
        self._fd = fd
        self._digest = xxhash.xxh3_128()
        self._partial = directory / PARTIAL_NAME

    @property
    def digest(self) -> bytes:
        """XXH3, 128 bits, of the file's content so far."""
        return self._digest.digest()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it. Raises DestinationError if there is no room."""
        with self._named():
            super().write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def begin_writeback(self) -> None:
        """Have what was written go to the disk, and out of memory that others have better use for."""
        os.posix_fadvise(self._fd.number, 0, 0, os.POSIX_FADV_DONTNEED)

    def restart(self) -> None:
        """Throw away what was written."""
        with self._named():
            os.ftruncate(self._fd.number, 0)
            os.lseek(self._fd.number, 0, os.SEEK_SET)
        self._digest.reset()
        self.bytes = 0

    def publish(self) -> None:
        """Give it its name, once it is on the disk."""
        with self._named():
            os.fsync(self._fd.number)
            self._partial.rename(self.path)
            sync_directory(self.path.parent)
            self.begin_writeback()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DestinationError(
                f"cannot write {self.path}: {error.strerror}",
                remedy="make room there, or name another directory",
            ) from error


@contextlib.contextmanager
def drafted(directory: Path) -> Iterator[ImageFile]:
    """Open an image's file for the block; unless it was published, nothing of it is left."""
    partial = directory / PARTIAL_NAME
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        opened = OwnedFd(os.open(partial, flags, 0o600))
    except OSError as error:
        raise DestinationError(
            f"cannot write {directory / STREAM_NAME}: {error.strerror}", remedy="name another directory"
        ) from error
    with opened as fd:
        try:
            yield ImageFile(directory, fd)
        finally:
            partial.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on the disk."""
    with OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as opened:
        os.fsync(opened.number)


class Held(FdPipe):
    """What is to be written, kept in memory until it is released, or is more than there is room for."""

    def __init__(self, below: ImageFile, room_bytes: int) -> None:
        super().__init__(-1, -1)
        self._below = below
        # Touched now: fresh memory costs most at its first use.
        self._room: memoryview | None = memoryview(bytearray(b"\1") * room_bytes)
        self._used = 0
        self.before: Callable[[], None] = lambda: None
        """Writes what comes first in the file."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it, or write it if it finds no room."""
        end = self._used + len(data)
        if self._room is not None and end <= len(self._room):
            self._room[self._used : end] = data
            self._used = end
            return
        self.release()
        self._below.write(data)

    def release(self) -> None:
        """Write what was kept; from now on nothing is."""
        if self._room is None:
            return
        kept, self._room = self._room[: self._used], None
        self.before()
        self._below.write(kept)
