"""The migration stream: cut anywhere it gives the same frames, and damage never passes for a frame."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from godwit.errors import ImageError
from godwit.migrate.channel import Channel, Closed, SocketPipe
from godwit.types import PAGE_SIZE
from godwit.wire import frames
from godwit.wire.frames import FrameKind

Sent = list[tuple[FrameKind, bytes]]

kinds = st.sampled_from(FrameKind)
payloads = st.binary(max_size=300)
lists_of_frames = st.lists(st.tuples(kinds, payloads), max_size=8)
cuts = st.integers(min_value=1, max_value=60)


class Tape:
    """A stream that lies in memory, and comes in pieces of at most `piece` bytes."""

    def __init__(self, content: bytes = b"", piece: int = 1 << 30) -> None:
        self.content = bytearray(content)
        self.largest_asked = 0
        self._piece = piece
        self._at = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.content += data

    def fill(self, buffer: memoryview) -> int:
        self.largest_asked = max(self.largest_asked, len(buffer))
        return SocketPipe(cast("socket.socket", self)).fill(buffer)

    def recv_into(self, buffer: memoryview, length: int) -> int:
        """Give the next piece, as a socket does."""
        data = self.content[self._at : self._at + min(self._piece, length)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def linger(self) -> None:
        """Do nothing."""

    def has_word(self) -> bool:
        """Tell whether anything is left on the tape."""
        return self._at < len(self.content)

    def fileno(self) -> int:
        return -1

    def cut(self) -> None:
        pass

    def close(self) -> None:
        """Do nothing."""


def written(sent: Sent) -> bytes:
    tape = Tape()
    channel = Channel(tape)
    channel.open_stream()
    for kind, payload in sent:
        channel.send(kind, payload)
    assert channel.bytes_sent == len(tape.content)
    return bytes(tape.content)


def read_in_pieces(raw: bytes, piece: int = 1 << 30) -> Sent:
    """Read frames until the stream ends, which raises Closed."""
    channel = Channel(Tape(raw, piece))
    channel.accept_stream()
    found: Sent = []
    with contextlib.suppress(Closed):
        while True:
            kind, payload = channel.receive()
            found.append((kind, bytes(payload)))
    return found


@given(sent=lists_of_frames, piece=cuts)
def test_a_stream_cut_anywhere_gives_the_same_frames(sent: Sent, piece: int) -> None:
    assert read_in_pieces(written(sent), piece) == sent


@given(parts=st.lists(st.binary(max_size=100), max_size=5), kind=kinds)
def test_a_payload_sent_in_parts_arrives_as_one(parts: list[bytes], kind: FrameKind) -> None:
    tape = Tape()
    Channel(tape).send(kind, *parts)
    received, payload = Channel(tape).receive()
    assert (received, bytes(payload)) == (kind, b"".join(parts))


@given(sent=lists_of_frames, data=st.data())
def test_a_stream_that_ends_early_gives_whole_frames_only(sent: Sent, data: st.DataObject) -> None:
    raw = written(sent)
    length = data.draw(st.integers(min_value=0, max_value=len(raw) - 1))
    if length < frames.PREAMBLE_BYTES:
        with pytest.raises(Closed):
            read_in_pieces(raw[:length])
    else:
        found = read_in_pieces(raw[:length])
        assert found == sent[: len(found)]
        assert len(found) < len(sent) or not sent


@given(sent=lists_of_frames, data=st.data())
def test_a_flipped_bit_never_passes(sent: Sent, data: st.DataObject) -> None:
    """But in the kind, which no checksum covers: then whoever `expect`s another kind refuses it."""
    raw = bytearray(written(sent))
    at = data.draw(st.integers(min_value=0, max_value=len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(min_value=0, max_value=7))
    try:
        found = read_in_pieces(bytes(raw))
    except (ImageError, Closed) as error:
        line = str(error)
        assert "\n" not in line
        return
    assert found != sent
    assert [payload for _, payload in found] == [payload for _, payload in sent][: len(found)]


@given(raw=st.binary(max_size=400))
def test_garbage_raises_image_error_or_closed(raw: bytes) -> None:
    for beginning in (b"", frames.preamble()):
        with contextlib.suppress(ImageError, Closed):
            read_in_pieces(beginning + raw)


@given(kind=kinds, length=st.integers(min_value=0, max_value=2**64 - 1), checksum=st.integers(0, 2**64 - 1))
def test_a_length_is_checked_before_memory_is_asked_for(kind: FrameKind, length: int, checksum: int) -> None:
    tape = Tape(struct.pack("<IIQQ", kind, 0, length, checksum))
    with pytest.raises((ImageError, Closed)):
        Channel(tape).receive()
    assert tape.largest_asked <= 2 * frames.PAGES_LIMIT_BYTES


@given(number=st.integers(0, 2**32 - 1), flags=st.integers(0, 2**32 - 1))
def test_an_unknown_kind_or_flag_is_refused_by_name(number: int, flags: int) -> None:
    assume(flags or number not in set(FrameKind))
    with pytest.raises(ImageError):
        frames.read_frame_header(struct.pack("<IIQQ", number, flags, 0, 0))


@given(wanted=kinds, sent=kinds)
def test_a_frame_out_of_turn_names_both_kinds(wanted: FrameKind, sent: FrameKind) -> None:
    assume(wanted is not sent)
    tape = Tape()
    Channel(tape).send(sent, b"")
    with pytest.raises(ImageError, match=f"{sent.name} where {wanted.name}"):
        Channel(tape).expect(wanted)


@st.composite
def runs_of_pages(draw: st.DrawFn) -> list[tuple[int, int]]:
    edges = sorted(draw(st.sets(st.integers(0, 40), max_size=12)))
    return [(start * PAGE_SIZE, end * PAGE_SIZE) for start, end in zip(edges[::2], edges[1::2], strict=False)]


u32 = st.integers(0, 2**32 - 1)


@given(process=u32, object_id=u32, runs=runs_of_pages(), byte=st.integers(0, 255))
def test_pages_round_trip(process: int, object_id: int, runs: list[tuple[int, int]], byte: int) -> None:
    data = bytes([byte]) * sum(end - start for start, end in runs)
    payload = memoryview(frames.pages_head(process, object_id, runs) + data)
    found = frames.read_pages(payload)
    assert found[:3] == (process, object_id, runs)
    assert bytes(found[3]) == data


@given(runs=runs_of_pages(), data=st.data())
def test_pages_of_a_wrong_length_are_refused(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    whole = frames.pages_head(0, 0, runs) + bytes(sum(end - start for start, end in runs))
    other = data.draw(st.integers(0, len(whole) + PAGE_SIZE))
    assume(other != len(whole))
    with pytest.raises(ImageError):
        frames.read_pages(memoryview((whole + bytes(PAGE_SIZE))[:other]))


@given(first=st.integers(0, 2**64 - 1), second=st.integers(0, 2**64 - 1))
def test_runs_that_are_no_pages_are_refused(first: int, second: int) -> None:
    assume(first % PAGE_SIZE or second % PAGE_SIZE or first >= second)
    with pytest.raises(ImageError):
        frames.read_pages(memoryview(struct.pack("<IIIIQQ", 0, 0, 1, 0, first, second)))


@given(payload=st.binary(max_size=200))
def test_garbage_is_no_pages(payload: bytes) -> None:
    with contextlib.suppress(ImageError):
        frames.read_pages(memoryview(payload))


@given(raw=st.binary(max_size=40))
def test_garbage_is_no_preamble(raw: bytes) -> None:
    assume(raw[: frames.PREAMBLE_BYTES] != frames.preamble())
    with pytest.raises(ImageError):
        frames.check_preamble(raw)
