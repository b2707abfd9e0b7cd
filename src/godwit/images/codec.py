"""Entries as MessagePack maps, decoded into the declared types and nothing else.

msgspec decodes typed: lengths, nesting and types of hostile input are refused before memory is asked
for.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import msgspec

from godwit.errors import ImageError

Entry = TypeVar("Entry")


def encode(entry: object) -> bytes:
    """Return the bytes of an entry: a dataclass of numbers, bytes, strings, tuples and dataclasses."""
    return msgspec.msgpack.encode(entry)


@functools.cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


def prime(*kinds: Any) -> None:
    """Make the decoders of these types now: the first use of one costs a millisecond."""
    for kind in kinds:
        _decoder(kind)


def decode(raw: bytes | bytearray | memoryview, kind: type[Entry]) -> Entry:
    """Read an entry of the given type.

    Raises:
        ImageError: The bytes are no such entry.
    """
    try:
        entry: Entry = _decoder(kind).decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise ImageError(f"the stream holds a malformed {name}: {error}") from None
    return entry
