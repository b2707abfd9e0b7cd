"""A series of checkpoints of a program that runs on: each holds what has changed since the one before.

An image that goes on from others needs them all, so every now and then one is whole: when there are many in
a row, or when together they are larger than the whole one that they go on from. So a series takes no more
room than a few whole images, and nothing written is ever changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec

from godwit.engine import target
from godwit.errors import (
    BusyError,
    DestinationError,
    GodwitError,
    NoProcessError,
    RefusedError,
    RequestError,
)
from godwit.linux import pidfd
from godwit.log import log
from godwit.migrate import apart, store, taking
from godwit.migrate.apart import Line
from godwit.migrate.checkpointing import killed, made_directory
from godwit.migrate.imagefile import STREAM_NAME, drafted, sync_directory
from godwit.migrate.report import Progress, Report
from godwit.migrate.store import Name, Opened
from godwit.migrate.taking import Parent, Taken, Taker
from godwit.procfs import stat, status
from godwit.types import OwnedFd, Pid

# Each one more is opened, read and put over the others when one is restored.
CHAIN_IMAGES: Final = 32
KEEP: Final = 5
_DYING_MS: Final = 200  # from what is seen of an end in /proc until it has come


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image of a series."""

    image: str  # its directory's name
    goes_on_from: str  # that of the one before; empty: it is whole
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a series ended."""

    images: int  # taken
    newest: str  # its directory's name
    program_ended: bool  # else it runs on: somebody has interrupted the series


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """How often, and how many."""

    interval_s: float  # from the begin of one image to the begin of the next
    keep: int = KEEP  # so many can be restored


def checkpoint_series(
    pid: Pid,
    directory: Path,
    rhythm: Rhythm,
    *,
    tcp_close: bool = False,
    made: Callable[[Image], None],
    progress: Progress,
) -> Ended:
    """Write images of a process tree into a directory until it ends or we are interrupted (SIGINT).

    Args:
        pid: The root. It runs on.
        directory: Made if need be; may hold images of the same program.
        rhythm: How often, and how many are kept.
        tcp_close: TCP connections may break.
        made: Told of each image once it is safe.
        progress: Told where it stands.

    Raises:
        RequestError: The directory holds something else.
        RefusedError: The first image could not be taken, or writes cannot be noted here.
        DestinationError: The directory cannot be written. What is there already stays.
    """
    target.check(pid)
    taking.see_that_writes_can_be_noted(pid)
    if (directory / STREAM_NAME).exists():
        raise RequestError(f"{directory} holds a single image already", remedy="name a new directory")
    fresh = made_directory(directory)
    try:
        return apart.run(
            lambda line: _Series(pid, directory, rhythm, line).run(tcp_close=tcp_close),
            Ended,
            progress,
            lambda raw: made(msgspec.json.decode(raw, type=Image)),
        )
    except apart.WorkerDied as error:
        with contextlib.suppress(OSError):
            store.sweep(directory)
        raise killed(error) from error
    finally:
        if fresh:
            # With nothing in it, it is of no use.
            with contextlib.suppress(OSError):
                directory.rmdir()


@dataclass(slots=True)
class _Chain:
    """A whole image, and those that go on from it."""

    whole_bytes: int
    more_bytes: int
    images: int
    last: Parent
    last_name: str

    def is_long(self) -> bool:
        return self.images >= CHAIN_IMAGES or _is_larger(self.more_bytes, self.whole_bytes)


@dataclass(slots=True)
class _Series:
    """A series under way, in a process of its own."""

    pid: Pid
    directory: Path
    rhythm: Rhythm
    line: Line[Ended]
    images: int = 0
    newest: str = ""
    chain: _Chain | None = None
    _due: float = field(default_factory=time.monotonic)

    def run(self, *, tcp_close: bool) -> Ended:
        with contextlib.ExitStack() as stack:
            program = stack.enter_context(pidfd.pidfd_open(self.pid))
            stack.enter_context(_locked(self.directory))
            store.sweep(self.directory)
            self._see_that_it_is_ours()
            taker = Taker(self.pid, self.line, rounds=True, tcp_close=tcp_close)
            stack.enter_context(contextlib.closing(taker))
            while self._wait(program):
                self._due = time.monotonic() + self.rhythm.interval_s
                self._try(taker, program)
            if not self.images:
                self.line.give_up_if_cancelled()
            ended = _has_ended(program)
            return Ended(images=self.images, newest=self.newest, program_ended=ended)

    def _see_that_it_is_ours(self) -> None:
        """Raise RequestError if the directory has images of another program: they would be dropped."""
        shown = [name for name in store.names(self.directory) if not name.hidden]
        if not shown:
            return
        with contextlib.closing(Opened.open(self.directory / str(shown[-1]))) as newest:
            theirs = newest.header
        name = os.fsencode(stat.read(self.pid).comm)
        if (theirs.program, theirs.pid) != (name, status.read(self.pid).nspid[-1]):
            raise RequestError(
                f"{self.directory} holds images of another program, pid {theirs.pid}"
                f" ({os.fsdecode(theirs.program)})",
                remedy="name a new directory",
            )

    def _wait(self, program: OwnedFd) -> bool:
        """Wait until the next image is due; tell whether it is wanted."""
        poll = select.poll()
        poll.register(program.number, select.POLLIN)
        poll.register(self.line.fileno(), select.POLLIN)
        return not poll.poll(max(0.0, self._due - time.monotonic()) * 1000)

    def _try(self, taker: Taker, program: OwnedFd) -> None:
        """Take an image. What may pass until the next is due costs only this one, unless it is the first."""
        try:
            self._take(taker)
        except DestinationError:
            raise
        except (GodwitError, OSError) as error:
            if _has_ended(program, _DYING_MS):
                if self.images:
                    return
                raise NoProcessError(f"pid {self.pid} ended before its first image was whole") from error
            if self.images and self.line.cancelled():
                return
            if not self.images or not isinstance(error, RefusedError | BusyError):
                raise
            log.warning("no image this time: %s", error.line())

    def _take(self, taker: Taker) -> None:
        before = None if self.chain is None or self.chain.is_long() else self.chain
        numbers = [name.number for name in store.names(self.directory)]
        name = Name(max(numbers, default=0) + 1, hidden=False, partial=False)
        place = self.directory / str(Name(name.number, hidden=True, partial=True))
        with _writing(self.directory):
            place.mkdir(mode=0o700)
        try:
            with drafted(place) as file:
                taken = taker.take(file, before.last if before else None, leave_running=True)
            with _writing(self.directory):
                place.rename(self.directory / str(name))
                sync_directory(self.directory)
        finally:
            with contextlib.suppress(OSError):
                place.rmdir()
        self._note(str(name), taken)
        with _writing(self.directory):
            store.drop_older(self.directory, self.rhythm.keep)

    def _note(self, name: str, taken: Taken) -> None:
        goes_on_from = ""
        if taken.whole or self.chain is None:
            self.chain = _Chain(taken.report.bytes_sent, 0, 1, taken.as_parent(), name)
        else:
            goes_on_from = self.chain.last_name
            self.chain.more_bytes += taken.report.bytes_sent
            self.chain.images += 1
            self.chain.last, self.chain.last_name = taken.as_parent(), name
        self.images, self.newest = self.images + 1, name
        report = replace(taken.report, destination=str(self.directory / name))
        self.line.part(Image(image=name, goes_on_from=goes_on_from, report=report))


def _is_larger(more_bytes: int, whole_bytes: int) -> bool:
    return more_bytes > whole_bytes


def _has_ended(program: OwnedFd, within_ms: int = 0) -> bool:
    poll = select.poll()
    poll.register(program.number, select.POLLIN)
    return bool(poll.poll(within_ms))


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DestinationError(
            f"cannot write to {directory}: {error.strerror}",
            remedy="make room there, or name another directory",
        ) from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep a directory to ourselves for the block.

    Raises:
        BusyError: Another series is being written there.
    """
    with OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        try:
            fcntl.flock(fd.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"another series is being written to {directory}", remedy="name another directory"
            ) from error
        except OSError as error:
            # Some network file systems lock no directories.
            log.info("%s cannot be locked: %s", directory, error.strerror)
        yield
