"""How the report of a move or a checkpoint is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from godwit.cli.output import amount, counted, say, say_json, settings, table

if TYPE_CHECKING:
    from godwit.migrate.report import Report


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
