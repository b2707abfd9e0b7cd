"""Checkpoints: the migration stream in a directory, and back to life from it."""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from godwit import __version__
from godwit.engine import capture, clocks, freeze, plan, pod, view
from godwit.engine.build import Builder
from godwit.engine.freeze import FrozenTree
from godwit.engine.view import TreeView
from godwit.errors import (
    AccessError,
    BusyError,
    DestinationError,
    GodwitError,
    ImageError,
    MigrationError,
    RefusedError,
    RequestError,
    Survivor,
)
from godwit.images import codec
from godwit.migrate import admit, apart, receiving, sending
from godwit.migrate.apart import Line
from godwit.migrate.channel import Channel, Closed, FdPipe
from godwit.migrate.copying import Copying
from godwit.migrate.entries import HeaderEntry
from godwit.migrate.filling import Filling
from godwit.migrate.pagestream import PageStream, buffer_of_pages
from godwit.migrate.report import Progress, ProgressEvent, Report, Stopwatch
from godwit.resources.outline import ClockEntry, DemandEntry, OutlineEntry
from godwit.types import Fd, OwnedFd, Pid, Tid
from godwit.wire.frames import FrameKind

STREAM_NAME: Final = "stream.godwit"
_PARTIAL_NAME: Final = "stream.godwit.partial"
_STATUS: Final = struct.Struct("<iI")


# --- out --------------------------------------------------------------------------------------


def checkpoint(
    pid: Pid, directory: Path, *, leave_running: bool, tcp_close: bool = False, progress: Progress
) -> Report:
    """Write a process tree into a directory, made if need be; then end it, or leave it running.

    Raises:
        RequestError: The directory holds an image already.
        RefusedError: Something cannot be carried. Nothing was changed.
        DestinationError: The directory cannot be written. The process runs on, nothing is left.
    """
    plan.check_target(pid)
    if (directory / STREAM_NAME).exists():
        raise RequestError(f"{directory} holds an image already", remedy="name a new directory")
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(
            f"cannot make {directory}: {error.strerror}", remedy="name another directory"
        ) from error
    try:
        return apart.run(
            lambda line: _checkpoint(pid, directory, line, leave_running=leave_running, tcp_close=tcp_close),
            Report,
            progress,
        )
    except (GodwitError, apart.WorkerDied, KeyboardInterrupt) as error:
        _clean(directory, made=made)
        if isinstance(error, apart.WorkerDied):
            raise MigrationError(
                f"the checkpoint was killed (wait status {error})", survivor=Survivor.SOURCE
            ) from error
        raise


def _clean(directory: Path, *, made: bool) -> None:
    if (directory / STREAM_NAME).exists():
        return
    (directory / _PARTIAL_NAME).unlink(missing_ok=True)
    if made:
        with contextlib.suppress(OSError):
            directory.rmdir()


@contextlib.contextmanager
def _written(directory: Path) -> Iterator[Channel]:
    """Open the stream for writing; at the end of the block it is whole, durable and in its place."""
    partial = directory / _PARTIAL_NAME
    try:
        with OwnedFd(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)) as fd:
            yield Channel(FdPipe(-1, fd.number))
            os.fsync(fd.number)
        partial.rename(directory / STREAM_NAME)
        with OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as parent:
            os.fsync(parent.number)
    except OSError as error:
        raise DestinationError(
            f"cannot write {directory / STREAM_NAME}: {error.strerror}",
            remedy="make room there, or name another directory",
        ) from error


def _checkpoint(
    pid: Pid, directory: Path, line: Line[Report], *, leave_running: bool, tcp_close: bool
) -> Report:
    watch = Stopwatch()
    memory = view.of_mover(closes_connections=tcp_close)
    line.progress(ProgressEvent(stage="inspect"))
    plan.movable(pid, memory)
    view.settled(pid, memory, capture.outline)
    line.give_up_if_cancelled()
    watch.lap("prepare")
    line.progress(ProgressEvent(stage="freeze"))
    frozen_at = 0.0

    def begin() -> None:
        nonlocal frozen_at
        frozen_at = time.monotonic()

    with (
        freeze.beside(Tid(pid)),
        plan.frozen(pid, memory, begin, line.give_up_if_cancelled) as (frozen, tree),
    ):
        report = _write_frozen(pid, directory, line, frozen, tree, watch)
        if not leave_running:
            frozen.kill()
    freeze_ms = round((time.monotonic() - frozen_at) * 1000, 3)
    line.progress(ProgressEvent(stage="done"))
    return _finished(report, freeze_ms, watch)


def _write_frozen(
    pid: Pid, directory: Path, line: Line[Report], frozen: FrozenTree, tree: TreeView, watch: Stopwatch
) -> Report:
    machine = capture.machine(tree)
    header = sending.header_of(tree, machine, secrets.token_hex(16), __version__)
    shape, demand = capture.outline(tree)
    captured = capture.capture(frozen, tree, machine)
    watch.lap("capture")
    with contextlib.closing(captured), _written(directory) as channel:
        channel.open_stream()
        channel.send(FrameKind.HEADER, codec.encode(header))
        # Read last: a timer's remaining time, read before, must not run out early by these clocks.
        monotonic_ns, boottime_ns = clocks.seen_by(pid)
        clock = ClockEntry(monotonic_ns=monotonic_ns, boottime_ns=boottime_ns, since_hello_ns=0)
        sending.send_outline(channel, shape, demand, clock)
        sending.send_tree(channel, captured)

        def after_chunk(done: int) -> None:
            total = max(done, header.private_bytes)
            line.progress(ProgressEvent(stage="pages", done_bytes=done, total_bytes=total))
            line.give_up_if_cancelled()

        copying = Copying(PageStream(channel, buffer_of_pages(), after_chunk=after_chunk))
        copying.last(tree, captured)
        copying.stream.end()
        pages, sent = copying.stream.pages, channel.bytes_sent
    watch.lap("write")
    return Report(
        migration=header.migration,
        strategy="stopcopy",
        freeze_ms=0,
        total_ms=0,
        bytes_sent=sent,
        pages=pages,
        rounds=1,
        source=os.uname().nodename,
        destination=str(directory),
        pid=pid,
        survivor=Survivor.SOURCE.value,
        processes=len(captured.tree.processes),
        threads=sum(len(process.threads) for process in captured.tree.processes),
    )


