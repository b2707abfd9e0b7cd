"""Further connections of one move: pages go over all of them at once, where there are cores for it.

One connection keeps one core at either end busy with encryption. A lane carries nothing but pages of
processes, between two rounds' marks, and is closed before the freeze. At the destination each lane has a
process of its own, which decrypts and hands the frames on to the one that builds, over a socket in the
state directory.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from godwit.engine.ranges import Range
from godwit.errors import ImageError, MigrationError, Survivor
from godwit.images import codec
from godwit.migrate import journal
from godwit.migrate.channel import Channel, SocketPipe
from godwit.migrate.entries import LaneEntry
from godwit.migrate.filling import Filling, Ground
from godwit.migrate.options import Options
from godwit.migrate.pagestream import Owner, PageStream, Read, buffer_of_pages
from godwit.migrate.patience import Patience
from godwit.types import OwnedFd
from godwit.wire.frames import FrameKind

LIMIT: Final = 8
# Each lane costs a handshake of 10 ms: for less than this it is not worth it.
WORTH_BYTES: Final = 64 << 20
_LOOK_EVERY_S: Final = 0.1
_KINDS: Final = (FrameKind.PAGES, FrameKind.ZEROES, FrameKind.PACKED)


def connections(options: Options, cpus_there: int) -> int:
    """Return over how many connections a move sends memory.

    Each takes a core at either end, and the program wants some too. A limited line has no need of more.
    """
    if options.bandwidth_bytes_per_s is not None:
        return 1
    if options.connections is not None:
        return min(options.connections, LIMIT)
    return max(1, min((os.cpu_count() or 1) // 2, cpus_there // 2, LIMIT // 2))


# --- the source ---------------------------------------------------------------------------------


class _Share:
    """Chunks of pages that several threads take from."""

    def __init__(self, groups: Iterable[Sequence[Range]]) -> None:
        self._groups = iter(groups)
        self._lock = threading.Lock()
        self._over = False

    def __iter__(self) -> Iterator[Sequence[Range]]:
        return self

    def __next__(self) -> Sequence[Range]:
        with self._lock:
            if self._over:
                raise StopIteration
            return next(self._groups)

    def stop(self) -> None:
        """Let nobody have more."""
        self._over = True


@dataclass(slots=True)
class _Lane:
    """One further connection, and the thread that sends over it."""

    channel: Channel
    stream: PageStream
    error: BaseException | None = None

    def run(self, share: _Share, owner: Owner, read: Read) -> None:
        """Send from the share until it is empty; return when all of it is in place."""
        try:
            self.stream.send(owner, share, read)
            self.channel.send(FrameKind.ROUND)
            self.channel.expect(FrameKind.ROUND)
        except BaseException as error:  # noqa: BLE001  # carried to the main thread, not swallowed
            self.error = error
            share.stop()

    def end(self) -> None:
        """Say that nothing more comes; return when it was heard."""
        try:
            self.stream.end()
            self.channel.expect(FrameKind.END)
        except BaseException as error:  # noqa: BLE001  # carried to the main thread, not swallowed
            self.error = error


@dataclass(slots=True)
class Lanes:
    """The further connections of a move, at its source. None are open at first.

    Args:
        check: Called while threads are waited for; what it raises cuts the lanes.
    """

    check: Callable[[], None] = lambda: None
    _lanes: list[_Lane] = field(default_factory=list[_Lane])
    pages: int = 0  # that went over them
    bytes_sent: int = 0

    def open(
        self, count: int, migration: str, connect: Callable[[], Channel], patience: Patience | None = None
    ) -> None:
        """Open so many connections; fewer, and GodwitError or OSError is raised, when one cannot be had."""
        from godwit.wire.packing import Packer

        for number in range(1, count + 1):
            channel = connect()
            with contextlib.ExitStack() as undo:
                undo.callback(channel.close)
                channel.patience = patience
                channel.open_stream()
                channel.send(FrameKind.LANE, codec.encode(LaneEntry(migration=migration, number=number)))
                channel.accept_stream()
                channel.expect(FrameKind.LANE)
                # From here on it is another thread's, and patience the main thread's.
                channel.patience = None
                undo.pop_all()
            packer = Packer(link_bytes_per_s=None, copies=False)
            self._lanes.append(_Lane(channel, PageStream(channel, buffer_of_pages(), packer)))

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def send(self, stream: PageStream, owner: Owner, groups: Iterable[Sequence[Range]], read: Read) -> None:
        """Send pages over the first stream and all lanes; return when what went over lanes is in place.

        `read` is called in several threads at once.

        Raises:
            MigrationError: A lane broke.
        """
        share = _Share(groups)
        threads = [threading.Thread(target=lane.run, args=(share, owner, read)) for lane in self._lanes]
        with self._joined(threads, share):
            stream.send(owner, share, read)
        self._count()

    def finish(self) -> None:
        """Close the lanes. Raises MigrationError if one broke."""
        with self._joined([threading.Thread(target=lane.end) for lane in self._lanes], _Share(())):
            pass
        self.close()

    def close(self) -> None:
        """Close the lanes, whatever is under way on them."""
        for lane in self._lanes:
            lane.channel.cut()
            lane.channel.close()
        self._lanes.clear()

    @contextlib.contextmanager
    def _joined(self, threads: Sequence[threading.Thread], share: _Share) -> Iterator[None]:
        for thread in threads:
            thread.start()
        try:
            yield
            while any(thread.is_alive() for thread in threads):
                self.check()
                for thread in threads:
                    thread.join(_LOOK_EVERY_S)
        except BaseException:
            share.stop()
            for lane in self._lanes:
                lane.channel.cut()
            raise
        finally:
            for thread in threads:
                thread.join()
        for lane in self._lanes:
            if lane.error is not None and not isinstance(lane.error, OSError | ImageError):
                raise lane.error
            if lane.error is not None:
                raise MigrationError(
                    f"a further connection broke ({lane.error})",
                    survivor=Survivor.SOURCE,
                    remedy="try again, or with --connections 1",
                ) from lane.error

    def _count(self) -> None:
        self.pages = sum(lane.stream.pages for lane in self._lanes)
        self.bytes_sent = sum(lane.channel.bytes_sent for lane in self._lanes)


# --- the destination ----------------------------------------------------------------------------


class Meeting:
    """Where the lanes of one move come in, in the process that builds. Closed before the program runs."""

    def __init__(self, migration: str) -> None:
        """Listen. To be called before the state directory goes out of sight."""
        self._name = journal.beside(migration, "lanes").name
        self._directory = _directory()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(_address(self._directory, self._name))
        self._listener.listen(LIMIT)
        self._lanes: dict[int, tuple[Channel, Filling]] = {}
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)

    def turn(self, channel: Channel, ground: Ground) -> None:
        """Take a frame from each lane that has one, until the first connection has something to say.

        Raises:
            ImageError: A lane is dishonest.
            Closed: One ended within what it had to say.
        """
        self._poll.register(channel.fileno(), select.POLLIN)
        try:
            while True:
                waits = not channel.has_word()
                for fd, _ in self._poll.poll(None if waits else 0):
                    if fd == self._listener.fileno():
                        self._join(ground)
                    elif fd in self._lanes:
                        self._take(fd)
                if not waits:
                    return
        finally:
            self._poll.unregister(channel.fileno())

    def _join(self, ground: Ground) -> None:
        connection, _ = self._listener.accept()
        if len(self._lanes) == LIMIT:
            connection.close()
            return
        lane = Channel(SocketPipe(connection))
        self._lanes[lane.fileno()] = lane, Filling(ground)
        self._poll.register(lane.fileno(), select.POLLIN)

    def _take(self, fd: int) -> None:
        lane, filled = self._lanes[fd]
        kind, payload = lane.expect(*_KINDS, FrameKind.ROUND, FrameKind.END)
        if kind in _KINDS:
            filled.take(kind, payload)
        elif kind is FrameKind.ROUND:
            lane.send(kind)
        else:
            filled.check_end(payload)
            lane.send(kind)
            self._poll.unregister(fd)
            del self._lanes[fd]
            lane.close()

    def finish(self) -> None:
        """See that no lane is open any more. Raises ImageError."""
        if self._lanes:
            raise ImageError(f"the frozen tree came while {len(self._lanes)} further connections were open")

    def close(self) -> None:
        """Have no lane come in any more, and forget those that did."""
        for lane, _ in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self._listener.close()
        with self._directory, contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._directory.number)


@contextlib.contextmanager
def meeting(migration: str, *, wanted: bool) -> Iterator[Meeting | None]:
    """Have lanes come in for the length of the block. Until then it must not leave the mount namespace."""
    if not wanted:
        yield None
        return
    with contextlib.closing(Meeting(migration)) as made:
        yield made


def forget(migration: str) -> None:
    """Remove what a killed builder has left of its meeting."""
    journal.beside(migration, "lanes").unlink(missing_ok=True)


def sweep() -> None:
    """Remove every meeting that nobody holds any more."""
    for path in journal.directory().glob("*.lanes"):
        with contextlib.suppress(OSError), _joined(path.name):
            continue
        path.unlink(missing_ok=True)


def relay(channel: Channel, migration: str) -> None:
    """Hand the frames of a lane on to the process that builds, and its answers back; return at the end.

    Raises:
        ImageError: No move of this name waits for a lane.
        Closed: Either side broke off.
    """
    try:
        inner = _joined(journal.beside(migration, "lanes").name)
    except OSError as error:
        raise ImageError("no move of this name waits for a further connection") from error
    with inner:
        onward = Channel(SocketPipe(inner))
        channel.send(FrameKind.LANE)
        kind = FrameKind.LANE
        while kind is not FrameKind.END:
            if not _speaks_first(channel, onward):
                return
            kind, payload = channel.expect(*_KINDS, FrameKind.ROUND, FrameKind.END)
            onward.send(kind, payload)
            if kind not in _KINDS:
                answer, payload = onward.expect(kind)
                channel.send(answer, payload)


def _joined(name: str) -> socket.socket:
    inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _directory() as directory:
            inner.connect(_address(directory, name))
    except OSError:
        inner.close()
        raise
    return inner


def _speaks_first(channel: Channel, onward: Channel) -> bool:
    """Wait for either side; False: the one that builds has ended, and never speaks unasked."""
    poll = select.poll()
    for fd in (channel.fileno(), onward.fileno()):
        poll.register(fd, select.POLLIN)
    while not channel.has_word():
        poll.poll()
        if onward.has_word():
            return False
    return True


def _directory() -> OwnedFd:
    return OwnedFd(os.open(journal.directory(), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


def _address(directory: OwnedFd, name: str) -> str:
    # A socket's address has 108 bytes, and state directories may be deep.
    return f"/proc/self/fd/{directory.number}/{name}"
