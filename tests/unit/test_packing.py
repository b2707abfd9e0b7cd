"""Packing of pages: what is chosen, what is refused, and how much goes over the wire."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from unittest import mock

import lz4.block  # type: ignore[import-untyped]
import pytest
import zstandard

from godwit.errors import ImageError
from godwit.types import PAGE_SIZE
from godwit.wire import codecs, frames, packing, slots
from godwit.wire.codecs import Codec, Compressors, Sample, choose
from godwit.wire.frames import FrameKind
from godwit.wire.packing import Packer, Unpacker

MIB = 1 << 20
CHUNK_RUN = [(0, MIB)]
SLOW, FAST = 1e5, 1e13  # bytes per second, beyond doubt
NOT_KEPT = 0xFFFFFFFF

LZ4 = Sample(Codec.LZ4, 4.0, 2e9)
ZSTD = Sample(Codec.ZSTD, 8.0, 1e9)


def hard(seed: int) -> bytes:
    return random.Random(seed).randbytes(MIB)


def easy(seed: int) -> bytes:
    """Return text in which every page is another."""
    tail = b": %s\n" % random.Random(seed).randbytes(40)
    return b"".join(b"%08d%s" % (number, tail) for number in range(MIB // 40))[:MIB]


def codec_of(packer: Packer) -> Codec:
    return packer.codec


def sent_bytes(packer: Packer, chunks: Iterable[bytes]) -> int:
    """Pack chunks, each at the same place; return how long the frames are."""
    return sum(
        frames.FRAME_HEADER_BYTES + sum(len(part) for part in parts)
        for chunk in chunks
        for _, parts in packer.pack(0, 0, CHUNK_RUN, memoryview(chunk))
    )


# --- choosing


@pytest.mark.parametrize(
    ("samples", "link", "codec"),
    [
        ((LZ4, ZSTD), SLOW, Codec.ZSTD),
        ((ZSTD, LZ4), SLOW, Codec.ZSTD),
        ((LZ4, ZSTD), 0.2e9, Codec.ZSTD),
        ((LZ4, ZSTD), 0.5e9, Codec.LZ4),  # 0.5 + 0.5 ns a byte against 1 + 0.25
        ((LZ4, ZSTD), 1.4e9, Codec.LZ4),  # 0.5 + 0.18 against 0.71 uncompressed
        ((LZ4, ZSTD), 1.6e9, Codec.NONE),
        ((LZ4, ZSTD), FAST, Codec.NONE),
        ((ZSTD,), 0.8e9, Codec.ZSTD),
        ((ZSTD,), 0.9e9, Codec.NONE),
        ((LZ4, ZSTD), None, Codec.ZSTD),
        ((LZ4, ZSTD), 0.0, Codec.ZSTD),
        ((Sample(Codec.ZSTD, 1.21, 1e9),), SLOW, Codec.ZSTD),
        ((Sample(Codec.ZSTD, 1.19, 1e9),), SLOW, Codec.NONE),
        ((), SLOW, Codec.NONE),
    ],
)
def test_the_codec_is_the_one_that_brings_pages_over_soonest(
    samples: tuple[Sample, ...], link: float | None, codec: Codec
) -> None:
    assert choose(samples, link) is codec


def test_a_sample_tells_ratio_and_speed() -> None:
    zstd, fast = Compressors().sample(memoryview(easy(1)))
    assert (zstd.codec, fast.codec) == (Codec.ZSTD, Codec.LZ4)
    assert zstd.ratio > 5
    assert fast.ratio > 5
    assert 1e6 < min(zstd.bytes_per_s, fast.bytes_per_s) <= max(zstd.bytes_per_s, fast.bytes_per_s) < 1e12
    assert all(0.9 < sample.ratio < 1.01 for sample in Compressors().sample(memoryview(hard(1))))


def test_copies_pay_where_sending_them_takes_longer_than_the_search() -> None:
    assert slots.pays(1, 1, 125e6)
    assert slots.pays(10, 256, 125e6)
    assert not slots.pays(1, 256, 125e6)
    assert not slots.pays(10, 256, 1.25e9)
    assert slots.pays(128, 256, 1.25e9)
    assert not slots.pays(256, 256, FAST)


def looked(link: float, chunks: int, copies: int) -> list[bool]:
    watch, found = slots.Watch(), list[bool]()
    for _ in range(chunks):
        found.append(watch.next(link))
        if found[-1]:
            watch.found(copies, 256)
    return found


def test_copies_are_looked_for_now_and_then_and_on_while_it_pays() -> None:
    assert looked(125e6, 80, copies=0) == (
        [False] * 12 + [True] * 4 + [False] * 28 + [True] * 4 + [False] * 28 + [True] * 4
    )
    assert looked(125e6, 80, copies=100) == [False] * 12 + [True] * 68
    assert looked(FAST, 80, copies=256) == [False] * 80


# --- the wire


def test_a_gigabyte_of_zeroes_is_next_to_nothing() -> None:
    assert sent_bytes(Packer(link_bytes_per_s=SLOW), [bytes(MIB)] * 1024) < 64 << 10


@pytest.mark.parametrize("link", [SLOW, 125e6, FAST])
def test_random_pages_are_not_inflated(link: float) -> None:
    chunks = [hard(seed) for seed in range(40)]
    assert len(chunks) * MIB <= sent_bytes(Packer(link_bytes_per_s=link), chunks) < len(chunks) * MIB * 1.001


def test_copies_collapse() -> None:
    page = random.Random(0).randbytes(PAGE_SIZE)
    packer = Packer(link_bytes_per_s=125e6)
    with mock.patch.object(packing, "choose", return_value=Codec.NONE):
        sent_bytes(packer, (hard(seed) for seed in range(12)))
        first = sent_bytes(packer, [page * (MIB // PAGE_SIZE)])
        more = sent_bytes(packer, [page * (MIB // PAGE_SIZE)] * 20)
    assert PAGE_SIZE < first < 2 * PAGE_SIZE
    assert more < 20 * 256 * 5
    assert packer.copied_pages == 21 * 256 - 1


def pages_of(chunk: bytes, *numbers: int) -> bytes:
    return b"".join(chunk[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] for number in numbers)


def kept_and_copied(packer: Packer, unpacker: Unpacker, data: bytes) -> dict[FrameKind, int]:
    """Pack a chunk, looking for copies, and unpack it; return how many pages each frame held."""
    run = [(0, len(data))]
    found: dict[int, bytes] = {}
    pages: dict[FrameKind, int] = {}
    with mock.patch.object(slots.Watch, "next", return_value=True):
        made = packer.pack(0, 0, run, memoryview(data))
    for kind, parts in made:
        [(_, _, runs, some)] = unpacker.unpack(kind, joined(parts))
        assert some is not None
        pages[kind] = len(some) // PAGE_SIZE
        places = [at for start, end in runs for at in range(start, end, PAGE_SIZE)]
        found |= {at: bytes(some[n * PAGE_SIZE : (n + 1) * PAGE_SIZE]) for n, at in enumerate(places)}
    assert b"".join(found[at] for at in range(0, len(data), PAGE_SIZE)) == data
    return pages


def test_pages_of_an_earlier_chunk_are_copies() -> None:
    packer, unpacker, chunk = Packer(link_bytes_per_s=None), Unpacker(), hard(1)
    assert kept_and_copied(packer, unpacker, chunk) == {FrameKind.PACKED: 256}
    assert kept_and_copied(packer, unpacker, chunk) == {FrameKind.COPIES: 256}


@pytest.mark.parametrize("again", [[1], []])  # with a copy within the first chunk, and without
def test_a_slot_about_to_be_used_again_is_not_copied_from(again: list[int]) -> None:
    packer, unpacker, chunk = Packer(link_bytes_per_s=None), Unpacker(), hard(1)
    with mock.patch.object(slots, "SLOTS", 8):
        kept_and_copied(packer, unpacker, pages_of(chunk, 0, 1, 2, 3, *again))
        kept_and_copied(packer, unpacker, pages_of(chunk, 4, 5, 6))
        kept_and_copied(packer, unpacker, pages_of(chunk, 1, 10, 11, 12))
        kept_and_copied(packer, unpacker, pages_of(chunk, 11, 13, 14, 15, 6))


def test_equal_hashes_do_not_make_equal_pages() -> None:
    packer, unpacker = Packer(link_bytes_per_s=None), Unpacker()
    chunk = hard(1)
    with (
        mock.patch.object(slots, "xxh3_64_intdigest", return_value=7),
        mock.patch.object(slots.Watch, "next", return_value=True),
    ):
        made = packer.pack(0, 0, CHUNK_RUN, memoryview(chunk))
    [(_, _, _, pages)] = [item for kind, parts in made for item in unpacker.unpack(kind, joined(parts))]
    assert content(pages) == chunk
    assert packer.copied_pages == 0


def test_easy_pages_shrink_on_a_slow_link_only() -> None:
    chunks = [easy(seed) for seed in range(8)]
    assert sent_bytes(Packer(link_bytes_per_s=SLOW), chunks) < len(chunks) * MIB / 5
    assert sent_bytes(Packer(link_bytes_per_s=FAST), chunks) > len(chunks) * MIB


def test_pages_that_are_neither_packed_nor_kept_go_as_they_are() -> None:
    chunk = hard(1)
    [(kind, [head, pages])] = Packer(link_bytes_per_s=SLOW).pack(1, 0, CHUNK_RUN, memoryview(chunk))
    assert kind is FrameKind.PAGES
    assert head == frames.pages_head(1, 0, CHUNK_RUN)
    assert isinstance(pages, memoryview)
    assert pages.obj is chunk


def test_a_measured_link_changes_the_choice() -> None:
    packer = Packer(link_bytes_per_s=SLOW)
    sent_bytes(packer, [easy(1)])
    assert codec_of(packer) is not Codec.NONE
    packer.measured(FAST)
    assert codec_of(packer) is Codec.NONE
    assert sent_bytes(packer, [easy(2)]) > MIB
    packer.measured(SLOW)
    assert sent_bytes(packer, [easy(2)]) < MIB / 5


def test_a_new_kind_of_data_is_noticed() -> None:
    packer = Packer(link_bytes_per_s=SLOW)
    sent_bytes(packer, [easy(1), hard(1)])
    assert codec_of(packer) is not Codec.NONE
    sent_bytes(packer, [hard(2)])
    assert codec_of(packer) is Codec.NONE
    sent_bytes(packer, (easy(seed) for seed in range(packing.SAMPLE_EVERY_BYTES // MIB)))
    assert codec_of(packer) is not Codec.NONE


def test_another_process_is_sampled_anew() -> None:
    packer = Packer(link_bytes_per_s=SLOW)
    packer.pack(0, 0, CHUNK_RUN, memoryview(hard(1)))
    assert codec_of(packer) is Codec.NONE
    packer.pack(1, 0, CHUNK_RUN, memoryview(easy(1)))
    assert codec_of(packer) is not Codec.NONE


def test_a_few_pages_do_not_speak_for_many() -> None:
    packer = Packer(link_bytes_per_s=SLOW)
    packer.pack(0, 0, [(0, PAGE_SIZE)], memoryview(hard(1))[:PAGE_SIZE])
    assert codec_of(packer) is Codec.NONE
    packer.pack(0, 0, CHUNK_RUN, memoryview(hard(2)))
    packer.pack(0, 0, CHUNK_RUN, memoryview(easy(2)))
    assert codec_of(packer) is not Codec.NONE


def test_neither_side_holds_more_than_its_table_and_its_buffers() -> None:
    chunks = [hard(seed) for seed in range(20)]
    with mock.patch.object(slots.Watch, "next", return_value=True):
        tracemalloc.start()
        try:
            packer, unpacker = Packer(link_bytes_per_s=SLOW), Unpacker()
            for chunk in chunks:
                for kind, parts in packer.pack(0, 0, CHUNK_RUN, memoryview(chunk)):
                    list(unpacker.unpack(kind, joined(parts)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert 2 * slots.KEPT_BYTES < peak < 2 * (20 << 20)


def test_the_libraries_are_loaded_by_who_packs_only() -> None:
    program = "import sys, godwit.wire.packing; print({'lz4', 'zstandard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- refusing


def content(pages: memoryview | None) -> bytes | None:
    return None if pages is None else bytes(pages)


def joined(parts: Iterable[bytes | bytearray | memoryview]) -> memoryview:
    return memoryview(b"".join(parts))


def packed(codec: int, body: bytes, length: int, slot: int = NOT_KEPT) -> bytes:
    return struct.pack("<IIII", codec, length, slot, 0) + body


def copies(count: int, *numbers: int) -> bytes:
    head = frames.pages_head(0, 0, [(0, count * PAGE_SIZE)])
    return head + struct.pack(f"<{len(numbers)}I", *numbers)


def refused(kind: FrameKind, payload: bytes, unpacker: Unpacker | None = None) -> ImageError:
    with pytest.raises(ImageError) as caught:
        list((unpacker or Unpacker()).unpack(kind, memoryview(payload)))
    return caught.value


ONE_PAGE = frames.pages_head(3, 4, [(PAGE_SIZE, 2 * PAGE_SIZE)]) + b"page" * (PAGE_SIZE // 4)


def as_lz4(raw: bytes) -> bytes:
    return bytes(lz4.block.compress(raw, store_size=False))


def as_zstd(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def as_itself(raw: bytes) -> bytes:
    return raw


ALL_CODECS = pytest.mark.parametrize(
    ("codec", "press"), [(Codec.NONE, as_itself), (Codec.LZ4, as_lz4), (Codec.ZSTD, as_zstd)]
)


@ALL_CODECS
def test_packed_pages_are_pages(codec: Codec, press: Callable[[bytes], bytes]) -> None:
    payload = packed(codec, press(ONE_PAGE), len(ONE_PAGE))
    [item] = Unpacker().unpack(FrameKind.PACKED, memoryview(payload))
    assert item[:3] == (3, 4, [(PAGE_SIZE, 2 * PAGE_SIZE)])
    assert content(item[3]) == b"page" * (PAGE_SIZE // 4)


@ALL_CODECS
def test_packed_pages_of_a_wrong_length_are_refused(codec: Codec, press: Callable[[bytes], bytes]) -> None:
    body = press(ONE_PAGE)
    for length in (0, len(ONE_PAGE) - 1, len(ONE_PAGE) + 1):
        refused(FrameKind.PACKED, packed(codec, body, length))
    for wrong in (body + b"x", body + b"\0" * 8, body + body, body[:-1], b""):
        refused(FrameKind.PACKED, packed(codec, wrong, len(ONE_PAGE)))


@ALL_CODECS
def test_packed_pages_beyond_the_limit_are_refused_before_memory_is_taken(
    codec: Codec, press: Callable[[bytes], bytes]
) -> None:
    body = press(ONE_PAGE)
    unpacker = Unpacker()
    tracemalloc.start()
    try:
        for length in (frames.PAGES_LIMIT_BYTES + 1, 2**31, 2**32 - 1):
            error = refused(FrameKind.PACKED, packed(codec, body, length), unpacker)
            assert str(frames.PAGES_LIMIT_BYTES) in str(error)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB // 2


@pytest.mark.parametrize("body", [as_zstd(bytes(200 * MIB)), as_zstd(bytes(MIB))])
def test_a_zstd_frame_that_says_more_than_its_head_is_refused_before_memory_is_taken(body: bytes) -> None:
    unpacker = Unpacker()
    tracemalloc.start()
    try:
        assert "claims" in str(refused(FrameKind.PACKED, packed(Codec.ZSTD, body, len(ONE_PAGE)), unpacker))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB // 2


def zstd_by_hand(window_exponent: int) -> bytes:
    """Return ONE_PAGE as a frame with a window of 2 ** (10 + exponent) bytes, of one raw block (RFC 8878)."""
    head = struct.pack("<IBBI", 0xFD2FB528, 0x80, window_exponent << 3, len(ONE_PAGE))
    return head + (1 | len(ONE_PAGE) << 3).to_bytes(3, "little") + ONE_PAGE


def test_a_zstd_frame_with_a_huge_window_takes_no_memory() -> None:
    """What comes whole is decoded in place; only for a frame that goes on would there be a window."""
    small, huge = zstd_by_hand(3), zstd_by_hand(16)
    assert zstandard.get_frame_parameters(huge).window_size == 64 << 20
    for body in (small, huge):
        [item] = Unpacker().unpack(FrameKind.PACKED, memoryview(packed(Codec.ZSTD, body, len(ONE_PAGE))))
        assert content(item[3]) == ONE_PAGE[-PAGE_SIZE:]
    assert "memory" in str(refused(FrameKind.PACKED, packed(Codec.ZSTD, huge[:-1], len(ONE_PAGE))))


def test_an_unknown_codec_is_refused_by_name() -> None:
    error = refused(FrameKind.PACKED, packed(3, ONE_PAGE, len(ONE_PAGE)))
    assert "codec 3" in str(error)
    assert error.remedy


def test_numbers_that_must_be_zero_are() -> None:
    payload = struct.pack("<IIII", Codec.NONE, len(ONE_PAGE), NOT_KEPT, 1) + ONE_PAGE
    assert "must be 0" in str(refused(FrameKind.PACKED, payload))


def test_a_slot_in_which_nothing_is_kept_is_refused() -> None:
    unpacker = Unpacker()
    assert "slot 0" in str(refused(FrameKind.COPIES, copies(1, 0), unpacker))
    payload = packed(Codec.NONE, ONE_PAGE, len(ONE_PAGE), slot=0)
    list(unpacker.unpack(FrameKind.PACKED, memoryview(payload)))
    [item] = unpacker.unpack(FrameKind.COPIES, memoryview(copies(2, 0, 0)))
    assert content(item[3]) == b"page" * (PAGE_SIZE // 2)
    for number in (1, slots.SLOTS, 2**32 - 1):
        assert f"slot {number}" in str(refused(FrameKind.COPIES, copies(2, 0, number), unpacker))


def test_pages_are_kept_without_a_gap_and_within_the_table() -> None:
    unpacker = Unpacker()
    refused(FrameKind.PACKED, packed(Codec.NONE, ONE_PAGE, len(ONE_PAGE), slot=1), unpacker)
    for slot in range(slots.SLOTS):
        payload = packed(Codec.NONE, ONE_PAGE, len(ONE_PAGE), slot)
        list(unpacker.unpack(FrameKind.PACKED, memoryview(payload)))
    refused(FrameKind.PACKED, packed(Codec.NONE, ONE_PAGE, len(ONE_PAGE), slots.SLOTS), unpacker)
    refused(FrameKind.PACKED, packed(Codec.NONE, ONE_PAGE, len(ONE_PAGE), 2**32 - 2), unpacker)


def test_copies_have_a_slot_for_every_page_and_fit_into_a_chunk() -> None:
    unpacker = Unpacker()
    list(unpacker.unpack(FrameKind.PACKED, memoryview(packed(Codec.NONE, ONE_PAGE, len(ONE_PAGE), slot=0))))
    most = slots.CHUNK_PAGES
    [item] = unpacker.unpack(FrameKind.COPIES, memoryview(copies(most, *[0] * most)))
    assert item[3] is not None
    assert len(item[3]) == MIB
    for payload in (
        copies(2, 0),
        copies(1, 0, 0),
        copies(1),
        copies(1, 0) + b"x",
        copies(most + 1, *[0] * (most + 1)),
    ):
        assert "slots" in str(refused(FrameKind.COPIES, payload, unpacker))


def test_zeroes_are_runs_and_nothing_else() -> None:
    head = frames.pages_head(1, 2, [(0, PAGE_SIZE), (1 << 40, 1 << 46)])
    assert list(Unpacker().unpack(FrameKind.ZEROES, memoryview(head))) == [
        (1, 2, [(0, PAGE_SIZE), (1 << 40, 1 << 46)], None)
    ]
    assert "too many" in str(refused(FrameKind.ZEROES, head + b"\0"))


@pytest.mark.parametrize("kind", [FrameKind.ZEROES, FrameKind.COPIES, FrameKind.PACKED, FrameKind.PAGES])
@pytest.mark.parametrize(
    "runs", [[(0, 1)], [(0, 0)], [(PAGE_SIZE, 0)], [(PAGE_SIZE, 2 * PAGE_SIZE), (0, PAGE_SIZE)]]
)
def test_impossible_runs_are_refused_in_every_kind(kind: FrameKind, runs: list[tuple[int, int]]) -> None:
    head = frames.pages_head(0, 0, runs)
    refused(kind, packed(Codec.NONE, head, len(head)) if kind is FrameKind.PACKED else head)


def test_a_frame_is_dealt_with_whether_or_not_its_pages_are_looked_at() -> None:
    unpacker = Unpacker()
    unpacker.unpack(FrameKind.PACKED, memoryview(packed(Codec.NONE, ONE_PAGE, len(ONE_PAGE), slot=0)))
    [item] = unpacker.unpack(FrameKind.COPIES, memoryview(copies(1, 0)))
    assert content(item[3]) == ONE_PAGE[-PAGE_SIZE:]


def test_another_kind_is_refused_by_name() -> None:
    assert "TREE" in str(refused(FrameKind.TREE, ONE_PAGE))


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        (FrameKind.PAGES, frames.PAGES_LIMIT_BYTES),
        (FrameKind.PACKED, frames.PAGES_LIMIT_BYTES),
        (FrameKind.ZEROES, 16 + 2048 * 16),
        (FrameKind.COPIES, 16 + 2048 * 16 + MIB // PAGE_SIZE * 4),
    ],
)
def test_frames_about_pages_have_limits_of_their_own(kind: FrameKind, limit: int) -> None:
    frames.read_frame_header(struct.pack("<IIQQ", kind, 0, limit, 0))
    with pytest.raises(ImageError, match=kind.name):
        frames.read_frame_header(struct.pack("<IIQQ", kind, 0, limit + 1, 0))


def test_what_is_packed_stays_within_the_limits_of_its_frame() -> None:
    """One page a run, so that the head is as long as it gets."""
    packer = Packer(link_bytes_per_s=FAST)
    runs = [(at * 2 * PAGE_SIZE, (at * 2 + 1) * PAGE_SIZE) for at in range(slots.CHUNK_PAGES)]
    with mock.patch.object(slots.Watch, "next", return_value=True):
        for data in (hard(1), hard(1), bytes(MIB)):
            for kind, parts in packer.pack(0, 0, runs, memoryview(data)):
                frames.read_frame_header(frames.frame_header(kind, parts))


def test_numbers_of_codecs_and_kinds_keep_their_meaning() -> None:
    assert [(codec.name, codec.value) for codec in codecs.Codec] == [("NONE", 0), ("LZ4", 1), ("ZSTD", 2)]
    assert (FrameKind.ZEROES, FrameKind.COPIES, FrameKind.PACKED) == (15, 16, 17)
