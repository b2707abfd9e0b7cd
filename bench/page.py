"""The results as JSON and as a page."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.numbers import Growth, Missing, Result

_HEAD: Final = """\
# Benchmarks

Written by `make bench`; do not edit. `make bench BENCH=--quick` takes a few minutes and leaves this page
alone; `BENCH=--help` tells of other ways. Moves are between two nodes of a laboratory on one machine, so
both ends and the program that is moved share its processors. Limits are what the machine itself needs for
the same thing, measured in the same run. A number is a median; where it is held to something, that stands
beside it.

*Freeze* is what the report says: from the first thread stopped at the source to the last thread running at
the destination. *Longest gap seen inside* is what the program noted itself: a thread of it ticks every
quarter of a millisecond and reads pages anywhere in its memory. Between two ticks it has seen nothing, for
whatever reason; the longest such time counts, from the start of the command to its end. *auto* and *hybrid*
are values of `--strategy`. These programs write whole pages at random, as many as their row says, of bytes
that do not pack. Rows that name no strategy are stop-and-copy.

"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where it was measured."""

    kernel: str
    processor: str
    processors: int
    python: str
    load_before: float  # of others, one minute's average
    load_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything that was measured in one run."""

    machine: Machine
    results: tuple[Result, ...]
    growths: tuple[Growth, ...]
    missing: tuple[Missing, ...] = ()


def machine(load_before: float) -> Machine:
    """Describe this machine."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = re.findall(r"(?:model name|CPU part)\s*: (.*)", file.read())
    return Machine(
        kernel=platform.release(),
        processor=names[0] if names else platform.machine(),
        processors=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        load_before=round(load_before, 2),
        load_after=round(os.getloadavg()[0], 2),
    )


def text(page: Page, picture: str) -> str:
    """Return the page in Markdown, with a picture that lies beside it."""
    here = page.machine
    about = f"Linux {here.kernel}, {here.processors} processors ({here.processor}), Python {here.python}."
    load = f"Load average: {here.load_before} before, {here.load_after} after."
    lines = [about, load, ""]
    asked = [each for each in page.results if each.target is not None]
    if asked:
        met = sum(each.target.met for each in asked if each.target is not None)
        lines += [f"![{met} of {len(asked)} targets are met]({picture})", "", "## What was asked", ""]
        header = ["what", "measured", "asked", "unit", ""]
        lines += [*_table(header, [_asked_row(each) for each in asked]), ""]
    header = ["what", "median", "lowest", "highest", "unit", "runs", "target", ""]
    lines += ["## All of it", "", *_table(header, [_row(each) for each in page.results])]
    notes = [f"- *{each.name}*: {each.note}." for each in page.results if each.note]
    notes += [f"- *{each.name}* was not measured: {each.why}." for each in page.missing]
    lines += ["", *notes, ""]
    if not page.growths:
        return _HEAD + "\n".join(lines)
    lines += ["## What one more costs", "", _GROWTH, ""]
    header = ["of what", "numbers", "median freeze, ms", "µs for each", "between the last two"]
    lines += _table(header, [_growth_row(each) for each in page.growths])
    return _HEAD + "\n".join(lines) + "\n"


_GROWTH: Final = """\
The freeze of a small C program that has so many of one thing, and what one more adds to it. Where the last
column is above the one before, the cost grows faster than the number."""


def _row(each: Result) -> list[str]:
    sample = each.sample
    cells = [each.name, *(_short(value) for value in (sample.median, sample.lowest, sample.highest))]
    cells += [sample.unit, str(sample.runs)]
    if each.target is None:
        return [*cells, "", ""]
    return [*cells, f"≤ {_short(each.target.limit)}", "met" if each.target.met else "**missed**"]


def _asked_row(each: Result) -> list[str]:
    assert each.target is not None
    numbers = [_short(each.sample.median), f"≤ {_short(each.target.limit)}"]
    return [each.name, *numbers, each.sample.unit, "met" if each.target.met else "**missed**"]


def _growth_row(each: Growth) -> list[str]:
    numbers = " / ".join(str(count) for count in each.counts)
    freezes = " / ".join(_short(sample.median) for sample in each.samples)
    return [each.name, numbers, freezes, _short(each.each_us), _short(each.last_each_us)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
