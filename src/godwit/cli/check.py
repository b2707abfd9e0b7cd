"""`godwit check`: every holding of a process, and what a move would do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from godwit.cli.output import (
    PID,
    common_options,
    examples,
    printable,
    say,
    say_json,
    settings,
    table,
    tcp_close_option,
)

if TYPE_CHECKING:
    from godwit.engine.plan import Plan
    from godwit.resources.base import Finding

MEANINGS = {
    "refuse": "stands in the way",
    "reach": "stays here, and is used over the network",
    "rebind": "the destination's own takes its place",
    "move": "goes along",
}
COLOURS = {"refuse": "red", "reach": "yellow", "rebind": "cyan", "move": "green"}
CANNOT_MOVE = 3  # as RefusedError


@click.command(
    epilog=examples(
        "godwit check 4711",
        "godwit check 4711 --to alice@other",
        "godwit check 4711 --json | jq -r '.findings[] | select(.disposition == \"refuse\") | .remedy'",
    )
)
@click.argument("pid", type=PID)
@click.option("--to", "host", metavar="HOST", help="Ask this destination as well: a HOST as for `migrate`.")
@tcp_close_option
@common_options
def check(pid: int, host: str | None, tcp_close: bool) -> int:
    """Say whether process PID can move, and why not.

    Lists everything PID and its descendants hold, with what becomes of it: move, rebind, reach or
    refuse. The process runs on untouched. What check refuses migrate refuses, with the same words.

    Exit status: 0 when it can move, 3 when not.
    """
    from godwit import api

    plan = api.inspect(pid, to=host, tcp_close=tcp_close)
    if settings().as_json:
        say_json(
            {
                "pid": plan.pid,
                "movable": plan.movable,
                "findings": [_fields(finding) for finding in plan.findings],
            }
        )
    else:
        _show(plan, host)
    return 0 if plan.movable else CANNOT_MOVE


def _fields(finding: Finding) -> dict[str, str]:
    return {
        "disposition": finding.disposition.value,
        "what": printable(finding.what),
        "where": printable(finding.where),
        "why": printable(finding.why),
        "remedy": printable(finding.remedy),
    }


def _show(plan: Plan, host: str | None) -> None:
    name = f"pid {plan.pid} ({printable(plan.comm)})"
    target = f" to {printable(host)}" if host else ""
    groups = {
        disposition: [finding for finding in plan.findings if finding.disposition.value == disposition]
        for disposition in MEANINGS
    }
    for disposition, findings in groups.items():
        if not findings:
            continue
        heading = click.style(f"{disposition} ({len(findings)})", fg=COLOURS[disposition], bold=True)
        say(f"{heading}: {MEANINGS[disposition]}")
        for line in _in_full(findings) if disposition == "refuse" else _in_rows(findings):
            say(line)
        say()
    refused = len(groups["refuse"])
    verdict = f"cannot move{target}: {refused} refused" if not plan.movable else f"can move{target}"
    say(f"{name} {click.style(verdict, fg='green' if plan.movable else 'red', bold=True)}")


def _in_full(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield f"  {printable(finding.where)}: {printable(finding.what)}"
        yield f"      why     {printable(finding.why)}"
        if finding.remedy:
            yield f"      remedy  {printable(finding.remedy)}"


def _in_rows(findings: Sequence[Finding]) -> Iterator[str]:
    """Say each reason once, and below it what it goes for."""
    reasons = dict.fromkeys(each.why for each in findings)
    for reason in reasons:
        if reason:
            yield f"  {printable(reason)}:"
        alike = sorted((each for each in findings if each.why == reason), key=_by_number)
        yield from table(((each.where, each.what) for each in alike), indent="    " if reason else "  ")


def _by_number(finding: Finding) -> list[tuple[int, str]]:
    """Order `fd 5` before `fd 10`."""
    words = re.findall(r"\d+|\D+", finding.where)
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in words]
