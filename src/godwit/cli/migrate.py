"""`godwit migrate`: move a process and its descendants."""

from __future__ import annotations

import click

from godwit.cli.output import PID, common_options, examples, foreign_options, tcp_close_option
from godwit.cli.progress import showing
from godwit.cli.report import show_report


@click.command(
    epilog=examples(
        "godwit migrate 4711 alice@other             over ssh; the other side needs Godwit, not running",
        "godwit migrate 4711 tls://other:7487        to a `godwit receive --listen` there",
        "godwit lab exec a -- godwit migrate 15 b    from one lab node to another",
        "godwit migrate 4711 alice@other --json | jq .freeze_ms",
    )
)
@click.argument("pid", type=PID)
@click.argument("host")
@click.option(
    "--timeout",
    "timeout_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="Give up, and let it run on here, when it is not decided by then.",
)
@tcp_close_option
@foreign_options
@common_options
def migrate(pid: int, host: str, timeout_s: float | None, tcp_close: bool) -> None:
    """Move process PID and its descendants to HOST.

    HOST is a lab node, user@host over ssh, or tls://host:port where `godwit receive` listens. The
    program keeps its pids, its memory, its files and its place in them. Whatever fails before the
    move is decided, it runs on here and nothing is left there.

    The report says how long it was frozen, and where it runs now.
    """
    from godwit import api

    with showing(f"pid {pid} to {host}") as progress:
        report = api.migrate(pid, host, timeout_s=timeout_s, tcp_close=tcp_close, progress=progress)
    show_report(report, moved=True)
