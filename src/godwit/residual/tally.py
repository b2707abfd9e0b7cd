"""What one end of a link has sent and received. Plain data: the link locks around it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from godwit.wire import linkframes
from godwit.wire.linkframes import ProtocolError

_CONFIRM_BYTES: Final = 256 << 10
_CONFIRM_MESSAGES: Final = 64
_MESSAGE_COST_BYTES: Final = 64  # what keeping a message takes besides its bytes
_BATCH_PARTS: Final = 512  # below IOV_MAX
_BATCH_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkState:
    """A quiesced end of a link, to go on elsewhere."""

    job: bytes
    epoch: int
    sent: int  # messages, since the link began; the unconfirmed ones are the last of them
    received: int
    unconfirmed: tuple[tuple[int, bytes], ...]  # channel and payload, oldest first

    def check(self) -> None:
        """Raise ProtocolError unless this can be the state of a link."""
        counts = (self.epoch, self.sent, self.received)
        if len(self.job) != linkframes.JOB_BYTES or not all(0 <= n < linkframes.COUNT_LIMIT for n in counts):
            raise ProtocolError("the state of a link has impossible numbers")
        if len(self.unconfirmed) > self.sent:
            raise ProtocolError("the state of a link keeps more messages than were sent")
        for channel, payload in self.unconfirmed:
            if not 0 < channel < 1 << 32 or len(payload) > linkframes.PAYLOAD_LIMIT_BYTES:
                raise ProtocolError(f"the state of a link keeps {len(payload)} bytes on channel {channel}")


@dataclass(slots=True)
class _Message:
    channel: int
    parts: tuple[bytes, ...]
    length_bytes: int


class Tally:
    """Messages sent, kept in order until they are confirmed, and messages received."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0
        self.held_bytes = 0
        self.word_due = False  # the count is to be told, if there is no message to tell it with
        self._confirmed = 0
        self._received_bytes = 0
        self._told = (0, 0)  # messages and bytes received, when the peer was last told
        self._kept: deque[_Message] = deque()
        self._unwritten: deque[_Message] = deque()

    @classmethod
    def of(cls, state: LinkState) -> Tally:
        """Return the tally of a state. Raises ProtocolError if it cannot be one."""
        state.check()
        tally = cls()
        tally.sent = tally._confirmed = state.sent - len(state.unconfirmed)
        tally.received = state.received
        tally._told = (state.received, 0)
        for channel, payload in state.unconfirmed:
            tally.add(channel, (payload,), len(payload))
        return tally

    def add(self, channel: int, parts: tuple[bytes, ...], length_bytes: int) -> None:
        """Keep a message, to be written and until it is confirmed."""
        message = _Message(channel, parts, length_bytes)
        self._kept.append(message)
        self._unwritten.append(message)
        self.held_bytes += length_bytes + _MESSAGE_COST_BYTES
        self.sent += 1

    @property
    def unwritten(self) -> int:
        """How many messages are to be written."""
        return len(self._unwritten)

    def confirm(self, count: int) -> bool:
        """Let go of what the peer has received by its count; return whether that was anything.

        Raises:
            ProtocolError: It takes back what it confirmed, or confirms what was not sent.
        """
        if not self._confirmed <= count <= self.sent:
            raise ProtocolError(
                f"the peer confirms {count} messages; {self.sent} were sent, {self._confirmed} confirmed"
            )
        fresh = count - self._confirmed
        for _ in range(fresh):
            self.held_bytes -= self._kept.popleft().length_bytes + _MESSAGE_COST_BYTES
        self._confirmed = count
        return fresh > 0

    def receive(self, length_bytes: int) -> None:
        """Count a message of the peer's."""
        self.received += 1
        self._received_bytes += length_bytes

    def note_word_due(self) -> bool:
        """Return whether so much came since the peer was last told that it is time, and note that."""
        messages, length = self._told
        late = (
            self.received - messages >= _CONFIRM_MESSAGES or self._received_bytes - length >= _CONFIRM_BYTES
        )
        self.word_due |= late
        return late

    def rewind(self) -> None:
        """Write everything again that is not confirmed: on a fresh connection both have told their counts."""
        self._unwritten = deque(self._kept)
        self._told = (self.received, self._received_bytes)

    def take(self) -> list[bytes]:
        """Return what is to be written next: messages, a mere word if one is due, or nothing."""
        parts: list[bytes] = []
        length, queue, received = 0, self._unwritten, self.received
        while queue and length < _BATCH_BYTES and len(parts) < _BATCH_PARTS:
            message = queue.popleft()
            parts.append(linkframes.pack_header(message.length_bytes, message.channel, received))
            parts.extend(message.parts)
            length += message.length_bytes
        if self.word_due and not parts:
            parts.append(linkframes.pack_header(0, linkframes.OWN_CHANNEL, received))
        self.word_due = False
        self._told = (received, self._received_bytes)
        return parts

    def state(self, job: bytes, epoch: int) -> LinkState:
        """Put it into words."""
        kept = tuple((each.channel, b"".join(each.parts)) for each in self._kept)
        return LinkState(job=job, epoch=epoch, sent=self.sent, received=self.received, unconfirmed=kept)
