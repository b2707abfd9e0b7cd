"""The bytes of a link: what is packed is read again, and nothing else passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.residual.line import Line
from godwit.residual.tally import LinkState, Tally
from godwit.wire import linkframes
from godwit.wire.linkframes import Greeting, ProtocolError, Side

counts = st.integers(min_value=0, max_value=linkframes.COUNT_LIMIT - 1)
channels = st.integers(min_value=1, max_value=(1 << 32) - 1)
frames = st.lists(st.tuples(channels, st.binary(max_size=200_000), counts), max_size=6)
greetings = st.builds(
    Greeting,
    side=st.sampled_from(Side),
    job=st.binary(min_size=16, max_size=16),
    epoch=counts,
    received=counts,
)


class Tape:
    """A stream that comes in pieces."""

    def __init__(self, content: bytes, piece: int) -> None:
        self._content = content
        self._piece = piece

    def read_some(self, buffer: memoryview) -> int:
        """Give the next piece."""
        assert buffer, "a read that can bring nothing"
        data, count = self._content, min(self._piece, len(buffer))
        piece, self._content = data[:count], data[count:]
        buffer[: len(piece)] = piece
        return len(piece)


def read(raw: bytes, piece: int) -> list[tuple[int, bytes, int]]:
    line = Line(Tape(raw, piece))  # type: ignore[arg-type]  # it only reads
    found: list[tuple[int, bytes, int]] = []
    while line.read():
        found += [(channel, bytes(payload), count) for channel, payload, count in line.frames()]
    return found


def written(sent: list[tuple[int, bytes, int]]) -> bytes:
    return b"".join(linkframes.pack_header(len(data), channel, count) + data for channel, data, count in sent)


@given(greeting=greetings)
def test_a_greeting_is_read_as_it_was_packed(greeting: Greeting) -> None:
    raw = linkframes.pack_greeting(greeting)
    assert len(raw) == linkframes.GREETING_BYTES
    assert linkframes.read_greeting(raw) == greeting


@given(greeting=greetings, at=st.integers(0, 9), flip=st.integers(1, 255))
def test_a_greeting_of_another_kind_or_format_is_refused(greeting: Greeting, at: int, flip: int) -> None:
    raw = bytearray(linkframes.pack_greeting(greeting))
    raw[at] ^= flip
    with pytest.raises(ProtocolError):
        linkframes.read_greeting(raw)


@given(raw=st.binary(min_size=linkframes.GREETING_BYTES, max_size=linkframes.GREETING_BYTES))
def test_noise_is_no_greeting(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        linkframes.read_greeting(raw)


@given(sent=frames, piece=st.integers(1, 300_000))
def test_frames_cut_anywhere_are_the_same_frames(sent: list[tuple[int, bytes, int]], piece: int) -> None:
    raw = written(sent)
    assert read(raw, max(piece, len(raw) // 2000)) == sent


@given(
    length=st.integers(0, (1 << 32) - 1), channel=st.integers(0, (1 << 32) - 1), count=st.integers(0, 1 << 63)
)
def test_a_length_beyond_the_limit_is_refused_before_memory_is_taken(
    length: int, channel: int, count: int
) -> None:
    raw = linkframes.pack_header(length, channel, count)
    if length > linkframes.PAYLOAD_LIMIT_BYTES or (channel == 0 and length):
        with pytest.raises(ProtocolError):
            linkframes.read_header(raw)
    else:
        assert linkframes.read_header(raw) == (length, channel, count)


def test_the_longest_message_passes() -> None:
    sent = [(1, bytes(linkframes.PAYLOAD_LIMIT_BYTES), 0), (2, b"x" * 70_000, 1), (3, b"", 2)] * 3
    assert read(written(sent), 100_000) == sent


sizes = st.lists(st.binary(max_size=50), min_size=1, max_size=40)


@given(payloads=sizes, data=st.data())
def test_a_tally_keeps_what_is_not_confirmed_and_lets_go_of_the_rest(
    payloads: list[bytes], data: st.DataObject
) -> None:
    tally = Tally()
    for payload in payloads:
        tally.add(7, (payload,), len(payload))
    confirmed = data.draw(st.integers(0, len(payloads)))
    assert tally.confirm(confirmed) == (confirmed > 0)
    state = tally.state(bytes(16), 3)
    assert [payload for _, payload in state.unconfirmed] == payloads[confirmed:]
    assert (tally.held_bytes == 0) == (confirmed == len(payloads))
    assert Tally.of(state).state(bytes(16), 3) == state
    for wrong in (confirmed - 1, len(payloads) + 1):
        with pytest.raises(ProtocolError):
            tally.confirm(wrong)


@pytest.mark.parametrize(
    "state",
    [
        LinkState(job=bytes(15), epoch=0, sent=0, received=0, unconfirmed=()),
        LinkState(job=bytes(16), epoch=-1, sent=0, received=0, unconfirmed=()),
        LinkState(job=bytes(16), epoch=0, sent=0, received=1 << 63, unconfirmed=()),
        LinkState(job=bytes(16), epoch=0, sent=0, received=0, unconfirmed=((1, b""),)),
        LinkState(job=bytes(16), epoch=0, sent=1, received=0, unconfirmed=((0, b""),)),
        LinkState(job=bytes(16), epoch=0, sent=1, received=0, unconfirmed=((1, bytes(2 << 20)),)),
    ],
)
def test_an_impossible_state_is_refused(state: LinkState) -> None:
    with pytest.raises(ProtocolError):
        Tally.of(state)
