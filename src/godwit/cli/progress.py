"""How far a move is: a live bar on a terminal, plain lines elsewhere, nothing for programs."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

import click

from godwit.cli.output import amount, printable, settings

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from godwit.migrate.report import Progress, ProgressEvent

# Drawing takes milliseconds, in the very thread that holds the program still. Ten frames a second are
# enough, and a program that is frozen for less than that is never held up by one.
_FRAME_S = 0.1

STAGES = {
    "inspect": "looking",
    "plan": "planning",
    "spawn": "preparing",
    "freeze": "frozen",
    "pages": "memory",
    "ready": "verifying",
    "commit": "committing",
    "done": "done",
}


@contextlib.contextmanager
def showing(title: str) -> Iterator[Progress]:
    """Show the events that the caller passes on, as it suits standard error and the options."""
    if settings().silent:
        yield _nothing
    elif sys.stderr.isatty():
        with _Live(title) as live:
            yield live.take
    else:
        yield _Lines(title).take


def _nothing(event: ProgressEvent) -> None:
    del event


class _Lines:
    """A line for each stage, and one for each quarter of the memory."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._last = ("", -1)

    def take(self, event: ProgressEvent) -> None:
        quarter = event.done_bytes * 4 // event.total_bytes if event.total_bytes else 0
        if (event.stage, quarter) == self._last:
            return
        self._last = (event.stage, quarter)
        words = [f"{self._title}: {STAGES.get(event.stage, event.stage)}"]
        if event.total_bytes:
            words.append(f"{amount(event.done_bytes)} of {amount(event.total_bytes)}")
        if event.message:
            words.append(printable(event.message))
        click.echo(", ".join(words), err=True)


class _Live:
    """A bar with rate and remaining time that disappears at the end."""

    def __init__(self, title: str) -> None:
        self._bar = _make_bar()
        self._task = self._bar.add_task("starting", total=None, title=printable(title))
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def take(self, event: ProgressEvent) -> None:
        stage = STAGES.get(event.stage, event.stage)
        self._bar.update(
            self._task, description=stage, total=event.total_bytes or None, completed=event.done_bytes
        )
        now = time.monotonic()
        if now - self._drawn >= _FRAME_S:
            self._bar.refresh()
            self._drawn = time.monotonic()


def _make_bar() -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.fields[title]}", markup=False),
        TextColumn("[cyan]{task.description:<10}"),
        BarColumn(bar_width=30),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )
