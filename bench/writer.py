"""Programs under random writes that note from inside how long they stood still: `writer_c` of the tests."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.place import Flyer, Place
from godwit.api import Report
from tests.workloads.driver import WORKLOADS, Running

# The verifier's pause. A gap is noted from a millisecond on, so it is known to within the pause.
TICK_US = 250
GAP_MS = 1
_WORKLOAD = WORKLOADS["writer_c"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a program holds and does."""

    mib: int
    rate: int = 0  # MiB written in a second, at random places, whole pages
    threads: int = 2  # that write, beside the one that looks on
    checks: int = 4  # pages, anywhere in the array, that it reads at each tick

    @property
    def busy(self) -> bool:
        """Whether it keeps a processor so busy that a quiet moment never comes."""
        return self.rate > 200

    def words(self) -> list[str]:
        """Return the options of `writer_c`."""
        numbers = {
            "mib": self.mib,
            "rate": self.rate,
            "threads": self.threads,
            "checks": self.checks,
            "tick_us": TICK_US,
            "gap_ms": GAP_MS,
        }
        return [f"{name}={number}" for name, number in numbers.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A move, from outside and from inside."""

    report: Report
    gap_ms: float  # the longest time between two ticks of the program, from the command's start to its end


class Writer:
    """A writer that flies. At the end it has to acquit: a move that spoils memory is no measurement."""

    def __init__(self, flyer: Flyer, running: Running, load: Load) -> None:
        self.flyer = flyer
        self._running = running
        self._load = load

    @classmethod
    @contextlib.contextmanager
    def start(cls, place: Place, load: Load) -> Iterator[Self]:
        """Start it in node a and yield it once its array is filled."""
        shared = place.lab.shared
        if not (shared / "writer_c").exists():
            shutil.copy(_WORKLOAD.build(), shared / "writer_c")
        directory = Path(tempfile.mkdtemp(prefix="writer-", dir=shared))
        argv = ["/shared/writer_c", f"/shared/{directory.name}", *load.words()]

        def ready(text: str) -> bool:
            if text:
                raise RuntimeError(f"the program says: {text}")
            return has_begun(directory)

        with Flyer(place, argv, ready) as flyer:
            made = cls(flyer, Running(_WORKLOAD, directory, None), load)
            yield made
            acquitted(made._running)

    def hop(self, strategy: str, **options: float) -> Flight:
        """Move it to the other node."""
        before_ns = time.time_ns()
        report = self.flyer.hop(strategy, quietly=not self._load.busy, **options)
        return Flight(report=report, gap_ms=longest_gap_ms(self._running.dir, before_ns, time.time_ns()))


def has_begun(directory: Path) -> bool:
    """Tell whether a writer has filled its array."""
    status = directory / "status"
    return status.exists() and status.stat().st_size > 0


def acquitted(running: Running) -> None:
    """End a writer. Raises RuntimeError when it has noticed something."""
    verdict = running.finish()
    if not verdict.ok:
        raise RuntimeError(f"the program that was moved says: {verdict.text}")


def longest_gap_ms(directory: Path, since_ns: int, until_ns: int) -> float:
    """Return the longest gap that a writer noted and that lies partly in that time; at least GAP_MS."""
    longest_ns = GAP_MS * 1_000_000
    for line in (directory / "gaps").read_text().splitlines():
        begin_ns, end_ns = (int(word) for word in line.split())
        if end_ns > since_ns and begin_ns < until_ns:
            longest_ns = max(longest_ns, end_ns - begin_ns)
    return longest_ns / 1e6
