"""One move, as its source sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from godwit.engine import view
from godwit.errors import MigrationError, Survivor
from godwit.migrate.apart import Line
from godwit.migrate.carried import CarriedFile
from godwit.migrate.channel import Channel
from godwit.migrate.report import ProgressEvent, Stopwatch
from godwit.resources.process import MachineEntry
from godwit.types import Pid

ROLE: Final = "source"


@dataclass(slots=True)
class Move:
    """One move under way at its source."""

    pid: Pid
    host: str
    connect: Callable[[], Channel]
    line: Line[Any]
    deadline: float | None
    migration: str
    watch: Stopwatch
    memory: view.Memory
    machine: MachineEntry | None = None
    destination: str = ""
    pages: int = 0
    frozen_at: float = 0.0
    buffer: bytearray = field(default_factory=bytearray)
    offered: frozenset[tuple[int, int]] = frozenset()  # written files that the destination knows of
    carried: list[CarriedFile] = field(default_factory=list[CarriedFile])

    def tell(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Tell who asked for the move where it stands."""
        self.line.progress(ProgressEvent(stage=stage, done_bytes=done, total_bytes=total))

    def begin_freeze(self) -> None:
        """Note that the program stops now."""
        self.frozen_at = time.monotonic()

    def check(self) -> None:
        """Raise if the user gave up or the time is over. Before the commit only."""
        self.line.give_up_if_cancelled()
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise MigrationError(
                "the move took longer than allowed and was undone",
                survivor=Survivor.SOURCE,
                remedy="allow more with --timeout",
            )
