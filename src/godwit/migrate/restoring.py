"""From a directory back to life: an image, over those that it goes on from."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from godwit.engine import clocks, pod
from godwit.engine.build import Builder
from godwit.errors import (
    BusyError,
    DestinationError,
    ImageError,
    MigrationError,
    RefusedError,
    Survivor,
)
from godwit.migrate import admit, apart, filling, receiving, sifting, store, surveying
from godwit.migrate.channel import Channel, Closed, FdPipe
from godwit.migrate.filling import Filling
from godwit.migrate.report import Progress, ProgressEvent, Report, Stopwatch
from godwit.migrate.sifting import Sieve, Stage
from godwit.migrate.store import Opened, about
from godwit.migrate.surveying import Survey
from godwit.resources.outline import outline_of
from godwit.types import Fd, OwnedFd
from godwit.wire.frames import FrameKind

_STATUS: Final = struct.Struct("<iI")
_ENTRIES: Final = (FrameKind.HEADER, FrameKind.OUTLINE, FrameKind.TREE, FrameKind.FILES, FrameKind.ROUND)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A tree that runs again."""

    root_pid: int  # as the caller sees it
    inner_pid: int  # as it sees itself
    pod_init: int | None
    report: Report
    status_fd: int | None = None  # in a pod: where its init tells who ended

    def wait(self) -> int:
        """Wait until the root ends; return its exit status as a shell gives it.

        Once. Outside a pod, by the process that restored it.
        """
        status = self._wait_in_pod() if self.status_fd is not None else os.waitpid(self.root_pid, 0)[1]
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)

    def _wait_in_pod(self) -> int:
        assert self.status_fd is not None
        with OwnedFd(self.status_fd) as fd:
            while True:
                raw = os.read(fd.number, _STATUS.size)
                if len(raw) < _STATUS.size:
                    raise MigrationError("the pod was killed", survivor=Survivor.UNDECIDED)
                pid, status = _STATUS.unpack(raw)
                if pid == self.inner_pid:
                    return int(status)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """What a builder in another process tells."""

    root_pid: int
    inner_pid: int
    pod_init: int | None
    report: Report


def restore(directory: Path, *, pod: bool, progress: Progress) -> Restored:
    """Make a process tree run again from a directory.

    Args:
        directory: Of an image, or of a series: then its newest.
        pod: In namespaces of its own, so that its pids are free. Else in ours: then the caller
            becomes the root's parent.
        progress: Told where it stands.

    Raises:
        ImageError: The image is damaged, foreign or dishonest. Nothing was built.
        BusyError: A pid is taken.
        RefusedError, DestinationError: This machine lacks something. Nothing is left.
    """
    image = store.image_in(directory)
    if not pod:
        built = _restore(image, progress, in_pod=False, status_fd=None)
        return Restored(
            root_pid=built.root_pid, inner_pid=built.inner_pid, pod_init=None, report=built.report
        )
    reading, writing = os.pipe()
    try:
        built = apart.run(
            lambda line: _restore(image, line.progress, in_pod=True, status_fd=Fd(writing)),
            _Built,
            progress,
        )
    except BaseException as error:
        os.close(reading)
        if isinstance(error, apart.WorkerDied):
            raise DestinationError("the builder was killed; nothing of it is left") from error
        raise
    finally:
        os.close(writing)
    return Restored(
        root_pid=built.root_pid,
        inner_pid=built.inner_pid,
        pod_init=built.pod_init,
        report=built.report,
        status_fd=reading,
    )


def _restore(image: Path, progress: Progress, *, in_pod: bool, status_fd: Fd | None) -> _Built:
    restoring = _Restoring(progress, in_pod=in_pod)
    progress(ProgressEvent(stage="inspect"))
    with store.chain(image) as chain:
        found = surveying.survey(chain)
        with about(chain[-1].path), receiving.honest():
            return restoring.build(chain, found, status_fd)


