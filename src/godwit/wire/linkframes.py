"""The bytes of a link between home and host. `docs/formats/link.md` is the specification.

A connection begins with one greeting in each direction; then come frames. Little-endian throughout.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from godwit.errors import ImageError

MAGIC: Final = b"GODWLINK"
FORMAT: Final = 1
JOB_BYTES: Final = 16
_GREETING: Final = struct.Struct("<8sHBx16sQQ")
GREETING_BYTES: Final = _GREETING.size
_HEADER: Final = struct.Struct("<IIQ")
HEADER_BYTES: Final = _HEADER.size

PAYLOAD_LIMIT_BYTES: Final = (1 << 20) + (64 << 10)
OWN_CHANNEL: Final = 0  # the link's own: nothing but a count
COUNT_LIMIT: Final = 1 << 63

pack_header: Final = _HEADER.pack
"""Return the header of a frame, from its length, its channel and the count of messages received."""


class ProtocolError(ImageError):
    """The peer of a link says what it must not; the link has ended."""


class Side(enum.IntEnum):
    """Which end of a link. A number, once released, keeps its meaning."""

    HOME = 1
    HOST = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """The first word on a connection."""

    side: Side  # who says it
    job: bytes
    epoch: int  # how often the job has moved, as far as this side knows
    received: int  # messages, since the link began


def pack_greeting(greeting: Greeting) -> bytes:
    """Return the bytes of a greeting."""
    return _GREETING.pack(MAGIC, FORMAT, greeting.side, greeting.job, greeting.epoch, greeting.received)


def read_greeting(raw: bytes | bytearray | memoryview) -> Greeting:
    """Take a greeting of GREETING_BYTES apart.

    Raises:
        ProtocolError: It is none, or of a format that we do not know.
    """
    magic, version, side, job, epoch, received = _GREETING.unpack(raw)
    if magic != MAGIC:
        raise ProtocolError("the connection does not begin as a link does")
    if version != FORMAT:
        raise ProtocolError(f"the peer's link has format {version}; this Godwit has {FORMAT}")
    if side not in (Side.HOME, Side.HOST) or epoch >= COUNT_LIMIT or received >= COUNT_LIMIT:
        raise ProtocolError(f"an impossible greeting: side {side}, epoch {epoch}, {received} received")
    return Greeting(side=Side(side), job=job, epoch=epoch, received=received)


def read_header(raw: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int, int]:
    """Take the header at `offset` apart: length of the payload, channel, count of messages received.

    Raises:
        ProtocolError: A payload longer than any may be, or one on the link's own channel.
    """
    length, channel, received = _HEADER.unpack_from(raw, offset)
    if length > PAYLOAD_LIMIT_BYTES or (channel == OWN_CHANNEL and length):
        raise ProtocolError(f"the peer announces {length} bytes on channel {channel}")
    return length, channel, received
