"""The host's end of the files: messages between /dev/fuse and the link, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from godwit.linux import fuse
from godwit.residual.homefiles.messages import ProtocolError

_ENDED: Final = frozenset({errno.ENODEV, errno.ECONNABORTED})
# Nobody waits for the answer any more; no such node or name is cached, or it is in use.
_UNIMPORTANT: Final = _ENDED | {errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY}
_UNIQUE_AT: Final = 8
_UNIQUE: Final = struct.Struct("=Q")


class Pump:
    """Sends what the kernel asks, by a thread of its own, and gives the kernel what home answers.

    Args:
        connection: From `fuse.mount_new`. The pump takes it over.
        send: Takes one message; it is valid until the call returns. What it raises ends the connection.
    """

    def __init__(self, connection: fuse.Connection, send: Callable[[memoryview], None]) -> None:
        self._number = connection.number
        self._device = connection.device.release()
        self._send = send
        self._notifications: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="files-pump", daemon=True)
        self._notifier = threading.Thread(target=self._notify, name="files-notify", daemon=True)
        self.error: BaseException | None = None
        """What ended the connection, if it was not `close` and not umount(2)."""
        self._reader.start()
        self._notifier.start()

    def deliver(self, message: Sequence[bytes | memoryview]) -> None:
        """Give the kernel one answer, or one notification and an answer to follow it, in parts.

        Raises:
            ProtocolError: The kernel takes it for nonsense.
        """
        first = message[0]
        if len(first) < fuse.fuse_out_header.size:
            raise ProtocolError(f"a file answer that begins with {len(first)} bytes")
        if _UNIQUE.unpack_from(first, _UNIQUE_AT)[0] == 0:
            # A notification waits for locked pages, which may wait for the very answers behind it.
            self._notifications.put(b"".join(message))
        else:
            self._write(message)

    def close(self) -> None:
        """End the connection: whoever waits for a file, or asks for one, sees ENOTCONN."""
        self._abort()
        self._notifications.put(None)
        self._reader.join()
        self._notifier.join()
        self._device.close()

    def wait_until_unmounted(self, timeout_s: float | None = None) -> bool:
        """Return True once the connection has ended, False if the time is over before."""
        self._reader.join(timeout_s)
        return not self._reader.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _abort(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            fuse.abort(self._number)

    def _read(self) -> None:
        try:
            self._read_all()
        except BaseException as error:  # noqa: BLE001  # kept; without us everybody there would wait for ever
            self.error = error
            self._abort()

    def _read_all(self) -> None:
        buffer = bytearray(fuse.MAX_MESSAGE_BYTES)
        view = memoryview(buffer)
        device = self._device.number
        poller = select.poll()
        poller.register(device, select.POLLIN)
        while True:
            try:
                length = fuse.read_message(device, buffer)
            except BlockingIOError:
                poller.poll()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno in _ENDED:
                    return
                raise
            else:
                self._send(view[:length])

    def _notify(self) -> None:
        try:
            while (message := self._notifications.get()) is not None:
                for one in messages_in(message):
                    self._write([one])
        except BaseException as error:  # noqa: BLE001  # kept; the host must not believe what it was told
            self.error = error
            self._abort()

    def _write(self, message: Sequence[bytes | memoryview]) -> None:
        try:
            os.writev(self._device.number, message)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise ProtocolError("a file answer that the kernel refuses") from error
            if error.errno not in _UNIMPORTANT:
                raise


def messages_in(message: bytes) -> Iterator[bytes]:
    """Yield the kernel's messages in one of home's. Raises ProtocolError."""
    at = 0
    while at < len(message):
        length = int.from_bytes(message[at : at + 4], sys.byteorder)
        if not fuse.fuse_out_header.size <= length <= len(message) - at:
            raise ProtocolError(f"a file answer of {len(message) - at} bytes that claims {length}")
        yield message[at : at + length]
        at += length