def _finished(report: Report, freeze_ms: float, watch: Stopwatch) -> Report:
    return replace(report, freeze_ms=freeze_ms, total_ms=round(watch.total_ms(), 3), steps=tuple(watch.steps))


# --- back -------------------------------------------------------------------------------------


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
        directory: From `checkpoint`.
        pod: In namespaces of its own, so that its pids are free. Else in ours: then the caller
            becomes the root's parent.
        progress: Told where it stands.

    Raises:
        ImageError: The image is damaged, foreign or dishonest. Nothing was built.
        BusyError: A pid is taken.
        RefusedError, DestinationError: This machine lacks something. Nothing is left.
    """
    if not (directory / STREAM_NAME).is_file():
        raise RequestError(
            f"{directory} holds no image",
            remedy=f"name a directory that has a {STREAM_NAME}, made by godwit checkpoint",
        )
    if not pod:
        built = _restore(directory, progress, in_pod=False, status_fd=None)
        return Restored(
            root_pid=built.root_pid, inner_pid=built.inner_pid, pod_init=None, report=built.report
        )
    reading, writing = os.pipe()
    try:
        built = apart.run(
            lambda line: _restore(directory, line.progress, in_pod=True, status_fd=Fd(writing)),
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


def _restore(directory: Path, progress: Progress, *, in_pod: bool, status_fd: Fd | None) -> _Built:
    watch = Stopwatch()
    progress(ProgressEvent(stage="inspect"))
    path = directory / STREAM_NAME
    try:
        opened = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror}", remedy="run as its owner") from error
    with opened as fd:
        owner = os.fstat(fd.number).st_uid
        if owner not in (0, os.geteuid()):
            raise AccessError(
                f"{path} belongs to user {owner}: restored as ours it could be made to do anything",
                remedy="restore it as that user, or chown it if you trust it",
            )
        channel = Channel(FdPipe(fd.number, -1))
        try:
            with receiving.honest():
                header = _open_image(channel)
                return _rebuild(channel, header, watch, progress, in_pod=in_pod, status_fd=status_fd)
        except Closed as error:
            raise ImageError(
                f"the image {path} is truncated: {error}", remedy="copy it again from the original"
            ) from error
        except ImageError as error:
            raise ImageError(f"{path}: {error.message}", remedy=error.remedy) from error


def _open_image(channel: Channel) -> HeaderEntry:
    channel.accept_stream()
    _, payload = channel.expect(FrameKind.HEADER)
    return codec.decode(payload, HeaderEntry)


def _rebuild(
    channel: Channel,
    header: HeaderEntry,
    watch: Stopwatch,
    progress: Progress,
    *,
    in_pod: bool,
    status_fd: Fd | None,
) -> _Built:
    _, payload = channel.expect(FrameKind.OUTLINE)
    shape, demand, clock = receiving.read_outline(payload)
    progress(ProgressEvent(stage="plan"))
    _admit(header, shape, demand, in_pod=in_pod)
    shift_ns = 0
    if in_pod:
        shift_ns = pod.enter(header.machine, clock.monotonic_ns, clock.boottime_ns)
    elif header.machine.boot_id != clocks.boot_id():
        shift_ns = clocks.enter_time_namespace(clock.monotonic_ns, clock.boottime_ns)
    builder = Builder(in_pod=in_pod, status_fd=status_fd, clock_shift_ns=shift_ns)
    try:
        progress(ProgressEvent(stage="spawn"))
        builder.prepare(shape)
        watch.lap("prepare")
        progress(ProgressEvent(stage="pages", total_bytes=header.private_bytes))
        _, payload = channel.expect(FrameKind.TREE)
        tree = receiving.receive_tree(channel, builder, header, payload, Filling(builder), watch)
        init = builder.init_pid()
        if in_pod:
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
    watch.lap("release")
    progress(ProgressEvent(stage="done"))
    report = Report(
        migration=header.migration,
        strategy="stopcopy",
        freeze_ms=0,
        total_ms=round(watch.total_ms(), 3),
        bytes_sent=channel.bytes_received,
        pages=0,
        rounds=1,
        source=os.fsdecode(header.machine.hostname),
        destination=os.uname().nodename,
        pid=root,
        survivor=Survivor.DESTINATION.value,
        processes=len(tree.processes),
        threads=sum(len(process.threads) for process in tree.processes),
        steps=tuple(watch.steps),
    )
    return _Built(root_pid=root, inner_pid=header.pid, pod_init=init, report=report)


def _admit(header: HeaderEntry, shape: OutlineEntry, demand: DemandEntry, *, in_pod: bool) -> None:
    refusals = tuple(admit.refusals(header, shape, demand, in_pod=in_pod))
    if not refusals:
        return
    taken = next((each for each in refusals if each.what.startswith("pid ")), None)
    if taken is not None:
        raise BusyError(f"{taken.what} is taken: {taken.why}", remedy=taken.remedy)
    raise RefusedError(refusals)
