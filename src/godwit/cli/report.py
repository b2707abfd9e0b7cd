"""How the report of a move or a checkpoint is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from godwit.cli.output import amount, say, say_json, settings, table

if TYPE_CHECKING:
    from godwit.migrate.report import Report


def show_report(report: Report) -> None:
    """Print a report, as JSON or as a table."""
    if settings().as_json:
        say_json(report)
        return
    rows = [
        ("from", report.source),
        ("to", report.destination),
        ("pid", f"{report.pid} ({report.processes} processes, {report.threads} threads)"),
        ("frozen", f"{report.freeze_ms:.1f} ms"),
        ("total", f"{report.total_ms:.1f} ms"),
        ("sent", f"{amount(report.bytes_sent)}, {report.pages} pages, {report.rounds} rounds"),
        ("strategy", report.strategy),
        ("runs at", str(report.survivor)),
    ]
    for line in table(rows):
        say(line)
