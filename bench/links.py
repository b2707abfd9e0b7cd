"""Links, streams and terminals of a job that is away, beside bare sockets: `python -m bench.links`."""

from __future__ import annotations

import argparse
import os
import select
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator

from bench.numbers import MIB, Result, result
from godwit.linux import tty
from godwit.linux.pipe import pipe
from godwit.migrate.channel import SocketPipe
from godwit.residual.link import Link
from godwit.residual.streams import Streams
from godwit.types import OwnedFd
from godwit.wire.linkframes import Side

_JOB = bytes(16)
_WORD = b"x" * 64
_ECHO, _SINK, _STREAMS = 1, 2, 3
_BIG = bytes(MIB)

End = tuple[int, OwnedFd, bool, bool]  # number of a stream, its descriptor, reads, writes


def _socket_pair(kind: str) -> tuple[socket.socket, socket.socket]:
    if kind == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for each in (ours, theirs):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
    return ours, theirs


def _trips_us(trip: Callable[[], None], count: int) -> list[float]:
    taken: list[float] = []
    for _ in range(count):
        started = time.perf_counter()
        trip()
        taken.append((time.perf_counter() - started) * 1e6)
    return taken[count // 10 :]


def _bare(kind: str, trips: int, mib: int) -> tuple[list[float], float]:
    """Return the trips of 64 bytes in us and the MiB/s of bare sockets, the other end in another process."""
    ours, theirs = _socket_pair(kind)
    child = os.fork()
    if child == 0:
        ours.close()
        for _ in range(trips):
            theirs.sendall(theirs.recv(64))
        left = mib * MIB
        buffer = bytearray(2 * MIB)
        while left:
            left -= theirs.recv_into(buffer)
        theirs.sendall(b"!")
        os._exit(0)
    theirs.close()

    def trip() -> None:
        ours.sendall(_WORD)
        ours.recv(64)

    taken = _trips_us(trip, trips)
    started = time.perf_counter()
    for _ in range(mib):
        ours.sendall(_BIG)
    ours.recv(1)
    rate = mib / (time.perf_counter() - started)
    os.waitpid(child, 0)
    ours.close()
    return taken, rate


def _far_link(connection: socket.socket, mib: int, ends: list[End]) -> None:
    """Be the host in a process of its own: answer, swallow, pump. Ends when the connection does."""
    over = threading.Event()
    link = Link(_JOB, 0, Side.HOST, on_down=lambda _: over.set(), on_end=lambda _: over.set())
    streams = Streams(link, _STREAMS)
    for stream_id, fd, reads, writes in ends:
        streams.open(stream_id, fd, reads=reads, writes=writes)
    seen = 0

    def swallow(payload: memoryview) -> None:
        nonlocal seen
        seen += len(payload)
        if seen == mib * MIB:
            link.send(_SINK, b"!")

    link.start(
        {
            _ECHO: lambda payload: link.send(_ECHO, bytes(payload)),
            _SINK: swallow,
            _STREAMS: streams.handler,
        }
    )
    link.attach(SocketPipe(connection))
    over.wait()


class _Far:
    """A link to a process that answers."""

    def __init__(self, kind: str, mib: int, ends: Callable[[], list[End]]) -> None:
        ours, theirs = _socket_pair(kind)
        self._child = os.fork()
        if self._child == 0:
            ours.close()
            _far_link(theirs, mib, ends())
            os._exit(0)
        theirs.close()
        self.answered = threading.Semaphore(0)
        self.link = Link(_JOB, 0, Side.HOME)
        self.streams = Streams(self.link, _STREAMS)
        self._connection = ours

    def start(self) -> None:
        self.link.start(
            {
                _ECHO: lambda _: self.answered.release(),
                _SINK: lambda _: self.answered.release(),
                _STREAMS: self.streams.handler,
            }
        )
        self.link.attach(SocketPipe(self._connection))

    def close(self) -> None:
        self.link.close()
        self.streams.close()
        os.waitpid(self._child, 0)


def _linked(kind: str, trips: int, mib: int) -> tuple[list[float], float]:
    far = _Far(kind, mib, list)
    far.start()

    def trip() -> None:
        far.link.send(_ECHO, _WORD)
        far.answered.acquire()

    taken = _trips_us(trip, trips)
    started = time.perf_counter()
    for _ in range(mib):
        far.link.send(_SINK, _BIG)
    far.answered.acquire()
    rate = mib / (time.perf_counter() - started)
    far.close()
    return taken, rate


def _pumped(kind: str, trips: int, mib: int) -> tuple[list[float], float]:
    """Send through a pipe, two pumps and a pipe to `cat`, and back the same way."""
    there_read, there_write = pipe()
    back_read, back_write = pipe()

    def ends() -> list[End]:
        to_cat_read, to_cat_write = pipe()
        from_cat_read, from_cat_write = pipe()
        if os.fork() == 0:
            os.dup2(to_cat_read.number, 0)
            os.dup2(from_cat_write.number, 1)
            os.execvp("cat", ["cat"])
        to_cat_read.close()
        from_cat_write.close()
        return [(1, to_cat_write, False, True), (2, from_cat_read, True, False)]

    far = _Far(kind, mib, ends)
    far.streams.open(1, there_read, reads=True, writes=False)
    far.streams.open(2, back_write, reads=False, writes=True)
    far.start()

    def trip() -> None:
        os.write(there_write.number, _WORD)
        os.read(back_read.number, 64)

    taken = _trips_us(trip, trips)

    def feed() -> None:
        for _ in range(mib):
            view = memoryview(_BIG)
            while view:
                view = view[os.write(there_write.number, view) :]

    started = time.perf_counter()
    thread = threading.Thread(target=feed)
    thread.start()
    left = mib * MIB
    while left:
        left -= len(os.read(back_read.number, MIB))
    rate = mib / (time.perf_counter() - started)
    thread.join()
    there_write.close()
    far.close()
    back_read.close()
    return taken, rate


def _echoed(kind: str, trips: int) -> list[float]:
    """Type a letter on a terminal here and see the echo of the line discipline there."""
    user, slave = tty.open_pair()
    tty.set_attributes(slave.number, tty.raw(tty.get_attributes(slave.number)))
    kept: list[OwnedFd] = []

    def ends() -> list[End]:
        master, far_slave = tty.open_pair()
        kept.append(far_slave)
        return [(1, master, True, True)]

    far = _Far(kind, 0, ends)
    far.streams.open(1, OwnedFd(os.dup(slave.number)), reads=True, writes=True)
    far.start()
    poll = select.poll()
    poll.register(user.number, select.POLLIN)

    def trip() -> None:
        os.write(user.number, b"x")
        poll.poll()
        os.read(user.number, 64)

    taken = _trips_us(trip, min(trips, 2000))
    far.close()
    slave.close()
    user.close()
    return taken


def rows(trips: int, mib: int) -> Iterator[Result]:
    """Measure everything, over a socket pair and over TCP."""
    for kind in ("unix", "tcp"):
        bare, bare_rate = _bare(kind, trips, mib)
        linked, linked_rate = _linked(kind, trips, mib)
        limit = statistics.median(bare) + 25
        yield result(f"{kind}: round trip of 64 bytes, bare socket", "µs", bare)
        yield result(f"{kind}: round trip of 64 bytes, link", "µs", linked, limit=limit)
        yield result(f"{kind}: 1 MiB messages, bare socket", "MiB/s", [bare_rate])
        yield result(f"{kind}: 1 MiB messages, link (wanted: 80 % of that)", "MiB/s", [linked_rate])
        pumped, pumped_rate = _pumped(kind, trips, mib)
        yield result(f"{kind}: round trip of 64 bytes, pipe to cat and back", "µs", pumped)
        yield result(f"{kind}: pipe to cat and back", "MiB/s", [pumped_rate])
        yield result(f"{kind}: echo of a terminal", "µs", _echoed(kind, trips), limit=1000)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.links", description=__doc__)
    parser.add_argument("--trips", type=int, default=5000)
    parser.add_argument("--mib", type=int, default=512)
    options = parser.parse_args()
    for each in rows(options.trips, options.mib):
        asked = "" if each.target is None else f"  (≤ {each.target.limit:.4g})"
        print(f"{each.name}: {each.sample.median:.1f} {each.sample.unit}{asked}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
