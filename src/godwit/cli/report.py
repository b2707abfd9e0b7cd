"""How the report of a move or a checkpoint is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from godwit.cli.output import amount, counted, say, say_json, settings, table

if TYPE_CHECKING:
    from godwit.migrate.report import Report
    from godwit.migrate.series import Image


def show_report(report: Report, *, moved: bool) -> None:
    """Print a report, as JSON or as a table.

    Args:
        report: What happened.
        moved: It was a move; otherwise a checkpoint, after which the question where it runs makes no sense.
    """
    if settings().as_json:
        say_json(report)
        return
    tree = f"{counted(report.processes, 'process', 'es')}, {counted(report.threads, 'thread')}"
    carried = f"{counted(report.pages, 'page')}, {counted(report.rounds, 'round')}"
    rows = [
        ("from", report.source),
        ("to", report.destination),
        ("pid", f"{report.pid} ({tree})"),
        ("frozen", f"{report.freeze_ms:.1f} ms"),
        ("total", f"{report.total_ms:.1f} ms"),
        ("sent", f"{amount(report.bytes_sent)}, {carried}"),
        ("strategy", report.strategy),
    ]
    if moved:
        rows.append(("runs at", report.survivor))
    for line in table(rows):
        say(line)


def show_image(image: Image) -> None:
    """Print a line about an image of a series."""
    report = image.report
    if settings().as_json:
        from msgspec import to_builtins

        say_json({"image": image.image, "goes_on_from": image.goes_on_from, **to_builtins(report)})
        return
    on = f"goes on from {image.goes_on_from}" if image.goes_on_from else "whole"
    say(
        f"{image.image}: {amount(report.bytes_sent)}, {counted(report.pages, 'page')}, {on};"
        f" frozen {report.freeze_ms:.1f} ms, {report.total_ms:.0f} ms in all"
    )
