"""`godwit checkpoint`: write a process and its descendants to a directory, once or again and again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from godwit.cli.output import (
    PID,
    common_options,
    counted,
    examples,
    foreign_options,
    say,
    say_json,
    settings,
    tcp_close_option,
)
from godwit.cli.progress import showing
from godwit.cli.report import show_image, show_report
from godwit.cli.values import DURATION
from godwit.errors import RequestError

if TYPE_CHECKING:
    from godwit.api import Ended


@click.command(
    epilog=examples(
        "godwit checkpoint 4711 --output /var/tmp/nap",
        "godwit checkpoint 4711 --output /var/tmp/copy --leave-running",
        "godwit checkpoint 4711 --output /var/tmp/series --interval 30s --keep 5",
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
@click.option(
    "--interval",
    "interval_s",
    type=DURATION,
    metavar="TIME",
    help="Write an image so often, of what has changed since; the program runs on. 30s, 5min.",
)
@click.option(
    "--keep",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    help="With --interval: keep the N newest images; 5 unless given.",
)
@tcp_close_option
@foreign_options
@common_options
def checkpoint(
    pid: int,
    directory: Path,
    leave_running: bool,
    interval_s: float | None,
    keep: int | None,
    tcp_close: bool,
) -> None:
    """Write process PID and its descendants to a directory.

    `godwit restore` makes them run again, on this machine or on another that has the same files.
    Unless --leave-running is given the program ends once everything is safely written.

    With --interval the program runs on, and DIR gets an image so often: 0001, 0002 and so on, each of
    what has changed since the one before. This goes on until the program ends, or you press ^C.
    """
    if keep is not None and interval_s is None:
        raise RequestError("--keep is for --interval", remedy="say how often, as with --interval 30s")
    if interval_s is not None:
        _series(pid, directory, interval_s, keep, tcp_close=tcp_close)
        return
    from godwit import api

    with showing(f"pid {pid} to {directory}") as progress:
        report = api.checkpoint(
            pid, directory, leave_running=leave_running, tcp_close=tcp_close, progress=progress
        )
    show_report(report, moved=False)


def _series(pid: int, directory: Path, interval_s: float, keep: int | None, *, tcp_close: bool) -> None:
    from godwit import api
    from godwit.migrate import series

    ended = api.checkpoint_series(
        pid,
        directory,
        interval_s=interval_s,
        keep=series.KEEP if keep is None else keep,
        tcp_close=tcp_close,
        made=show_image,
    )
    _show_end(pid, directory, ended)


def _show_end(pid: int, directory: Path, ended: Ended) -> None:
    if settings().as_json:
        say_json({"ended": ended})
        return
    why = f"pid {pid} has ended" if ended.program_ended else f"interrupted; pid {pid} runs on"
    say(f"{why}; {counted(ended.images, 'image')}, the newest is {directory / ended.newest}")
