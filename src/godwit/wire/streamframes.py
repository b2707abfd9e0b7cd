"""What the two ends of a stream say on a link's channel. `docs/formats/link.md` is the specification."""

from __future__ import annotations

import enum
import struct
from typing import Final

from godwit.wire.linkframes import ProtocolError

_HEAD: Final = struct.Struct("<BxxxI")
HEAD_BYTES: Final = _HEAD.size
_AMOUNT: Final = struct.Struct("<I")


class StreamWord(enum.IntEnum):
    """What is said of one direction. A number, once released, keeps its meaning."""

    DATA = 1  # its writer's end: bytes
    EOF = 2  # its writer's end: no more will come; its last word
    CREDIT = 3  # its reader's end: so many more bytes may come
    CLOSED = 4  # its reader's end: all was delivered, or nobody reads; its last word


def pack(word: StreamWord, stream_id: int) -> bytes:
    """Return what goes before the bytes of DATA, and is all of EOF and CLOSED."""
    return _HEAD.pack(word, stream_id)


def pack_credit(stream_id: int, amount_bytes: int) -> bytes:
    """Return a CREDIT message."""
    return _HEAD.pack(StreamWord.CREDIT, stream_id) + _AMOUNT.pack(amount_bytes)


def read(payload: memoryview) -> tuple[StreamWord, int, memoryview]:
    """Take a message apart: the word, which stream, and what follows.

    Raises:
        ProtocolError: It is none.
    """
    if len(payload) < HEAD_BYTES:
        raise ProtocolError(f"a message about a stream has {len(payload)} bytes")
    number, stream_id = _HEAD.unpack_from(payload)
    try:
        word = StreamWord(number)
    except ValueError:
        raise ProtocolError(f"a message about a stream has the number {number}") from None
    rest = payload[HEAD_BYTES:]
    if (word is StreamWord.CREDIT and len(rest) != _AMOUNT.size) or (
        word in (StreamWord.EOF, StreamWord.CLOSED) and rest
    ):
        raise ProtocolError(f"{word.name} for stream {stream_id} comes with {len(rest)} bytes")
    return word, stream_id, rest


def read_credit(rest: memoryview) -> int:
    """Return the amount of a CREDIT message, in bytes."""
    amount: int = _AMOUNT.unpack(rest)[0]
    return amount
