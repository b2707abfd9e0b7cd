"""Compression of page data: what pays, and the two libraries behind it.

Measured on one core of an EPYC, in chunks of 1 MiB, as MB/s and ratio: memory of a Python program lz4 1700
(4.3), zstd -1 1730 (11), and back 7400 and 4200; random bytes lz4 21000, zstd -1 17000, as both skip what
resists.
"""

from __future__ import annotations

import enum
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from godwit.errors import ImageError
from godwit.wire import frames

WORTH_RATIO: Final = 1.2
SAMPLE_BYTES: Final = 128 << 10
# What a link is taken for before anything is known of it: the plain network of an office. A wrong guess
# costs some milliseconds, for the first chunks tell the rate.
_GUESSED_LINK_BYTES_PER_S: Final = 125e6
_ZSTD_LEVEL: Final = 1  # 3 is slower and makes process memory hardly smaller
_ZSTD_WINDOW_LIMIT_BYTES: Final = 2 << 20
_MALLOC_KEEPS_BYTES: Final = 4 << 20


class Codec(enum.IntEnum):
    """How the payload of a PACKED frame is compressed. A number, once released, keeps its meaning."""

    NONE = 0
    LZ4 = 1  # one block, without a frame or a length of its own
    ZSTD = 2  # one frame, with the length of its content


@dataclass(frozen=True, slots=True)
class Sample:
    """What a codec made of a piece of the data."""

    codec: Codec
    ratio: float  # raw to compressed
    bytes_per_s: float  # raw, on this core


def rate(link_bytes_per_s: float | None) -> float:
    """Return the link's rate, or the guess."""
    return link_bytes_per_s or _GUESSED_LINK_BYTES_PER_S


def choose(samples: Sequence[Sample], link_bytes_per_s: float | None) -> Codec:
    """Say which codec brings pages over soonest, when one thread first compresses a chunk and then sends it.

    With the numbers above: zstd below some 12 Gbit/s; lz4 where it is the faster one; beyond, nothing.

    Args:
        samples: Of the data to come; ratios below WORTH_RATIO do not count.
        link_bytes_per_s: None where it is not known.
    """
    link = rate(link_bytes_per_s)
    best, best_s = Codec.NONE, 1 / link
    for sample in samples:
        cost_s = 1 / sample.bytes_per_s + 1 / (sample.ratio * link)
        if sample.ratio >= WORTH_RATIO and cost_s < best_s:
            best, best_s = sample.codec, cost_s
    return best


def keep_freed_memory() -> None:
    """Have malloc(3) keep freed blocks of a megabyte, instead of asking the kernel for each of them anew.

    Freeing a block that came from mmap(2) raises the size from which blocks do: M_MMAP_THRESHOLD in
    mallopt(3). Without this lz4 spends 0.65 ms per MiB in page faults, ten times what it needs for bytes that
    resist.
    """
    bytes(_MALLOC_KEEPS_BYTES)


def _lz4_block() -> ModuleType:
    return importlib.import_module("lz4.block")  # which has no types


class Compressors:
    """Both codecs, ready for use: the libraries are loaded and their memory is there."""

    def __init__(self) -> None:
        import zstandard  # 8 ms, so only for who moves something

        keep_freed_memory()
        self._lz4 = _lz4_block().compress
        self._zstd = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True)
        for codec in (Codec.LZ4, Codec.ZSTD):
            self.compress(codec, memoryview(bytes(frames.CHUNK_BYTES)))

    def compress(self, codec: Codec, data: memoryview) -> bytes:
        """Return the data compressed by LZ4 or ZSTD."""
        if codec is Codec.LZ4:
            return bytes(self._lz4(data, store_size=False))
        return self._zstd.compress(data)

    def sample(self, data: memoryview) -> tuple[Sample, ...]:
        """Compress the middle of the data with each codec."""
        start = max(0, (len(data) - SAMPLE_BYTES) // 2)
        piece = data[start : start + SAMPLE_BYTES]
        return tuple(self._sample(codec, piece) for codec in (Codec.ZSTD, Codec.LZ4))

    def _sample(self, codec: Codec, piece: memoryview) -> Sample:
        # The thread's own time: what others do to this core meanwhile says nothing about the codec.
        start_ns = time.thread_time_ns()
        length = len(self.compress(codec, piece))
        elapsed_ns = max(1, time.thread_time_ns() - start_ns)
        return Sample(codec, len(piece) / length, len(piece) / elapsed_ns * 1e9)


class Decompressors:
    """Both codecs, ready for use, for bytes that somebody else made."""

    def __init__(self) -> None:
        import zstandard

        keep_freed_memory()
        self._lz4 = _lz4_block().decompress
        self._lz4_error: type[Exception] = _lz4_block().LZ4BlockError
        self._zstd = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_LIMIT_BYTES)
        self._zstd_error = zstandard.ZstdError
        self._zstd_content_bytes = zstandard.frame_content_size

    def decompress(self, codec: Codec, data: memoryview, length_bytes: int) -> memoryview:
        """Return what LZ4 or ZSTD data holds, which is at most so much and ends where the data does.

        Raises:
            ImageError: It is damaged, or holds more. No more than `length_bytes` was asked for.
        """
        try:
            raw = self._unlz4(data, length_bytes) if codec is Codec.LZ4 else self._unzstd(data, length_bytes)
        except (self._lz4_error, self._zstd_error, ValueError) as error:
            raise _damaged(codec, str(error)) from error
        return memoryview(raw)

    def _unlz4(self, data: memoryview, length_bytes: int) -> bytes:
        return bytes(self._lz4(data, uncompressed_size=length_bytes))

    def _unzstd(self, data: memoryview, length_bytes: int) -> bytes:
        # The library takes the memory that the frame asks for, whatever limit it is given.
        claimed = self._zstd_content_bytes(data)
        if claimed != length_bytes:
            raise _damaged(Codec.ZSTD, f"it claims {claimed} bytes where {length_bytes} were announced")
        return self._zstd.decompress(data, max_output_size=length_bytes, allow_extra_data=False)


def _damaged(codec: Codec, why: str) -> ImageError:
    why = " ".join(why.split())
    return ImageError(f"a PACKED frame is damaged ({codec.name.lower()}): {why}")
