"""What a move tells: while it goes on, and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """Where a move stands."""

    stage: str  # inspect, plan, spawn, round, freeze, pages, ready, commit, drain, done
    done_bytes: int = 0
    total_bytes: int = 0
    message: str = ""
    round: int = 0  # of pre-copy, from 1
    eta_s: float | None = None  # until all is sent
    freeze_s: float | None = None  # how long a freeze would last now


Progress = Callable[[ProgressEvent], None]


def silent(event: ProgressEvent) -> None:
    """Show nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a finished move, checkpoint or restore tells. `docs/formats/json.md`."""

    migration: str
    strategy: str
    freeze_ms: float  # first thread stopped at the source to last thread running at the destination
    total_ms: float
    bytes_sent: int
    pages: int
    rounds: int
    source: str
    destination: str
    pid: int  # of the root, as the destination sees it
    survivor: str
    processes: int
    threads: int
    faults: int = 0  # pages that the program waited for at the destination
    fault_median_us: float = 0.0  # how long
    fault_p99_us: float = 0.0
    steps: tuple[tuple[str, float], ...] = ()  # name, ms


@dataclass(slots=True)
class Stopwatch:
    """Notes how long each step took."""

    started_ns: int = field(default_factory=time.monotonic_ns)
    steps: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    last_ns: int = field(default_factory=time.monotonic_ns)

    def lap(self, name: str) -> float:
        """End a step; return its ms."""
        now = time.monotonic_ns()
        elapsed_ms = (now - self.last_ns) / 1e6
        self.last_ns = now
        self.steps.append((name, round(elapsed_ms, 3)))
        return elapsed_ms

    def total_ms(self) -> float:
        """Return the time since the start."""
        return (time.monotonic_ns() - self.started_ns) / 1e6
