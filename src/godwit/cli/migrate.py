"""`godwit migrate`: move a process and its descendants."""

from __future__ import annotations

from pathlib import Path

import click

from godwit.cli.output import PID, common_options, examples, foreign_options, tcp_close_option
from godwit.cli.progress import showing
from godwit.cli.report import show_report
from godwit.cli.values import DURATION, RATE


@click.command(
    epilog=examples(
        "godwit migrate 4711 alice@other             over ssh; the other side needs Godwit, not running",
        "godwit migrate 4711 tls://other:7487        to a `godwit receive --listen` there",
        "godwit migrate 4711 b --max-freeze 20ms     never stopped for longer, or not moved at all",
        "godwit migrate 4711 b --bandwidth 50MB/s    leave room on the line for others",
        "godwit migrate 4711 b --home                its files and its pid stay here, and are reached",
        "godwit migrate 4711 b --trace move.json     then: godwit bench plot move.json",
        "godwit lab exec a -- godwit migrate 15 b    from one lab node to another",
        "godwit migrate 4711 alice@other --json | jq .freeze_ms",
    )
)
@click.argument("pid", type=PID)
@click.argument("host")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "stopcopy", "precopy", "postcopy", "hybrid"]),
    default="auto",
    show_default=True,
    help="When memory is copied: stopcopy while the program stands still, precopy before, postcopy after,"
    " hybrid before and after. auto: before, as long as that pays, and after if it must be.",
)
@click.option(
    "--max-freeze",
    "max_freeze_s",
    metavar="DURATION",
    type=DURATION,
    help="Stop the program for no longer than this (20ms, 1s), or undo the move.",
)
@click.option(
    "--timeout",
    "timeout_s",
    metavar="DURATION",
    type=DURATION,
    help="Give up, and let it run on here, when it is not decided by then (30, 90s, 5min).",
)
@click.option(
    "--bandwidth",
    "bandwidth",
    metavar="RATE",
    type=RATE,
    help="Send no more than this in a second (50MB/s, 12MiB/s).",
)
@click.option(
    "--connections",
    "connections",
    metavar="N",
    type=click.IntRange(1, 8),
    help="Send memory over so many connections at once. Default: one for every two cores at either end, up to"
    " 4; one with --bandwidth.",
)
@click.option(
    "--trace",
    "trace",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the timeline of the move, in the Chrome trace-event format.",
)
@click.option(
    "--home",
    "home",
    is_flag=True,
    help="Its home stays here: it goes on using this machine's files, keeps its pids and its parent here, and"
    " gets the signals sent to them.",
)
@tcp_close_option
@foreign_options
@common_options
def migrate(  # noqa: PLR0913, PLR0917  # an argument for each option
    pid: int,
    host: str,
    strategy: str,
    max_freeze_s: float | None,
    timeout_s: float | None,
    bandwidth: float | None,
    connections: int | None,
    trace: Path | None,
    tcp_close: bool,
    home: bool,
) -> None:
    """Move process PID and its descendants to HOST.

    HOST is a lab node, user@host over ssh, or tls://host:port where `godwit receive` listens. The
    program keeps its pids, its memory, its files and its place in them. Whatever fails before the
    move is decided, it runs on here and nothing is left there.

    Memory is copied while the program runs, in rounds; it is stopped only for what it has written
    last. The report says how long it was frozen, and where it runs now.
    """
    from godwit import api

    with showing(f"pid {pid} to {host}") as progress:
        report = api.migrate(
            pid,
            host,
            strategy=strategy,
            max_freeze_s=max_freeze_s,
            timeout_s=timeout_s,
            bandwidth_bytes_per_s=bandwidth,
            connections=connections,
            tcp_close=tcp_close,
            home=home,
            trace=trace,
            progress=progress,
        )
    show_report(report, moved=True)
