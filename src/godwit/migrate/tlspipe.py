"""TLS over a socket, with few system calls: a quarter faster for pages than the standard wrapper.

OpenSSL makes records of 16 KiB and, on a socket of its own, writes and reads each by itself. Here the
records pass through memory, and the socket sees a quarter of a MiB at a time.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Final

from godwit.migrate.channel import cut, drain, has_word, socket_can_take

_STEP_BYTES: Final = 1 << 18


class TlsPipe:
    """The encrypted stream of one connection. Made by a handshake, which may raise ssl.SSLError.

    One thread may read while another one writes.

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
        # OpenSSL's state is one for both directions. Never held while the socket is waited for.
        self._lock = threading.Lock()
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
        with self._lock:
            data = self._leaving.read()
        if data:
            self._socket.sendall(data)

    def _take(self) -> None:
        count = self._socket.recv_into(self._stage)
        with self._lock:
            if count:
                self._arrived.write(self._stage[:count])
            else:
                self._arrived.write_eof()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it."""
        view = memoryview(data)
        for start in range(0, len(view), _STEP_BYTES):
            with self._lock:
                self._tls.write(view[start : start + _STEP_BYTES])
            self._flush()

    def writev(self, parts: Sequence[bytes]) -> None:
        """Write all parts, one after the other, and those that are small together."""
        for part in parts:
            with self._lock:
                small = len(part) <= _STEP_BYTES - self._leaving.pending
                if small and part:
                    self._tls.write(part)
            if not small:
                self.write(part)
        self._flush()

    def writable(self, length_bytes: int) -> bool:
        """Tell whether so much can be written without waiting for the other side to read."""
        return socket_can_take(self._socket, length_bytes)

    def _read_arrived(self, buffer: memoryview) -> tuple[int, bool]:
        """Decrypt what has arrived; return how much, and whether the stream ends there."""
        read: Callable[[int, memoryview], int] = self._tls.read  # type: ignore[assignment]  # with a buffer: int
        wanted, done = len(buffer), 0
        try:
            while done < wanted:
                with self._lock:
                    count = read(wanted - done, buffer[done:])
                if not count:
                    return done, True
                done += count
        except ssl.SSLWantReadError:
            return done, False
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return done, True
        return done, False

    def read_some(self, buffer: memoryview) -> int:
        """Read what is there, and wait only if nothing is; return how much came, 0 at the end."""
        while True:
            count, ended = self._read_arrived(buffer)
            if count or ended:
                return count
            self._take()

    def fill(self, buffer: memoryview) -> int:
        """Read until the buffer is full or the stream ends; return how much came."""
        wanted, done = len(buffer), 0
        while True:
            count, ended = self._read_arrived(buffer[done:])
            done += count
            if ended or done == wanted:
                return done
            self._take()

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
