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
    "round": "copying",
    "freeze": "frozen",
    "pages": "memory",
    "ready": "verifying",
    "commit": "committing",
    "drain": "following",
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


def _name(event: ProgressEvent) -> str:
    stage = STAGES.get(event.stage, event.stage)
    return f"{stage} {event.round}" if event.round else stage


def _details(event: ProgressEvent) -> list[str]:
    """Say what else is known: how long it will take, and for how long the program would be stopped now."""
    words: list[str] = []
    if event.eta_s is not None:
        words.append(f"{event.eta_s:.1f} s left")
    if event.freeze_s is not None:
        words.append(f"freeze {event.freeze_s * 1000:.0f} ms")
    if event.message:
        words.append(printable(event.message))
    return words


class _Lines:
    """A line for each stage, and one for each quarter of the memory."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._last = ("", 0, -1)

    def take(self, event: ProgressEvent) -> None:
        quarter = event.done_bytes * 4 // event.total_bytes if event.total_bytes else 0
        key = (event.stage, event.round, quarter)
        if key == self._last:
            return
        self._last = key
        words = [f"{self._title}: {_name(event)}"]
        if event.total_bytes:
            words.append(f"{amount(event.done_bytes)} of {amount(event.total_bytes)}")
        words += _details(event)
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
        stage = " ".join([_name(event), *_details(event)])
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
