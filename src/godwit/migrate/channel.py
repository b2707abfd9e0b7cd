"""Frames over a connection or a file, with big reused buffers and blocking calls."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from godwit.errors import ImageError
from godwit.linux.pause import pause
from godwit.migrate.patience import Patience
from godwit.wire import frames
from godwit.wire.frames import FrameKind

_STEP_BYTES: Final = 1 << 20
_SILENT_S: Final = 2.0
_LINGER_S: Final = 30.0
_LIMIT_LOOK_S: Final = 0.05
_DEBT_S: Final = 0.05


class Closed(ConnectionError):  # noqa: N818  # the end of a stream, which need not be an error
    """The other side ended the stream, or the file ends."""


class Pipe(Protocol):
    """A stream of bytes in both directions."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it."""
        ...

    def fill(self, buffer: memoryview) -> int:
        """Read until the buffer is full or the stream ends; return how much came."""
        ...

    def linger(self) -> None:
        """Say nothing more, and drop what still comes until the other side ends the stream."""
        ...

    def has_word(self) -> bool:
        """Tell whether the other side has said something, or ended the stream."""
        ...

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the other side says something."""
        ...

    def cut(self) -> None:
        """Break the stream off, also under a thread that waits for it."""
        ...

    def close(self) -> None:
        """End the stream."""
        ...


def drain(connection: socket.socket) -> None:
    """Shut a socket's sending side, and drop what still comes until the other side ends the stream.

    A socket closed with unread data resets the connection, and what was said last is lost with it. Who is
    silent for long, or talks on for ever, is not waited for.
    """
    deadline = time.monotonic() + _LINGER_S
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(_SILENT_S)
        while time.monotonic() < deadline and connection.recv(_STEP_BYTES):
            pass


def cut(connection: socket.socket) -> None:
    """Shut a socket in both directions: who reads or writes it is woken."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def has_word(fd: int) -> bool:
    """Tell whether a descriptor can be read, or its stream has ended."""
    if fd < 0:
        return True  # Closed at our side: the stream has ended, and a read will say so.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def can_take(fd: int, length_bytes: int) -> bool:
    """Tell whether a descriptor takes so much now, without waiting for the other side to read."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return length_bytes <= select.PIPE_BUF and any(events & select.POLLOUT for _, events in poll.poll(0))


def socket_can_take(connection: socket.socket, length_bytes: int) -> bool:
    """Tell whether a socket takes so much now, without waiting for the other side to read.

    A stream socket can be written to while a third of its buffer is free; a good part of that goes into
    the kernel's account of its own.
    """
    if length_bytes > connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 8:
        return False
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    return any(events & select.POLLOUT for _, events in poll.poll(0))


class SocketPipe:
    """A connected socket, TLS or plain."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        # TLS gives a record of 16 KiB at a time: nothing but its own read may stand in the loop.
        self._read_some: Callable[[int, memoryview], int] = getattr(connection, "read", self._receive)

    def _receive(self, length: int, buffer: memoryview) -> int:
        return self._socket.recv_into(buffer, length)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it."""
        self._socket.sendall(data)

    def writev(self, parts: Sequence[bytes]) -> None:
        """Write all parts, one after the other, with one system call if the kernel takes them at once."""
        done = self._socket.sendmsg(parts)
        for part in parts:
            if done < len(part):
                self._socket.sendall(memoryview(part)[done:] if done else part)
            done = max(0, done - len(part))

    def writable(self, length_bytes: int) -> bool:
        """Tell whether so much can be written without waiting for the other side to read."""
        return socket_can_take(self._socket, length_bytes)

    def read_some(self, buffer: memoryview) -> int:
        """Read what is there, and wait only if nothing is; return how much came, 0 at the end."""
        return self._read_some(len(buffer), buffer)

    def fill(self, buffer: memoryview) -> int:
        """Read until the buffer is full or the stream ends; return how much came."""
        read_some, wanted, done = self._read_some, len(buffer), 0
        while done < wanted:
            count = read_some(wanted - done, buffer[done:])
            if count == 0:
                break
            done += count
        return done

    def linger(self) -> None:
        """Say nothing more, and drop what still comes until the other side ends the stream."""
        drain(self._socket)

    def has_word(self) -> bool:
        """Tell whether the other side has said something, or ended the stream."""
        return has_word(self._socket.fileno())

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the other side says something."""
        return self._socket.fileno()

    def cut(self) -> None:
        """Break the stream off, also under a thread that waits for it."""
        cut(self._socket)

    def close(self) -> None:
        """End the stream."""
        self._socket.close()


