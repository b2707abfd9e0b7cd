"""What a released format wrote is read for ever, and means what it meant."""

# ruff: noqa: ANN401

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from godwit.images import codec
from godwit.migrate.channel import Channel, FdPipe
from godwit.migrate.journal import State
from godwit.resources import registry
from godwit.types import PAGE_SIZE
from godwit.wire import frames
from godwit.wire.frames import FrameKind
from tests.golden import samples

KINDS = samples.kinds()
FORMATS = sorted(samples.DIRECTORY.glob("format[0-9]*"))
SAMPLES = [path for directory in FORMATS for path in sorted(directory.glob("*.json"))]

# Numbers and words that are in images out there. Lines are added, and never changed.
FRAME_NUMBERS = {
    "HEADER": 1,
    "HELLO": 2,
    "OUTLINE": 3,
    "VERDICT": 4,
    "TREE": 5,
    "FILES": 6,
    "PAGES": 7,
    "END": 8,
    "READY": 9,
    "GO": 10,
    "RUNNING": 11,
    "ABORT": 12,
    "QUERY": 13,
    "ANSWER": 14,
    "ZEROES": 15,
    "COPIES": 16,
    "PACKED": 17,
    "DROP": 18,
    "ROUND": 19,
    "LEFT": 20,
    "REQUEST": 21,
    "CREDIT": 22,
    "DRAINED": 23,
    "RESUME": 24,
    "LANE": 25,
}
FILE_TAGS = {
    "file": 1,
    "eventfd": 10,
    "timerfd": 11,
    "signalfd": 12,
    "epoll": 13,
    "pipe": 14,
    "unix socket": 15,
    "memfd": 16,
    "device": 17,
    "internet socket": 18,
    "refused": 19,
    "unknown": 20,
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def missing(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Return where `found` lacks what was wanted. It may have more: later formats add fields."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            line
            for key, value in wanted.items()
            for line in (
                missing(value, found[key], f"{where}.{key}") if key in found else [f"{where}.{key} is gone"]
            )
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return [line for at, pair in pairs for line in missing(*pair, f"{where}[{at}]")]
    return [] if wanted == found else [f"{where} is {found!r}, and was {wanted!r}"]


@pytest.mark.parametrize("path", SAMPLES, ids=name_of)
def test_an_entry_written_by_a_released_format_means_what_it_meant(path: Path) -> None:
    entry = codec.decode(path.with_suffix(".bin").read_bytes(), KINDS[path.stem])
    assert missing(json.loads(path.read_text()), json.loads(msgspec.json.encode(entry))) == []


@pytest.mark.parametrize("directory", FORMATS, ids=lambda path: path.name)
def test_a_stream_written_by_a_released_format_is_read_to_its_end(directory: Path) -> None:
    with (directory / samples.STREAM).open("rb") as file:
        channel = Channel(FdPipe(file.fileno(), -1))
        assert channel.accept_stream() <= frames.FORMAT
        for name in ("HEADER", "OUTLINE", "TREE", "FILES"):
            _, payload = channel.expect(FrameKind[name])
            codec.decode(payload, KINDS[name.lower()])
        _, payload = channel.expect(FrameKind.PAGES)
        process, _, runs, data = frames.read_pages(payload)
        assert (process, runs) == (0, [(PAGE_SIZE, 2 * PAGE_SIZE), (4 * PAGE_SIZE, 6 * PAGE_SIZE)])
        assert [data[at] for at in range(0, 3 * PAGE_SIZE, PAGE_SIZE)] == [1, 2, 3]
        _, payload = channel.expect(FrameKind.END)
        end = codec.decode(payload, KINDS["end"])
        assert (end.pages, end.frames) == (3, 1)
        assert file.read() == b""


INCREMENTS = [directory for directory in FORMATS if (directory / samples.INCREMENT).exists()]


@pytest.mark.parametrize("directory", INCREMENTS, ids=lambda path: path.name)
def test_an_image_that_goes_on_from_another_is_read_to_its_end(directory: Path) -> None:
    with (directory / samples.INCREMENT).open("rb") as file:
        channel = Channel(FdPipe(file.fileno(), -1))
        assert channel.accept_stream() <= frames.FORMAT
        _, payload = channel.expect(FrameKind.HEADER)
        header = codec.decode(payload, KINDS["header"])
        assert (header.parent, header.parent_digest) == ("0123456789abcdef" * 2, bytes(range(16)))
        found = []
        for name in "OUTLINE DROP PAGES ROUND OUTLINE TREE FILES PAGES END".split():
            kind, payload = channel.expect(FrameKind[name])
            if kind is FrameKind.DROP:
                assert frames.read_runs(payload, kind).runs == [(PAGE_SIZE, 2 * PAGE_SIZE)]
            if kind is FrameKind.PAGES:
                process, object_id, _, data = frames.read_pages(payload)
                found.append((process, object_id, data[0]))
            if name.lower() in KINDS:
                codec.decode(payload, KINDS[name.lower()])
        assert found == [(0, 0, 1), (frames.OBJECT, 1, 2)]
        assert file.read() == b""


def test_an_older_header_goes_on_from_nothing() -> None:
    header = codec.decode((samples.NEWEST / "header.bin").read_bytes(), KINDS["header"])
    assert (header.parent, header.parent_digest) == ("", b"")


def test_every_entry_has_a_sample_in_the_newest_format() -> None:
    """If one is missing: `python -m tests.golden.samples` writes it."""
    written = {path.stem for path in samples.NEWEST.glob("*.json")}
    assert written == set(KINDS)
    assert all((samples.NEWEST / f"{name}.bin").exists() for name in written)
    assert (samples.NEWEST / samples.STREAM).exists()
    assert (samples.NEWEST / samples.INCREMENT).exists()


def test_frame_numbers_keep_their_meaning() -> None:
    assert {kind.name: kind.value for kind in FrameKind} == FRAME_NUMBERS


def test_tags_of_open_files_keep_their_meaning() -> None:
    assert {kind.name: kind.tag for kind in registry.KINDS} == FILE_TAGS


def test_words_of_the_journal_keep_their_meaning() -> None:
    assert {"committed", "ready", "running", "aborted"} <= {state.value for state in State}


def test_the_first_bytes_of_a_stream_stay() -> None:
    assert frames.preamble()[:8] == b"GODWIT\r\n"
    assert frames.PREAMBLE_BYTES == 16
    assert frames.FRAME_HEADER_BYTES == 24


def test_the_specification_lists_every_frame_and_kind_of_file() -> None:
    text = (Path(__file__).parents[2] / "docs/formats/stream.md").read_text()
    for name, number in FRAME_NUMBERS.items():
        assert f"| {number} | `{name}` |" in text
    for name, tag in FILE_TAGS.items():
        assert f"| {tag} | {name} |" in text
