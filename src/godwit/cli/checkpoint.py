"""`godwit checkpoint`: write a process and its descendants to a directory."""

from __future__ import annotations

from pathlib import Path

import click

from godwit.cli.output import PID, common_options, examples, foreign_options, tcp_close_option
from godwit.cli.progress import showing
from godwit.cli.report import show_report


@click.command(
    epilog=examples(
        "godwit checkpoint 4711 --output /var/tmp/nap",
        "godwit checkpoint 4711 --output /var/tmp/copy --leave-running",
    )
)
@click.argument("pid", type=PID)
@click.option(
    "-o",
    "--output",
    "directory",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to write it; made if need be.",
)
@click.option("--leave-running", is_flag=True, help="Let the program run on; otherwise it ends.")
@tcp_close_option
@foreign_options
@common_options
def checkpoint(pid: int, directory: Path, leave_running: bool, tcp_close: bool) -> None:
    """Write process PID and its descendants to a directory.

    `godwit restore` makes them run again, on this machine or on another that has the same files.
    Unless --leave-running is given the program ends once everything is safely written.
    """
    from godwit import api

    with showing(f"pid {pid} to {directory}") as progress:
        report = api.checkpoint(
            pid, directory, leave_running=leave_running, tcp_close=tcp_close, progress=progress
        )
    show_report(report, moved=False)
