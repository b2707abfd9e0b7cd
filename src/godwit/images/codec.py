"""Entries as MessagePack maps, decoded into the declared types and nothing else.

msgspec decodes typed: lengths, nesting and types of hostile input are refused before memory is asked
for.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from godwit.errors import ImageError

Entry = TypeVar("Entry")


def encode(entry: object) -> bytes:
    """Return the bytes of an entry: a dataclass of numbers, bytes, strings, tuples and dataclasses."""
    return msgspec.msgpack.encode(entry)


_decoders: dict[object, msgspec.msgpack.Decoder[Any]] = {}


def _decoder(kind: type[Entry]) -> msgspec.msgpack.Decoder[Entry]:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    return decoder


def prime(*kinds: type[Any]) -> None:
    """Make the decoders of these types now: the first use of one costs a millisecond."""
    for kind in kinds:
        _decoder(kind)


def decode(raw: bytes | bytearray | memoryview, kind: type[Entry]) -> Entry:
    """Read an entry of the given type.

    Raises:
        ImageError: The bytes are no such entry.
    """
    try:
        return _decoder(kind).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise ImageError(f"the stream holds a malformed {name}: {error}") from None