class FdPipe:
    """Two descriptors, or one file for one direction."""

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        close: Callable[[], None] = lambda: None,
        cut: Callable[[], None] = lambda: None,
    ) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._close = close
        self._cut = cut

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._write_fd, view) :]

    def writev(self, parts: Sequence[bytes]) -> None:
        """Write all parts, one after the other, with one system call if the kernel takes them at once."""
        done = os.writev(self._write_fd, parts)
        for part in parts:
            if done < len(part):
                self.write(memoryview(part)[done:])
            done = max(0, done - len(part))

    def writable(self, length_bytes: int) -> bool:
        """Tell whether so much can be written without waiting for the other side to read."""
        return can_take(self._write_fd, length_bytes)

    def read_some(self, buffer: memoryview) -> int:
        """Read what is there, and wait only if nothing is; return how much came, 0 at the end."""
        return os.readv(self._read_fd, [buffer])

    def fill(self, buffer: memoryview) -> int:
        """Read until the buffer is full or the stream ends; return how much came."""
        done = 0
        while done < len(buffer):
            count = os.readv(self._read_fd, [buffer[done:]])
            if count == 0:
                break
            done += count
        return done

    def linger(self) -> None:
        """Nothing to wait for: what was written to a pipe is not taken back."""

    def has_word(self) -> bool:
        """Tell whether the other side has said something, or ended the stream."""
        return self._read_fd >= 0 and has_word(self._read_fd)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the other side says something."""
        return self._read_fd

    def cut(self) -> None:
        """Break the stream off, also under a thread that waits for it."""
        self._cut()

    def close(self) -> None:
        """End the stream."""
        self._close()


class Channel:
    """Frames over a pipe. Counts what passed."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._buffer = bytearray(frames.PAGES_LIMIT_BYTES)
        self.patience: Patience | None = None
        self.limit_bytes_per_s: float | None = None  # of what is sent
        self.urgent = False  # what is sent now need not wait for that
        self._free_at = 0.0
        self.bytes_sent = 0
        self.bytes_received = 0

    def touch_buffer(self) -> None:
        """Have the receiving buffer's memory there before it is needed."""
        self._buffer = bytearray(bytes(len(self._buffer)))

    def open_stream(self) -> None:
        """Write the preamble."""
        self._write(frames.preamble())

    def accept_stream(self) -> int:
        """Read the preamble; return the format. Raises ImageError or Closed."""
        return frames.check_preamble(bytes(self._read(frames.PREAMBLE_BYTES)))

    def send(self, kind: FrameKind, *parts: bytes | bytearray | memoryview) -> None:
        """Write a frame. Raises OSError when the other side is gone."""
        head = frames.frame_header(kind, parts)
        if len(parts) == 1 and len(parts[0]) < _STEP_BYTES // 16:
            self._write(head + bytes(parts[0]))
            return
        self._write(head)
        for part in parts:
            self._write(part)

    def receive(self) -> tuple[FrameKind, memoryview]:
        """Read a frame. Its payload is valid until the next call.

        Raises:
            Closed: The stream ended between or within frames.
            ImageError: It is damaged.
        """
        header = frames.read_frame_header(self._read(frames.FRAME_HEADER_BYTES))
        payload = self._read(header.length_bytes)
        frames.check_payload(header, payload)
        return header.kind, payload

    def expect(self, *kinds: FrameKind) -> tuple[FrameKind, memoryview]:
        """Read a frame that must be of one of the kinds. Raises ImageError if it is another."""
        kind, payload = self.receive()
        if kind not in kinds:
            wanted = " or ".join(each.name for each in kinds)
            raise ImageError(f"the peer sent {kind.name} where {wanted} should come")
        return kind, payload

    def linger(self) -> None:
        """Let the last word arrive: wait until the other side ends the stream."""
        self._pipe.linger()

    def has_word(self) -> bool:
        """Tell whether the other side has said something, or ended the stream."""
        return self._pipe.has_word()

    def fileno(self) -> int:
        """Return the descriptor to poll for `has_word`."""
        return self._pipe.fileno()

    def cut(self) -> None:
        """Break the stream off, also under a thread that waits for it."""
        self._pipe.cut()

    def close(self) -> None:
        """End the stream."""
        self._pipe.close()

    def delay_s(self) -> float:
        """Return how long the limit asks to wait before more is sent."""
        return 0.0 if self.limit_bytes_per_s is None else max(0.0, self._free_at - time.monotonic())

    def _keep_limit(self) -> None:
        """Let the time pass that the limit asks for; what is urgent may run into debt, a little."""
        allowed_s = _DEBT_S if self.urgent else 0.0
        while (delay_s := self.delay_s() - allowed_s) > 0:
            if self.patience is not None:
                self.patience.check()
            pause(min(delay_s, _LIMIT_LOOK_S))

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        self._keep_limit()
        try:
            with self._watched():
                self._pipe.write(data)
        except (ConnectionError, TimeoutError, ssl_error()) as error:
            raise Closed(str(error)) from error
        self.bytes_sent += len(data)
        if self.limit_bytes_per_s is not None:
            self._free_at = max(self._free_at, time.monotonic()) + len(data) / self.limit_bytes_per_s

    def _read(self, length: int) -> memoryview:
        """Read exactly so much. Memory grows with what came, not with what was announced."""
        done = 0
        while done < length:
            if done == len(self._buffer):
                self._buffer = self._buffer + bytes(min(length - done, max(_STEP_BYTES, done)))
            room = memoryview(self._buffer)[done : min(length, len(self._buffer))]
            done += self._fill(room)
            if done < length and done < len(self._buffer):
                raise Closed("the stream ended" if done == 0 else "the stream ended within a frame")
        self.bytes_received += length
        return memoryview(self._buffer)[:length]

    def _watched(self) -> contextlib.AbstractContextManager[None]:
        return self.patience.blocking() if self.patience is not None else contextlib.nullcontext()

    def _fill(self, room: memoryview) -> int:
        try:
            with self._watched():
                return self._pipe.fill(room)
        except (ConnectionError, TimeoutError, ssl_error()) as error:
            raise Closed(str(error)) from error


def ssl_error() -> type[OSError]:
    """Return ssl.SSLError where TLS is in use, else an error that nobody raises, without importing it."""
    module = sys.modules.get("ssl")
    return module.SSLError if module is not None else BlockingIOError
