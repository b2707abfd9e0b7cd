"""How far a stream is, as a value that can go to another machine."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from godwit.wire.linkframes import ProtocolError

WINDOW_BYTES: Final = 256 << 10
WINDOW_LIMIT_BYTES: Final = 4 << 20


class Flow(enum.StrEnum):
    """How far one direction is."""

    OPEN = "open"
    ENDING = "ending"  # EOF was said; going out: CLOSED is awaited, coming in: the rest is being delivered
    BROKEN = "broken"  # coming in: nobody reads, CLOSED was said, EOF is awaited
    OVER = "over"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """A stream's end that stands still, to go on elsewhere."""

    stream_id: int
    window_bytes: int
    going_out: Flow
    coming_in: Flow
    credit_bytes: int  # how much may still be sent
    owed_bytes: int  # delivered, and not yet told by CREDIT
    undelivered: bytes

    @property
    def shut(self) -> bool:
        """Whether nothing is to be read or written any more: only last words are awaited."""
        return self.going_out is not Flow.OPEN and self.coming_in in (Flow.BROKEN, Flow.OVER)

    def check(self) -> None:
        """Raise ProtocolError unless this can be the state of a stream."""
        sizes = (self.credit_bytes, self.owed_bytes + len(self.undelivered))
        if (
            not 0 < self.window_bytes <= WINDOW_LIMIT_BYTES
            or not 0 <= self.stream_id < 1 << 32
            or not all(0 <= size <= self.window_bytes for size in (*sizes, self.owed_bytes))
            or self.going_out is Flow.BROKEN
        ):
            raise ProtocolError(f"the state of stream {self.stream_id} has impossible numbers")
