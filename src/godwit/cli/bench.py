"""`godwit bench`: what a move spent its time on, measured and drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from godwit.cli.output import (
    common_options,
    counted,
    examples,
    printable,
    say,
    say_json,
    settings,
    table,
)
from godwit.errors import RequestError

if TYPE_CHECKING:
    from godwit.migrate.timesummary import Summary

_SUFFIXES = (".svg", ".html")


@click.group(
    epilog=examples(
        "godwit bench plot move.json                       draw it, as move.html",
        "godwit bench plot move.json --output move.svg     as a picture for a page of your own",
        "godwit bench plot move.json --json | jq .freeze_ms",
    )
)
def bench() -> None:
    """What a move spent its time on, drawn and in numbers."""


@bench.command(
    epilog=examples(
        "godwit bench plot move.json",
        "godwit bench plot move.json --output move.svg",
        "godwit bench plot move.json --json | jq '.steps[] | [.name, .ms]'",
    )
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to draw it, replacing what is there: .svg or .html. Without it: FILE's name with .html.",
)
@common_options
def plot(file: Path, output: Path | None) -> None:
    """Draw the timeline of a move that FILE holds.

    The whole move with its rounds and their dirty pages, the freeze enlarged with every step, and the
    latency of page faults. FILE may also be opened in Perfetto or chrome://tracing.
    """
    from godwit.cli import timeplot
    from godwit.migrate import outfile, timeline, timesummary

    target = _target(file, output)
    outfile.check(target)
    recording = timeline.read(file)
    drawn = timeplot.draw(recording) + "\n" if target.suffix == ".svg" else timeplot.page(recording)
    outfile.write(target, drawn.encode())
    summary = timesummary.summarise(recording)
    if settings().as_json:
        _show_json(summary, target)
    elif not settings().quiet:
        _show(summary, target)


def _target(file: Path, output: Path | None) -> Path:
    target = file.with_name(f"{file.stem}.html") if output is None and file.name else output
    if target is None or target.suffix not in _SUFFIXES:
        raise RequestError(f"the picture is .svg or .html, and {target} is neither", remedy="see --output")
    if target.resolve() == file.resolve():
        raise RequestError(f"{target} is the timeline itself", remedy="name another file with --output")
    return target


def _show_json(summary: Summary, target: Path) -> None:
    import msgspec

    shown = replace(
        summary,
        migration=printable(summary.migration),
        strategy=printable(summary.strategy),
        steps=tuple(replace(step, name=printable(step.name)) for step in summary.steps),
    )
    say_json({**msgspec.to_builtins(shown), "output": printable(str(target))})


def _show(summary: Summary, target: Path) -> None:
    frozen = "never" if summary.freeze_ms is None else f"{summary.freeze_ms:.3f} ms"
    rows = [("strategy", summary.strategy), ("total", f"{summary.total_ms:.3f} ms"), ("frozen", frozen)]
    rows += [(f"{'  ' * (step.depth + 1)}{step.name}", f"{step.ms:.3f} ms") for step in summary.steps]
    if summary.freeze_ms is not None:
        rows.append(("  in no step", f"{summary.unnoted_ms:.3f} ms"))
    rows += [
        (
            f"round {each.number}",
            f"{each.ms:.3f} ms, {counted(each.sent_pages, 'page')} sent, {each.dirty_pages:,} dirty",
        )
        for each in summary.rounds
    ]
    if summary.faults.count:
        faults = summary.faults
        told = f"{faults.count:,}, median {faults.median_ms:.3f} ms, p99 {faults.p99_ms:.3f} ms"
        rows.append(("page faults", told))
    if summary.dropped:
        rows.append(("not kept", counted(summary.dropped, "event")))
    rows.append(("drawn", str(target)))
    for line in table(rows):
        say(line)
