"""Packed pages: what comes out is what went in, and hostile bytes are refused and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from godwit.errors import ImageError
from godwit.types import PAGE_SIZE
from godwit.wire import extents, frames, packing, slots
from godwit.wire.codecs import Codec
from godwit.wire.frames import FrameKind
from godwit.wire.packing import Packer, Unpacker

Pages = dict[int, bytes]
Sent = list[tuple[FrameKind, bytes]]

PAGE_KINDS = (FrameKind.PAGES, FrameKind.ZEROES, FrameKind.COPIES, FrameKind.PACKED)
MOST_PAGES = 10
FEW_SLOTS = 12  # so that they are used again


@dataclass(frozen=True)
class Chunk:
    """Pages as they are handed to the packer."""

    process: int
    object_id: int
    runs: list[tuple[int, int]]
    data: bytes
    look: bool  # for copies


def page_of(sort: str, seed: int) -> bytes:
    """Return a page that is zero, nearly zero, easy to compress, or hard."""
    if sort == "zero":
        return bytes(PAGE_SIZE)
    if sort == "first":
        return bytes([1 + seed]).ljust(PAGE_SIZE, b"\0")
    if sort == "last":
        return bytes([1 + seed]).rjust(PAGE_SIZE, b"\0")
    if sort == "easy":
        return (b"%06d: " % seed).ljust(32, b".") * (PAGE_SIZE // 32)
    return random.Random(seed).randbytes(PAGE_SIZE)


pages = st.builds(page_of, st.sampled_from(["zero", "first", "last", "easy", "hard"]), st.integers(0, 5))
u32 = st.integers(0, 2**32 - 1)


@st.composite
def chunk(draw: st.DrawFn) -> Chunk:
    content = draw(st.lists(pages, min_size=1, max_size=MOST_PAGES))
    runs: list[tuple[int, int]] = []
    at, left = draw(st.integers(0, 9)), len(content)
    while left:
        length = draw(st.integers(1, left))
        runs.append((at * PAGE_SIZE, (at + length) * PAGE_SIZE))
        at += length + draw(st.integers(0, 2))
        left -= length
    return Chunk(draw(u32), draw(u32), runs, b"".join(content), draw(st.integers(0, 3)) > 0)


lists_of_chunks = st.lists(chunk(), max_size=8)
codecs = st.sampled_from(Codec)


@contextmanager
def few_slots() -> Iterator[None]:
    with (
        mock.patch.object(slots, "SLOTS", FEW_SLOTS),
        mock.patch.object(slots, "KEPT_BYTES", FEW_SLOTS * PAGE_SIZE),
    ):
        yield


def packed(chunks: list[Chunk], codec: Codec) -> Iterator[Sent]:
    """Yield the frames of each chunk."""
    packer = Packer(link_bytes_per_s=None)
    looks = [each.look for each in chunks if any(each.data)]
    with (
        mock.patch.object(packing, "choose", return_value=codec),
        mock.patch.object(slots.Watch, "next", side_effect=looks),
    ):
        for each in chunks:
            made = packer.pack(each.process, each.object_id, each.runs, memoryview(each.data))
            yield [(kind, b"".join(parts)) for kind, parts in made]


def by_address(runs: list[tuple[int, int]], data: bytes) -> Pages:
    places = [at for start, end in runs for at in range(start, end, PAGE_SIZE)]
    assert len(places) * PAGE_SIZE == len(data)
    return {at: data[n * PAGE_SIZE : (n + 1) * PAGE_SIZE] for n, at in enumerate(places)}


@given(chunks=lists_of_chunks, codec=codecs)
def test_every_page_comes_out_once_and_as_it_was(chunks: list[Chunk], codec: Codec) -> None:
    unpacker = Unpacker()
    with few_slots():
        for sent, made in zip(chunks, packed(chunks, codec), strict=True):
            found: Pages = {}
            for kind, payload in made:
                for process, object_id, runs, data in unpacker.unpack(kind, memoryview(payload)):
                    assert (process, object_id) == (sent.process, sent.object_id)
                    length = sum(end - start for start, end in runs)
                    some = by_address(runs, bytes(length) if data is None else bytes(data))
                    assert not found.keys() & some.keys()
                    found |= some
            assert found == by_address(sent.runs, sent.data)


@given(chunks=lists_of_chunks, codec=codecs)
def test_zero_pages_and_pages_seen_when_looking_are_not_sent(chunks: list[Chunk], codec: Codec) -> None:
    for sent, made in zip(chunks, packed(chunks, codec), strict=True):
        payloads: dict[FrameKind, bytes] = dict(made)
        assert len(payloads) == len(made)
        content = by_address(sent.runs, sent.data).values()
        some_zero = any(not any(page) for page in content)
        assert some_zero == (FrameKind.ZEROES in payloads)
        unlike = {page for page in content if any(page)}
        if sent.look and codec is Codec.NONE and FrameKind.PACKED in payloads:
            assert len(payloads[FrameKind.PACKED]) < (len(unlike) + 1) * PAGE_SIZE


@given(data=st.binary(max_size=64), codec=codecs, chunks=lists_of_chunks, drawn=st.data())
def test_altered_frames_are_refused_or_are_pages(
    data: bytes, codec: Codec, chunks: list[Chunk], drawn: st.DataObject
) -> None:
    sent = [frame for made in packed(chunks, codec) for frame in made] or [(FrameKind.PACKED, data)]
    index = drawn.draw(st.integers(0, len(sent) - 1))
    kind, payload = sent[index]
    altered = bytearray(payload)
    # Most of what can be got wrong is at the front.
    at = drawn.draw(st.integers(0, min(len(altered), 100)) | st.integers(0, len(altered)))
    match drawn.draw(st.sampled_from(["overwrite", "insert", "cut", "kind"])):
        case "overwrite":
            altered[at : at + len(data)] = data
        case "insert":
            altered[at:at] = data
        case "cut":
            del altered[at:]
        case _:
            kind = drawn.draw(st.sampled_from(PAGE_KINDS))
    sent[index] = kind, bytes(altered)
    accept_or_refuse(sent)


@given(sent=st.lists(st.tuples(st.sampled_from(FrameKind), st.binary(max_size=120)), max_size=4))
def test_garbage_is_refused(sent: Sent) -> None:
    accept_or_refuse(sent)


@given(number=st.integers(0, 3), length=u32, slot=u32, zero=st.integers(0, 1), body=st.binary(max_size=200))
def test_garbage_that_is_packed_is_refused(
    number: int, length: int, slot: int, zero: int, body: bytes
) -> None:
    for claim in (length, len(body), len(body) * 255):
        head = b"".join(value.to_bytes(4, "little") for value in (number, claim, slot, zero))
        accept_or_refuse([(FrameKind.PACKED, head + body)])


def accept_or_refuse(sent: Sent) -> None:
    """Raise unless each frame gives whole pages or ImageError; after an error nobody reads on."""
    unpacker = Unpacker()
    for kind, payload in sent:
        if kind in PAGE_KINDS and len(payload) > frames.PAGES_LIMIT_BYTES:
            return
        try:
            for _, _, runs, data in unpacker.unpack(kind, memoryview(payload)):
                assert all(start % PAGE_SIZE == 0 and start < end for start, end in runs)
                assert data is None or len(data) == sum(end - start for start, end in runs)
                assert data is None or len(data) <= frames.PAGES_LIMIT_BYTES
        except ImageError:
            return


@given(flags=st.lists(st.booleans(), max_size=30))
def test_extents_and_the_others_are_all_pages(flags: list[bool]) -> None:
    chosen = [index for index, flag in enumerate(flags) if flag]
    some = extents.extents_of(chosen)
    rest = extents.others(some, len(flags))
    assert [page for first, end in some for page in range(first, end)] == chosen
    assert sorted(page for first, end in some + rest for page in range(first, end)) == list(range(len(flags)))
    assert extents.count(some) == len(chosen)


@given(content=st.lists(pages, min_size=1, max_size=MOST_PAGES))
def test_zero_pages_are_found_and_no_others(content: list[bytes]) -> None:
    found = extents.zero_extents(memoryview(b"".join(content)))
    assert found == extents.extents_of(index for index, page in enumerate(content) if not any(page))
