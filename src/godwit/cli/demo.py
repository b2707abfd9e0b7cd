"""`godwit demo`: a program flies before your eyes, and then proves that it did not notice."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, Self

import click

from godwit.cli.output import amount, common_options, examples, say, say_json, settings, table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from godwit.lab.demo import Hop, Moment
    from godwit.lab.proof import Proof

_FRAME_S = 0.05
_RATE_OVER_S = 1.0
_LEG = 13  # characters between two nodes
UNPROVEN = 1


@click.command(
    epilog=examples(
        "godwit demo",
        "godwit demo --lines 2000     stay longer on each node",
        "godwit demo --json | jq '.hops[].freeze_ms'",
    )
)
@click.option(
    "--lines",
    default=250,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many lines the program writes on each node before it flies on.",
)
@common_options
def demo(lines: int) -> int:
    """Watch a running program fly between three machines.

    Makes a lab of three nodes on this computer and starts a program on the first: numpy in two threads,
    a child on a pipe, and a log to which it appends a numbered line every few milliseconds. It flies
    a -> b -> c -> a. Then its log and its checksums are examined: was anything lost, doubled, reordered or
    computed wrongly? Everything is removed again. Needs root.

    Exit status: 0 when it is proven that nothing was, 1 when not, and as everywhere when a move fails.
    """
    from godwit.lab.demo import Demo

    # So that a `kill` unwinds the blocks below, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with _view() as view, Demo.up(view.show) as flight:
        view.begin(flight.now)
        proof = flight.run(lines)
    _show(flight.now, proof)
    return UNPROVEN if proof.faults else 0


class _View(Protocol):
    def begin(self, now: Moment) -> None:
        """Show what is about to happen."""

    def show(self, now: Moment) -> None:
        """Show how things stand."""


@contextlib.contextmanager
def _view() -> Iterator[_View]:
    if settings().silent:
        yield _Nothing()
    elif sys.stdout.isatty():
        with _Live() as live:
            yield live
    else:
        yield _Lines()


class _Nothing:
    def begin(self, now: Moment) -> None:
        pass

    def show(self, now: Moment) -> None:
        pass


def _introduction(now: Moment) -> list[str]:
    what = (
        "a numpy program" if now.program == "numpy" else "a program with a plain array (numpy is not there)"
    )
    return [
        f"Three machines on this computer: a, b and c. On a runs {what}:",
        "two threads that compute, a child on a pipe, and a log that grows every few milliseconds.",
    ]


class _Lines:
    """For a file or a pipe: a line for each thing that happens."""

    def __init__(self) -> None:
        self._told = ("", "")
        self._hops = 0

    def begin(self, now: Moment) -> None:
        for line in _introduction(now):
            say(line)

    def show(self, now: Moment) -> None:
        for hop in now.hops[self._hops :]:
            report = hop.report
            say(f"  {report.source} -> {report.destination}: frozen {report.freeze_ms:.1f} ms")
        self._hops = len(now.hops)
        if self._told != (now.node, now.towards or ""):
            self._told = (now.node, now.towards or "")
            where = f"flies to {now.towards}" if now.towards else f"is on node {now.node} as pid {now.pid}"
            say(f"line {now.line}: the program {where}")


class _Live:
    """For a terminal: the map, the line number as it grows, the hops so far."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._drawn = 0.0
        self._recent: deque[tuple[float, int]] = deque()
        self._left = 0.0  # when it took off

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def begin(self, now: Moment) -> None:
        for line in _introduction(now):
            self._console.print(line, highlight=False)
        self._console.print()

    def show(self, now: Moment) -> None:
        moment_s = time.monotonic()
        if moment_s - self._drawn < _FRAME_S:
            return
        self._drawn = moment_s
        if now.towards is None:
            self._left = moment_s
        self._recent.append((moment_s, now.line))
        while moment_s - self._recent[0][0] > _RATE_OVER_S:
            self._recent.popleft()
        self._live.update(self._picture(now, moment_s), refresh=True)

    def _picture(self, now: Moment, moment_s: float) -> Group:
        from rich.console import Group
        from rich.text import Text

        where = f"flying to {now.towards}" if now.towards else f"on node {now.node}, pid {now.pid}"
        first_s, first = self._recent[0]
        rate = (now.line - first) / (moment_s - first_s) if moment_s > first_s else 0.0
        status = Text.assemble(
            "  line ", (f"{now.line:>7,}", "bold green"), f"   {rate:4.0f} lines/s   ", (where, "bold")
        )
        hops = [Text("  " + _hop_words(hop), style="dim") for hop in now.hops]
        return Group(_map(now, moment_s - self._left), Text(), status, Text(), *hops)


def _map(now: Moment, airborne_s: float) -> Text:
    """Draw the nodes in a row, and the program on one of them or between two."""
    from rich.text import Text

    names = ("a", "b", "c")
    width = 5 + _LEG
    path = Text("─" * _LEG, style="dim")
    nodes = [Text(f"[ {name} ]", style="bold" if name == now.node else "cyan") for name in names]
    picture = Text("  ") + path.join(nodes)
    place = names.index(now.node) * width + 2
    bird = "●"
    if now.towards is not None:
        target = names.index(now.towards) * width + 2
        # Nobody knows how long it takes: it comes nearer and nearer.
        share = airborne_s / (airborne_s + 0.4)
        bird = "➤" if target > place else "◀"
        place += round((target - place) * share)
    above = Text("  " + " " * place + bird, style="bold yellow")
    return Text("\n").join([above, picture])


def _hop_words(hop: Hop) -> str:
    report = hop.report
    return (
        f"{report.source} → {report.destination}   frozen {report.freeze_ms:7.1f} ms"
        f"   total {report.total_ms:7.1f} ms   {amount(report.bytes_sent)}"
    )


def _show(now: Moment, proof: Proof) -> None:
    gaps = [proof.longest_gap(hop.first_line, hop.last_line)[0] for hop in now.hops]
    longest_ms, later = proof.longest_gap()
    if settings().as_json:
        _show_json(now, proof, gaps)
        return
    rows = [("hop", "frozen", "total", "sent", "gap in the log")]
    for hop, gap_ms in zip(now.hops, gaps, strict=True):
        report = hop.report
        rows.append(
            (
                f"{report.source} -> {report.destination}",
                f"{report.freeze_ms:.1f} ms",
                f"{report.total_ms:.1f} ms",
                amount(report.bytes_sent),
                f"{gap_ms:.1f} ms",
            )
        )
    for line in table(rows):
        say(line)
    say()
    for fault in proof.faults:
        say(f"  {fault}")
    say(f"The longest time between two lines: {longest_ms:.1f} ms, before line {later}.")
    if proof.faults:
        say(click.style("Not proven: see above.", fg="red", bold=True))
    else:
        words = f"Proven: {proof.lines} lines, none lost, doubled or out of order; every checksum is right."
        say(click.style(words, fg="green", bold=True))


def _show_json(now: Moment, proof: Proof, gaps: list[float]) -> None:
    import msgspec

    longest_ms, later = proof.longest_gap()
    hops = [
        {**msgspec.to_builtins(hop.report), "gap_ms": gap_ms}
        for hop, gap_ms in zip(now.hops, gaps, strict=True)
    ]
    say_json(
        {
            "proven": not proof.faults,
            "program": now.program,
            "lines": proof.lines,
            "longest_gap_ms": longest_ms,
            "longest_gap_before_line": later,
            "faults": list(proof.faults),
            "hops": hops,
        }
    )
