"""Two ends of a link in one process, over connections that may break at any byte."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from godwit.errors import GodwitError
from godwit.linux.pause import pause
from godwit.migrate.channel import SocketPipe
from godwit.residual.link import Handler, Link
from godwit.residual.streams import Streams
from godwit.types import OwnedFd
from godwit.wire.linkframes import Side

JOB = bytes(range(16))
STREAMS = 2
DEADLINE_S = 60.0


def wait_until(true: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    end_s = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end_s, "it never came to be"
        pause(0.001)


class Fragile(SocketPipe):
    """A connection that breaks after so many bytes written."""

    def __init__(self, connection: socket.socket, bytes_left: int) -> None:
        super().__init__(connection)
        self._bytes_left = bytes_left

    def writev(self, parts: Sequence[bytes]) -> None:
        """Write what may still be written."""
        data = b"".join(parts)
        allowed, self._bytes_left = data[: self._bytes_left], self._bytes_left - len(data)
        self.write(allowed)
        if self._bytes_left < 0:
            self.cut()
            raise ConnectionResetError("broken on purpose")


class Keeper:
    """A link and its streams."""

    def __init__(self, side: Side) -> None:
        self.ended: list[BaseException | None] = []
        self.shut: list[int] = []
        self.link = Link(JOB, 0, side, on_end=self.ended.append)
        self.streams = Streams(self.link, STREAMS, self.shut.append)

    def start(self, more: Mapping[int, Handler]) -> None:
        self.link.start({STREAMS: self.streams.handler, **more})

    def close(self) -> None:
        self.link.close()
        self.streams.close()


class Keepers:
    """A keeper at home and one at the host, connected again whenever the connection breaks. `with` ends both.

    Args:
        break_after_bytes: Each connection breaks after a random number of bytes up to this; 0: never.
    """

    def __init__(self, break_after_bytes: int = 0) -> None:
        self.home = Keeper(Side.HOME)
        self.host = Keeper(Side.HOST)
        self.connections = 0
        self._break_after_bytes = break_after_bytes
        self._dice = random.Random(5)
        self._stop = threading.Event()
        self._still = threading.Lock()
        self._thread = threading.Thread(target=self._keep_connected, daemon=True)

    def start(
        self, home: Mapping[int, Handler] | None = None, host: Mapping[int, Handler] | None = None
    ) -> None:
        """Serve, with what has been opened until now."""
        self.home.start(home or {})
        self.host.start(host or {})
        self._thread.start()

    def move(self, take: Callable[[int], OwnedFd]) -> None:
        """Let another host's end go on. `take` gives the descriptor for each stream of the new one."""
        with self._still:
            old = self.host
            old.streams.quiesce()
            link_state = old.link.quiesce()
            states = old.streams.states()
            new = Keeper(Side.HOST)
            new.link.restore(link_state)
            for state in states:
                new.streams.resume(state, None if state.shut else take(state.stream_id))
            new.start({})
            old.close()
            self.host = new

    def connected_again(self) -> bool:
        """Tell whether there was a connection since the last move."""
        return self.home.link.epoch == self.host.link.epoch

    def _keep_connected(self) -> None:
        while not self._stop.is_set():
            with self._still:
                if not (self.home.link.up and self.host.link.up):
                    self._connect()
            pause(0.0005)

    def _connect(self) -> None:
        ours, theirs = (Fragile(each, self._allowance()) for each in socket.socketpair())
        self.connections += 1
        thread = threading.Thread(target=_attach, args=(self.host.link, theirs))
        thread.start()
        _attach(self.home.link, ours)
        thread.join()

    def _allowance(self) -> int:
        return self._dice.randrange(self._break_after_bytes) if self._break_after_bytes else 1 << 62

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.home.close()
        self.host.close()
        assert self.home.ended in ([], [None])
        assert self.host.ended in ([], [None])


def _attach(link: Link, pipe: SocketPipe) -> None:
    with contextlib.suppress(OSError, GodwitError):
        link.attach(pipe)
