"""One move, as its source sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from godwit.engine import view
from godwit.errors import MigrationError, Survivor
from godwit.migrate.apart import Line
from godwit.migrate.carried import CarriedFile
from godwit.migrate.channel import Channel
from godwit.migrate.entries import DrainedEntry
from godwit.migrate.options import Options
from godwit.migrate.patience import LOOK_EVERY_S, Patience
from godwit.migrate.report import ProgressEvent, Stopwatch
from godwit.migrate.timeline import DISABLED, Timeline, Track
from godwit.resources.outline import DemandEntry, OutlineEntry
from godwit.resources.process import MachineEntry
from godwit.types import Pid

if TYPE_CHECKING:
    from godwit.migrate.copying import Copying
    from godwit.migrate.pageserver import Left

ROLE: Final = "source"
# What of the destination's features we know how to use.
ROUNDS: Final = "rounds"
PACKING: Final = "packing"
LANES: Final = "lanes"
POSTCOPY: Final = "postcopy"


@dataclass(slots=True)
class Move:
    """One move under way at its source."""

    pid: Pid
    host: str
    connect: Callable[[], Channel]
    line: Line[Any]
    migration: str
    options: Options
    watch: Stopwatch
    memory: view.Memory
    deadline: float | None = None
    timeline: Timeline = DISABLED
    machine: MachineEntry | None = None
    destination: str = ""
    features: frozenset[str] = frozenset()  # of the destination
    cpus_there: int = 1
    greeted_ns: int = 0  # when the destination's greeting came
    told: tuple[OutlineEntry, DemandEntry] | None = None  # what the destination is prepared for
    copying: Copying | None = None
    in_rounds: bool = False
    strategy: str = "stopcopy"  # as it came out
    rounds: int = 1
    pages: int = 0
    patience: Patience | None = None
    frozen_at: float = 0.0  # 0: not frozen
    freeze_ms: float = 0.0
    committed: bool = False  # whatever fails now, the copy here may not be the one that runs
    away: bool = False  # it runs elsewhere, and its home is here
    armed: bool = False  # the destination can take pages when the tree runs already
    left: dict[int, Left] = field(default_factory=dict[int, "Left"])  # what follows, by index of the process
    drained: DrainedEntry = field(default_factory=DrainedEntry)
    offered: frozenset[tuple[int, int]] = frozenset()  # written files that the destination knows of
    carried: list[CarriedFile] = field(default_factory=list[CarriedFile])

    @classmethod
    def begin(
        cls,
        pid: Pid,
        host: str,
        connect: Callable[[], Channel],
        line: Line[Any],
        migration: str,
        options: Options,
    ) -> Move:
        """Return a move of which nothing has been done yet."""
        noted = DISABLED if options.trace is None else Timeline(migration)
        deadline = None if options.timeout_s is None else time.monotonic() + options.timeout_s
        return cls(
            pid,
            host,
            connect,
            line,
            migration,
            options,
            Stopwatch(),
            view.of_mover(closes_connections=options.tcp_close),
            deadline,
            noted,
        )

    def lap(self, name: str) -> None:
        """End a step of the source."""
        began_ns = self.watch.last_ns
        self.watch.lap(name)
        self.timeline.span(name, Track.SOURCE, began_ns, self.watch.last_ns)

    def add_steps(self, steps: tuple[tuple[str, float], ...]) -> None:
        """Take over the steps that the destination has just told of: the last one ended about now."""
        self.watch.steps += [(f"destination {name}", ms) for name, ms in steps]
        end_ns = time.monotonic_ns()
        for name, ms in reversed(steps):
            length_ns = int(ms * 1e6)
            self.timeline.add_remote(name, -length_ns, length_ns, end_ns)
            end_ns -= length_ns

    def tell(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Tell who asked for the move where it stands."""
        self.line.progress(ProgressEvent(stage=stage, done_bytes=done, total_bytes=total))

    def tell_round(
        self, number: int, done: int, total: int, expected: tuple[float | None, float | None]
    ) -> None:
        """Tell how far a round is; `expected` are the seconds left and those of a freeze."""
        eta_s, freeze_s = expected
        self.line.progress(
            ProgressEvent(
                stage="round",
                done_bytes=done,
                total_bytes=max(done, total),
                round=number,
                eta_s=eta_s,
                freeze_s=freeze_s,
            )
        )

    def begin_freeze(self) -> None:
        """Note that the program stops now."""
        self.frozen_at = time.monotonic()
        self.watch.lap("rounds" if self.in_rounds else "waiting")
        if self.patience is not None and self.options.max_freeze_s is not None:
            self.patience.look_every_s = min(LOOK_EVERY_S, self.options.max_freeze_s / 4)

    def end_freeze(self) -> None:
        """Note that the program runs again."""
        now_ns = time.monotonic_ns()
        self.freeze_ms = now_ns / 1e6 - self.frozen_at * 1000
        if not self.left:
            self.timeline.frozen(now_ns - int(self.freeze_ms * 1e6), now_ns)

    def lengthen_freeze(self, ms: float) -> None:
        """Add what the destination took until its last thread ran, after it had said so."""
        self.freeze_ms += ms
        began_ns = int(self.frozen_at * 1e9)
        self.timeline.frozen(began_ns, began_ns + int(self.freeze_ms * 1e6))

    def check(self) -> None:
        """Raise if the user gave up or the time is over. Before the commit only."""
        self.line.give_up_if_cancelled()
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise MigrationError(
                "the move took longer than allowed and was undone",
                survivor=Survivor.SOURCE,
                remedy="allow more with --timeout",
            )

    def check_all(self) -> None:
        """Raise if the user gave up, the time is over, or a freeze under way has lasted too long."""
        self.check()
        if self.frozen_at and not self.freeze_ms:
            self.check_freeze()

    def check_freeze(self, to_come_s: float = 0.0) -> None:
        """Raise if the freeze has lasted longer than allowed, or will with what is still to come."""
        limit_s = self.options.max_freeze_s
        lasted_s = time.monotonic() - self.frozen_at + to_come_s
        if limit_s is not None and lasted_s > limit_s:
            raise MigrationError(
                f"the freeze would have lasted more than {limit_s * 1000:.0f} ms and was undone after"
                f" {lasted_s * 1000:.1f} ms",
                survivor=Survivor.SOURCE,
                remedy="allow a longer one with --max-freeze, or try again when the machines are less busy",
            )
