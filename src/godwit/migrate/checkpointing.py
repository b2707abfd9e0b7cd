"""One checkpoint: the migration stream of a tree in a directory."""

from __future__ import annotations

import contextlib
from pathlib import Path

from godwit.engine import target
from godwit.errors import DestinationError, GodwitError, MigrationError, RequestError, Survivor
from godwit.migrate import apart, copying, store
from godwit.migrate.apart import Line
from godwit.migrate.imagefile import PARTIAL_NAME, STREAM_NAME, drafted
from godwit.migrate.report import Progress, Report
from godwit.migrate.taking import Taker
from godwit.types import Pid


def checkpoint(
    pid: Pid, directory: Path, *, leave_running: bool, tcp_close: bool = False, progress: Progress
) -> Report:
    """Write a process tree into a directory, made if need be; then end it, or leave it running.

    Raises:
        RequestError: The directory holds an image already.
        RefusedError: Something cannot be carried. Nothing was changed.
        DestinationError: The directory cannot be written. The process runs on, nothing is left.
    """
    target.check(pid)
    if (directory / STREAM_NAME).exists() or (directory.is_dir() and store.names(directory)):
        raise RequestError(f"{directory} holds an image already", remedy="name a new directory")
    made = made_directory(directory)

    def work(line: Line[Report]) -> Report:
        return _checkpoint(pid, directory, line, leave_running=leave_running, tcp_close=tcp_close)

    try:
        return apart.run(work, Report, progress)
    except (GodwitError, apart.WorkerDied, KeyboardInterrupt) as error:
        with contextlib.suppress(OSError):
            (directory / PARTIAL_NAME).unlink(missing_ok=True)
            if made:
                directory.rmdir()
        if isinstance(error, apart.WorkerDied):
            raise killed(error) from error
        raise


def made_directory(directory: Path) -> bool:
    """See that there is a directory; tell whether there was none."""
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(
            f"cannot make {directory}: {error.strerror}", remedy="name another directory"
        ) from error
    return made


def killed(error: apart.WorkerDied) -> MigrationError:
    """Return what to say of a worker that was killed."""
    return MigrationError(f"the checkpoint was killed (wait status {error})", survivor=Survivor.SOURCE)


def _checkpoint(
    pid: Pid, directory: Path, line: Line[Report], *, leave_running: bool, tcp_close: bool
) -> Report:
    # Who ends with its image is best stopped at once. Where writes cannot be noted, there is no other way.
    rounds = leave_running and copying.can_track(pid)
    taker = Taker(pid, line, rounds=rounds, tcp_close=tcp_close)
    with contextlib.closing(taker), drafted(directory) as file:
        return taker.take(file, leave_running=leave_running).report
