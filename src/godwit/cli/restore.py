"""`godwit restore`: make what a checkpoint holds run again."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from godwit.cli.output import common_options, examples, foreign_options, say, say_json, settings
from godwit.cli.progress import showing
from godwit.errors import RequestError

if TYPE_CHECKING:
    from godwit.api import Restored

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@click.command(
    epilog=examples(
        "godwit restore /var/tmp/nap",
        "godwit restore /var/tmp/nap --detach --pid-file /run/nap.pid",
        "godwit restore /var/tmp/nap --pod           when one of its pids is taken",
        "godwit restore /var/tmp/series                the newest image of a series",
        "godwit restore /var/tmp/series/0003           this one",
    )
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("-d", "--detach", is_flag=True, help="Return as soon as it runs.")
@click.option(
    "--pid-file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the pid of the root process, as seen from here, to this file.",
)
@click.option("--pod", is_flag=True, help="Give it a pid namespace of its own, where its pids are free.")
@foreign_options
@common_options
def restore(directory: Path, detach: bool, pid_file: Path | None, pod: bool) -> int:
    """Make what a checkpoint holds run again.

    DIR is what `godwit checkpoint` wrote; of a series the newest image is taken, unless DIR is that of
    another one. The processes get the pids they had; when one is taken
    the error says which, and --pod helps.

    Without --detach it stays as the parent, passes SIGINT, SIGTERM, SIGHUP and SIGQUIT on to the
    program, and returns the program's exit status, or 128 plus the number of the signal that ended it.
    """
    from godwit import api

    with _pid_file(pid_file) as draft:
        with showing(f"restore {directory}") as progress:
            restored = api.restore(directory, pod=pod, progress=progress)
        if draft is not None:
            draft.publish(restored.root_pid)
        _show(restored)
    return 0 if detach else _stay(restored)


def _show(restored: Restored) -> None:
    if settings().as_json:
        say_json({"root_pid": restored.root_pid, "pod_init": restored.pod_init, "report": restored.report})
    elif not settings().quiet:
        pod = f" in a pod, whose init is {restored.pod_init}" if restored.pod_init is not None else ""
        say(f"runs as pid {restored.root_pid}{pod}, after {restored.report.total_ms:.1f} ms")


def _stay(restored: Restored) -> int:
    def pass_on(number: int, _: object) -> None:
        # Until `wait` returns the number is the program's, even when it is a zombie.
        with contextlib.suppress(ProcessLookupError):
            os.kill(restored.root_pid, number)

    before = {number: signal.signal(number, pass_on) for number in FORWARDED}
    try:
        return restored.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A pid file under a name of its own: it appears whole, or not at all."""

    path: Path
    descriptor: int
    draft: Path

    def publish(self, pid: int) -> None:
        os.write(self.descriptor, b"%d\n" % pid)
        self.draft.rename(self.path)


@contextlib.contextmanager
def _pid_file(path: Path | None) -> Iterator[_Draft | None]:
    """Make the file before anything is restored, when failing still costs nothing."""
    if path is None:
        yield None
        return
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise RequestError(
            f"cannot write {path}: {error.strerror}", remedy="choose another --pid-file"
        ) from error
    draft = Path(name)
    try:
        os.fchmod(descriptor, 0o644)
        yield _Draft(path, descriptor, draft)
    finally:
        os.close(descriptor)
        draft.unlink(missing_ok=True)
