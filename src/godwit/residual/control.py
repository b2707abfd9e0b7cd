"""What the two keepers of a job tell each other besides the content of its ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from godwit.images import codec

FILES_LINK: Final = 1
CONTROL_LINK: Final = 2
# Channels of the two links.
FILES: Final = 1
CONTROL: Final = 1
JOB_BYTES: Final = 15  # a link's name is that of its job, and which link it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Signalled:
    """Home: a signal came to a deputy."""

    inner: int
    number: int  # to be confirmed; 0: a SIGSTOP
    info: bytes  # siginfo_t as seen at home


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """Host: the signals up to this one were delivered."""

    inner: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Continue:
    """Home: a deputy was continued."""

    inner: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """Home: a deputy was killed, and so is to be the process it stands for."""

    inner: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Halted:
    """Host: job control has stopped a process there."""

    inner: int
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Host: a process has ended."""

    inner: int
    status: int  # as of waitpid(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """Either: there is no such job any more."""


Message = Signalled | Confirmed | Continue | Killed | Halted | Ended | Over
_KINDS: Final[dict[str, type[Message]]] = {
    kind.__name__: kind for kind in (Signalled, Confirmed, Continue, Killed, Halted, Ended, Over)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Envelope:
    kind: str
    body: bytes


def pack(message: Message) -> bytes:
    """Return the bytes of a message."""
    return codec.encode(_Envelope(kind=type(message).__name__, body=codec.encode(message)))


def unpack(raw: bytes | memoryview) -> Message | None:
    """Return the message, or None of a kind that only a newer Godwit knows.

    Raises:
        ImageError: It is none.
    """
    envelope = codec.decode(raw, _Envelope)
    kind = _KINDS.get(envelope.kind)
    return None if kind is None else codec.decode(envelope.body, kind)


def link_name(job: bytes, which: int) -> bytes:
    """Return the name of one of a job's links."""
    return job[:JOB_BYTES] + bytes([which])
