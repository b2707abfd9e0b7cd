"""Godwit from Python: the same verbs as the command line, with reports instead of words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from godwit.engine.plan import Plan
from godwit.lab import registry
from godwit.migrate import checkpointing, receive, restoring, series, settle, source, transport
from godwit.migrate import inspect as inspecting
from godwit.migrate.channel import Channel
from godwit.migrate.convergence import Strategy
from godwit.migrate.options import Options
from godwit.migrate.report import Progress, ProgressEvent, Report, silent
from godwit.migrate.restoring import Restored
from godwit.migrate.series import Ended, Image, Rhythm
from godwit.migrate.settle import Recovered
from godwit.residual.line import Pipe
from godwit.types import Pid

__all__ = [
    "Ended",
    "Image",
    "Plan",
    "Progress",
    "ProgressEvent",
    "Recovered",
    "Report",
    "Restored",
    "checkpoint",
    "checkpoint_series",
    "inspect",
    "keep",
    "migrate",
    "recover",
    "restore",
    "serve_link_stdio",
    "serve_stdio",
    "serve_tls",
]

serve_link_stdio = receive.serve_link_stdio
serve_stdio = receive.serve_stdio
serve_tls = receive.serve_tls


def _node(host: str) -> transport.Node | None:
    found = None if "@" in host or host.startswith("tls://") else registry.lookup(host)
    if found is None:
        return None
    return transport.Node(connect=lambda: registry.connect(host), certs=found.certs_dir)


def _connector(host: str) -> Callable[[], Channel]:
    node = _node(host)
    return lambda: transport.connect(host, node)


def _link_to(host: str) -> Pipe:
    return transport.connect_link(host, _node(host))


def keep() -> None:
    """Be the keeper of this user and machine until nobody needs one, unless there is one."""
    from godwit.keeper import daemon

    daemon.serve(_link_to)


def inspect(pid: int, *, to: str | None = None, tcp_close: bool = False) -> Plan:
    """List every holding of a process tree with its disposition; with `to`, ask that machine too.

    Nothing is stopped or changed.
    """
    plan = inspecting.inspect(Pid(pid), tcp_close=tcp_close)
    if to is None or not plan.movable:
        return plan
    return inspecting.inspect_for(Pid(pid), plan, _connector(to), tcp_close=tcp_close)


def migrate(  # noqa: PLR0913  # an argument for each option
    pid: int,
    host: str,
    *,
    strategy: str = "auto",
    max_freeze_s: float | None = None,
    timeout_s: float | None = None,
    bandwidth_bytes_per_s: float | None = None,
    connections: int | None = None,
    tcp_close: bool = False,
    home: bool = False,
    trace: Path | None = None,
    progress: Progress = silent,
) -> Report:
    """Move a process tree to another machine.

    Args:
        pid: The root of the tree.
        host: A lab node, user@host over ssh, or tls://host:port.
        strategy: auto, stopcopy, precopy, postcopy or hybrid.
        max_freeze_s: Stop the program for no longer, or undo the move.
        timeout_s: Undo the move if it is not committed by then.
        bandwidth_bytes_per_s: Send no more than this.
        connections: Send memory over so many at once; None: as cores allow.
        tcp_close: TCP connections may break: the program finds them reset.
        home: Its home stays here: it goes on using this machine's files, and is reached by its pids here.
        trace: Where to write the timeline of the move.
        progress: Told where the move stands.

    Raises:
        RefusedError: Something cannot be carried; nothing was changed.
        MigrationError: It failed on the way; `survivor` says which copy lives.
    """
    options = Options(
        strategy=Strategy(strategy),
        max_freeze_s=max_freeze_s,
        timeout_s=timeout_s,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        connections=connections,
        tcp_close=tcp_close,
        home=home,
        trace=trace,
    )
    return source.migrate(Pid(pid), host, _connector(host), options, progress=progress)


def checkpoint(
    pid: int,
    directory: Path,
    *,
    leave_running: bool = False,
    tcp_close: bool = False,
    progress: Progress = silent,
) -> Report:
    """Write a process tree into a directory; unless it is to be left running, end it."""
    return checkpointing.checkpoint(
        Pid(pid), directory, leave_running=leave_running, tcp_close=tcp_close, progress=progress
    )


def checkpoint_series(
    pid: int,
    directory: Path,
    *,
    interval_s: float,
    keep: int = series.KEEP,
    tcp_close: bool = False,
    made: Callable[[Image], None] = lambda _: None,
    progress: Progress = silent,
) -> Ended:
    """Write a process tree into a directory again and again, each time what has changed since.

    Args:
        pid: The root of the tree. It runs on.
        directory: Gets a directory for each image, 0001 and so on; may have some of the same program.
        interval_s: From the begin of one image to the begin of the next.
        keep: So many of the newest can be restored.
        tcp_close: TCP connections may break: the program finds them reset.
        made: Told of each image once it is safe.
        progress: Told where it stands.

    Returns:
        When the program has ended, or after SIGINT; the program then runs on.
    """
    rhythm = Rhythm(interval_s=interval_s, keep=keep)
    return series.checkpoint_series(
        Pid(pid), directory, rhythm, tcp_close=tcp_close, made=made, progress=progress
    )


def restore(directory: Path, *, pod: bool = False, progress: Progress = silent) -> Restored:
    """Make a process tree run again from a directory: its image, or the newest of its series."""
    return restoring.restore(directory, pod=pod, progress=progress)


def recover() -> tuple[Recovered, ...]:
    """Settle every move that was left undecided on this machine."""
    return settle.everything(lambda host: _connector(host)())
