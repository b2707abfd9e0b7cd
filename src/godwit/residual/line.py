"""One connection of a link, from the greeting to its loss."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from godwit.wire import linkframes
from godwit.wire.linkframes import Greeting

_BUFFER_BYTES: Final = 256 << 10


class Pipe(Protocol):
    """A stream of bytes in both directions. One thread may read while another one writes."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of it."""
        ...

    def writev(self, parts: Sequence[bytes]) -> None:
        """Write all parts, one after the other."""
        ...

    def writable(self, length_bytes: int) -> bool:
        """Tell whether so much can be written without waiting for the other side to read."""
        ...

    def fill(self, buffer: memoryview) -> int:
        """Read until the buffer is full or the stream ends; return how much came."""
        ...

    def read_some(self, buffer: memoryview) -> int:
        """Read what is there, and wait only if nothing is; return how much came, 0 at the end."""
        ...

    def cut(self) -> None:
        """Break the stream off, also under a thread that waits for it."""
        ...

    def close(self) -> None:
        """End the stream."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """What is done about it."""

    ping_s: float = 3.0  # after so long without a word of ours the peer gets one
    give_up_s: float = 9.0  # after so long without a word of the peer the connection is given up


USUAL_SILENCE: Final = Silence()


def greet(pipe: Pipe, patience_s: float = USUAL_SILENCE.give_up_s) -> Greeting:
    """Read the greeting with which a connection begins: an acceptor finds the link by its job.

    Raises:
        ProtocolError: It is none.
        OSError: The connection ended, or nothing came in time; it is cut then.
    """
    raw = bytearray(linkframes.GREETING_BYTES)
    timer = threading.Timer(patience_s, pipe.cut)
    timer.daemon = True
    timer.start()
    try:
        count = pipe.fill(memoryview(raw))
    finally:
        timer.cancel()
    if count < len(raw):
        raise ConnectionError("the connection ended before the peer had greeted")
    return linkframes.read_greeting(raw)


class Line:
    """A greeted connection. `lost` says why it is over, once it is."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.lost: BaseException | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start: int = 0  # of what has been read and not yet taken
        self._end: int = 0

    def read(self) -> int:
        """Read what the peer has said, and wait if that is nothing; return how much, 0 at the end."""
        count = self.pipe.read_some(memoryview(self._buffer)[self._end :])
        self._end += count
        return count

    def frames(self) -> Iterator[tuple[int, memoryview, int]]:
        """Yield channel, payload and confirmed count of every whole frame that has been read.

        A payload is valid until the next `read`. A frame counts as taken when the next one is asked for.

        Raises:
            ProtocolError: The peer announces what no frame may hold.
        """
        header, needed = linkframes.HEADER_BYTES, linkframes.HEADER_BYTES
        view = memoryview(self._buffer)
        while self._end - self._start >= header:
            length, channel, count = linkframes.read_header(view, self._start)
            needed = header + length
            if self._end - self._start < needed:
                break
            yield channel, view[self._start + header : self._start + needed], count
            self._start += needed
            needed = header
        self._make_room(needed)

    def _make_room(self, needed: int) -> None:
        """Have room for a frame of `needed` bytes, of which a part may have come."""
        if self._start == self._end:
            self._start = self._end = 0
        size, rest = len(self._buffer), self._end - self._start
        # A read is worth its call if it can bring much.
        if size - self._start >= max(needed, rest + size // 4):
            return
        came = bytes(memoryview(self._buffer)[self._start : self._end])
        if size < needed + _BUFFER_BYTES // 4:
            self._buffer = bytearray(needed + _BUFFER_BYTES)
        self._buffer[:rest] = came
        self._start, self._end = 0, rest
