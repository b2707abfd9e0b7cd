"""TLS over a socket, with few system calls: a quarter faster for pages than the standard wrapper.

OpenSSL makes records of 16 KiB and, on a socket of its own, writes and reads each by itself. Here the
records pass through memory, and the socket sees a quarter of a MiB at a time.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Final

from godwit.migrate.channel import cut, drain, has_word

_STEP_BYTES: Final = 1 << 18


class TlsPipe:
    """The encrypted stream of one connection. Made by a handshake, which may raise ssl.SSLError.

    Args:
        connection: Connected; its timeout holds for the handshake and is lifted afterwards.
        context: With our identity, and whom we trust.
        server: We were connected to.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, server: bool) -> None:
        self._socket = connection
        self._arrived = ssl.MemoryBIO()
        self._leaving = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=server)
        self._stage = memoryview(bytearray(_STEP_BYTES))
        self._shake_hands()
        connection.settimeout(None)

    def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._take()
            except ssl.SSLError:
                # What is to leave tells the other side why.
                self._flush()
                raise
            else:
                self._flush()
                return

    def _flush(self) -> None:
        if self._leaving.pending:
            self._socket.sendall(self._leaving.read())

    def _take(self) -> None:
        count = self._socket.recv_into(self._stage)
        if count:
            self._arrived.write(self._stage[:count])
        else:
            self._arrived.write_eof()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it."""
        view = memoryview(data)
        for start in range(0, len(view), _STEP_BYTES):
            self._tls.write(view[start : start + _STEP_BYTES])
            self._flush()

    def fill(self, buffer: memoryview) -> int:
        """Read until the buffer is full or the stream ends; return how much came."""
        read: Callable[[int, memoryview], int] = self._tls.read  # type: ignore[assignment]  # with a buffer: int
        wanted, done = len(buffer), 0
        while done < wanted:
            try:
                count = read(wanted - done, buffer[done:])
            except ssl.SSLWantReadError:
                self._take()
                continue
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            if not count:
                break
            done += count
        return done

    def linger(self) -> None:
        """Say nothing more, and drop what still comes until the other side ends the stream."""
        drain(self._socket)

    def has_word(self) -> bool:
        """Tell whether the other side has said something, or ended the stream."""
        return bool(self._arrived.pending or self._tls.pending()) or has_word(self._socket.fileno())

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the other side says something."""
        return self._socket.fileno()

    def cut(self) -> None:
        """Break the stream off, also under a thread that waits for it."""
        cut(self._socket)

    def close(self) -> None:
        """End the stream."""
        self._socket.close()
