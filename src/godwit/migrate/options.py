"""What the user asked of a move."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from godwit.migrate.convergence import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to move."""

    strategy: Strategy = Strategy.AUTO
    max_freeze_s: float | None = None  # kept, or the move is undone
    timeout_s: float | None = None  # undo the move if it is not committed by then
    bandwidth_bytes_per_s: float | None = None  # for memory
    connections: int | None = None  # for memory; None: as cores allow
    tcp_close: bool = False  # TCP connections may break: the program finds them reset
    home: bool = False  # its files, pids and parent stay here, and are reached
    trace: Path | None = None  # where to write the timeline