class _Restoring:
    """One restore."""

    def __init__(self, progress: Progress, *, in_pod: bool) -> None:
        self._progress = progress
        self._in_pod = in_pod
        self._watch = Stopwatch()
        self._bytes = 0
        self._pages = 0

    def build(self, chain: Sequence[Opened], found: Survey, status_fd: Fd | None) -> _Built:
        """Build the last image of a chain, and let it run."""
        self._watch.lap("survey")
        self._progress(ProgressEvent(stage="plan"))
        self._admit(found)
        builder = Builder(in_pod=self._in_pod, status_fd=status_fd, clock_shift_ns=self._enter_clocks(found))
        try:
            self._fill(builder, chain, found)
            init = builder.init_pid()
            if self._in_pod:
                pod.complete_init(builder)
            builder.take_locks()
        except BaseException as error:
            builder.destroy()
            if isinstance(error, OSError) and not isinstance(error, Closed):
                notes = "; ".join(getattr(error, "__notes__", ()))
                raise DestinationError(f"{error} {notes}".strip(), remedy="choose another machine") from error
            raise
        root = builder.root_pid()
        builder.release()
        self._watch.lap("release")
        self._progress(ProgressEvent(stage="done"))
        report = self._report(found, root, len(chain))
        return _Built(root_pid=root, inner_pid=found.header.pid, pod_init=init, report=report)

    def _admit(self, found: Survey) -> None:
        assert found.shape is not None
        assert found.demand is not None
        refusals = tuple(admit.refusals(found.header, found.shape, found.demand, in_pod=self._in_pod))
        if not refusals:
            return
        taken = next((each for each in refusals if each.what.startswith("pid ")), None)
        if taken is not None:
            raise BusyError(f"{taken.what} is taken: {taken.why}", remedy=taken.remedy)
        raise RefusedError(refusals)

    def _enter_clocks(self, found: Survey) -> int:
        clock, machine = found.clock, found.header.machine
        assert clock is not None
        if self._in_pod:
            return pod.enter(machine, clock.monotonic_ns, clock.boottime_ns)
        if machine.boot_id != clocks.boot_id():
            return clocks.enter_time_namespace(clock.monotonic_ns, clock.boottime_ns)
        return 0

    def _fill(self, builder: Builder, chain: Sequence[Opened], found: Survey) -> None:
        """Make the tree of the last image, and put the pages of all of them into it."""
        assert found.shape is not None
        assert found.tree is not None
        self._progress(ProgressEvent(stage="spawn"))
        builder.prepare(found.shape)
        builder.prepare(outline_of(found.tree))
        self._watch.lap("prepare")
        builder.equip(found.tree, found.files)
        self._watch.lap("entries")
        stages = sifting.stages(found.shapes)
        for number, link in enumerate(chain):
            with about(link.path), receiving.honest():
                digest = self._pour(builder, link, stages)
            if number + 1 < len(chain) and digest != chain[number + 1].header.parent_digest:
                raise ImageError(
                    f"it goes on from {link.path.parent}, which has changed since",
                    remedy="copy the whole directory again from the original",
                )
        self._watch.lap("pages")
        builder.complete()
        self._watch.lap("complete")

    def _pour(self, builder: Builder, link: Opened, stages: list[Stage]) -> bytes:
        """Put an image's pages where they belong; return its digest. Its stages are taken from the list."""
        assert builder.shape is not None
        os.lseek(link.fd.number, 0, os.SEEK_SET)
        reading = _Digesting(link.fd)
        channel = Channel(reading)
        channel.accept_stream()
        filled = Filling(builder)
        while True:
            kind, payload = channel.expect(*_ENTRIES, *filling.KINDS, FrameKind.END)
            if kind in (FrameKind.OUTLINE, FrameKind.TREE):
                filled.ground = Sieve(builder, stages.pop(0), builder.shape)
            elif kind is FrameKind.END:
                break
            elif kind in filling.KINDS:
                filled.take(kind, payload)
                self._tell(channel.bytes_received)
        filled.check_end(payload)
        self._bytes += channel.bytes_received
        self._pages += filled.pages
        return reading.digest

    def _tell(self, done_bytes: int) -> None:
        self._progress(ProgressEvent(stage="pages", done_bytes=self._bytes + done_bytes))

    def _report(self, found: Survey, root: int, images: int) -> Report:
        assert found.tree is not None
        processes = found.tree.processes
        return Report(
            migration=found.header.migration,
            strategy="stopcopy",
            freeze_ms=0,
            total_ms=round(self._watch.total_ms(), 3),
            bytes_sent=self._bytes,
            pages=self._pages,
            rounds=images,
            source=os.fsdecode(found.header.machine.hostname),
            destination=os.uname().nodename,
            pid=root,
            survivor=Survivor.DESTINATION.value,
            processes=len(processes),
            threads=sum(len(process.threads) for process in processes),
            steps=tuple(self._watch.steps),
        )


class _Digesting(FdPipe):
    """A file that is read, and the digest of what was."""

    def __init__(self, fd: OwnedFd) -> None:
        super().__init__(fd.number, -1)
        self._digest = xxhash.xxh3_128()

    @property
    def digest(self) -> bytes:
        """XXH3, 128 bits, of what was read."""
        return self._digest.digest()

    def fill(self, buffer: memoryview) -> int:
        """Read until the buffer is full or the file ends; return how much came."""
        done = super().fill(buffer)
        self._digest.update(buffer[:done])
        return done
