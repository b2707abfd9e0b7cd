"""An image that is damaged, foreign or dishonest is refused in one line, and nothing of it is left."""

# ruff: noqa: ANN401

from __future__ import annotations

import contextlib
import functools
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import xxhash

from godwit import api
from godwit.errors import GodwitError, ImageError, RefusedError, RequestError
from godwit.images import codec
from godwit.migrate.entries import EndEntry, FileEntry, FilesEntry, HeaderEntry
from godwit.migrate.store import STREAM_NAME
from godwit.procfs import cpuinfo
from godwit.resources.memory import VmaEntry
from godwit.resources.process import TreeEntry
from godwit.types import PAGE_SIZE
from godwit.wire import frames
from godwit.wire.frames import FrameKind
from tests.conftest import requires
from tests.kernel import counting as tools
from tests.kernel import images

pytestmark = [requires("root", "command:cc")]

FLIPS: Final = 48
Change = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Sample:
    """A real image, and the word by which its program would be recognised."""

    raw: bytes
    marker: str


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    directory = tmp_path_factory.mktemp("image")
    with tools.counting(tools.compiled(directory), directory) as counter:
        api.checkpoint(counter.pid, directory / "image")
        until_gone(counter)
        return Sample((directory / "image" / STREAM_NAME).read_bytes(), counter.marker)


def until_gone(counter: tools.Counting) -> None:
    tools.until(lambda: not counter.copies(), "the program ends after its checkpoint")


def holdings(marker: str) -> tuple[Any, ...]:
    """List what a restore could leave behind."""
    mounts = Path("/proc/self/mountinfo").read_text()
    strays = tools.session_strays(set())
    return (
        tools.carrying(marker, "cmdline"),
        sorted(tools.pods()),
        strays,
        mounts,
        len(os.listdir("/proc/self/fd")),
    )


@contextlib.contextmanager
def nothing_left(marker: str) -> Iterator[None]:
    before = holdings(marker)
    yield
    tools.until(lambda: holdings(marker) == before, f"all is as before: {before} {holdings(marker)}", 5)


def refused(raw: bytes, sample: Sample, directory: Path) -> GodwitError:
    """Restore an image that must not come to life; return the error."""
    image = directory / "bad"
    image.mkdir(exist_ok=True)
    (image / STREAM_NAME).write_bytes(raw)
    with nothing_left(sample.marker), pytest.raises(GodwitError) as caught:
        ended(api.restore(image, pod=True))
    return caught.value


def ended(restored: api.Restored) -> None:
    """End what came to life. With odd registers it may have ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(restored.root_pid, 9)
    restored.wait()


def expect_image_error(error: GodwitError, directory: Path, *, about: str = "") -> None:
    assert type(error) is ImageError, f"{type(error).__name__}: {error.message}"
    assert error.exit_status == 6
    assert "\n" not in error.line()
    assert str(directory / "bad" / STREAM_NAME) in error.line()
    assert about in error.line()


def test_the_sample_itself_comes_to_life(sample: Sample, tmp_path: Path) -> None:
    """What follows would prove nothing if it did not."""
    assert images.join(images.split(sample.raw)) == sample.raw
    image = tmp_path / "good"
    image.mkdir()
    (image / STREAM_NAME).write_bytes(sample.raw)
    with nothing_left(sample.marker):
        restored = api.restore(image, pod=True)
        tools.until(lambda: tools.state_of(restored.root_pid) in "RS", "it runs")
        os.kill(restored.root_pid, 9)
        assert restored.wait() == 128 + 9


def cuts(raw: bytes) -> list[int]:
    """Return lengths at which an image may end too early: around every frame, and within."""
    found = {0, 1, frames.PREAMBLE_BYTES - 1, frames.PREAMBLE_BYTES, len(raw) - 1}
    for part in images.split(raw):
        body = part.offset + frames.FRAME_HEADER_BYTES
        found |= {part.offset, part.offset + 1, body, body + len(part.payload) // 2}
    return sorted(found)


def test_an_image_truncated_anywhere_is_refused(sample: Sample, tmp_path: Path) -> None:
    for length in cuts(sample.raw):
        error = refused(sample.raw[:length], sample, tmp_path)
        expect_image_error(error, tmp_path, about="")
        assert error.remedy, (length, error.line())


def flips(raw: bytes) -> list[int]:
    """Return offsets to flip a bit at: all of the preamble, frame headers, and some of the rest."""
    chance = random.Random(7)  # seeded: the same each time
    found = list(range(frames.PREAMBLE_BYTES))
    for part in images.split(raw):
        found += [part.offset + at for at in (0, 1, 4, 8, 10, 15, 16, 23)]
    return found + [chance.randrange(len(raw)) for _ in range(FLIPS)]


def test_an_image_with_one_bit_flipped_anywhere_is_refused(sample: Sample, tmp_path: Path) -> None:
    for number, offset in enumerate(flips(sample.raw)):
        raw = bytearray(sample.raw)
        raw[offset] ^= 1 << number % 8
        expect_image_error(refused(bytes(raw), sample, tmp_path), tmp_path)


def of_format(raw: bytes, version: int) -> bytes:
    head = struct.pack("<8sHH", frames.MAGIC, version, 0)
    return head + struct.pack("<I", xxhash.xxh32_intdigest(head)) + raw[frames.PREAMBLE_BYTES :]


def test_an_image_of_a_newer_format_names_both_formats(sample: Sample, tmp_path: Path) -> None:
    error = refused(of_format(sample.raw, frames.FORMAT + 1), sample, tmp_path)
    expect_image_error(
        error, tmp_path, about=f"format {frames.FORMAT + 1}; this Godwit reads up to {frames.FORMAT}"
    )
    assert "newer" in error.remedy


def in_header(**values: Any) -> Change:
    return lambda raw: images.changed(raw, FrameKind.HEADER, lambda entry: replace(entry, **values))


def in_outline(*path: str | int, value: Any) -> Change:
    return lambda raw: images.changed(raw, FrameKind.OUTLINE, lambda entry: images.deep(entry, path, value))


def in_tree(*path: str | int, value: Any) -> Change:
    return lambda raw: images.changed(raw, FrameKind.TREE, lambda entry: images.deep(entry, path, value))


def both(first: Change, second: Change) -> Change:
    return lambda raw: second(first(raw))


def everywhere(change: Callable[[Any], Any]) -> Change:
    """Change what the outline and the tree both hold: `identities` and the like."""

    def apply(raw: bytes) -> bytes:
        raw = images.changed(raw, FrameKind.OUTLINE, lambda entry: (change(entry[0]), *entry[1:]))
        return images.changed(raw, FrameKind.TREE, change)

    return apply


def with_pid(pid: int) -> Change:
    def change(entry: Any) -> Any:
        entry = images.deep(entry, ("identities", 0, "pid"), pid)
        entry = images.deep(entry, ("identities", 0, "tids"), (pid,))
        if isinstance(entry, TreeEntry):
            entry = images.deep(entry, ("processes", 0, "identity"), entry.identities[0])
            return images.deep(entry, ("processes", 0, "threads", 0, "tid"), pid)
        return images.deep(entry, ("spaces", 0, "pid"), pid)

    return both(everywhere(change), in_header(pid=pid))


def overlapping(vmas: tuple[VmaEntry, ...]) -> tuple[VmaEntry, ...]:
    return (replace(vmas[0], end=vmas[1].start + PAGE_SIZE), *vmas[1:])


def overlap_in_outline(raw: bytes) -> bytes:
    def change(entry: Any) -> Any:
        return images.deep(entry, (0, "spaces", 0, "vmas"), overlapping(entry[0].spaces[0].vmas))

    return images.changed(raw, FrameKind.OUTLINE, change)


def overlap_in_tree(raw: bytes) -> bytes:
    def change(entry: Any) -> Any:
        path = ("processes", 0, "memory", "vmas")
        return images.deep(entry, path, overlapping(entry.processes[0].memory.vmas))

    return images.changed(raw, FrameKind.TREE, change)


def with_file(tag: int, body: bytes = b"\x80") -> Change:
    def change(entry: FilesEntry) -> FilesEntry:
        return FilesEntry(files=(*entry.files, FileEntry(tag=tag, body=body)))

    return lambda raw: images.changed(raw, FrameKind.FILES, change)


def without_files(raw: bytes) -> bytes:
    return images.changed(raw, FrameKind.FILES, lambda _: FilesEntry(files=()))


def counted(pages: int, count: int) -> Change:
    def change(entry: EndEntry) -> EndEntry:
        return EndEntry(pages=entry.pages + pages, frames=entry.frames + count)

    return lambda raw: images.changed(raw, FrameKind.END, change)


def pages(process: int, object_id: int, *runs: tuple[int, int], data: bytes = bytes(PAGE_SIZE)) -> Change:
    payload = frames.pages_head(process, object_id, runs) + data
    return lambda raw: images.payload_changed(raw, FrameKind.PAGES, lambda _: payload)


def dropped(kind: FrameKind) -> Change:
    return lambda raw: images.join([part for part in images.split(raw) if part.kind is not kind])


DISHONEST: dict[str, tuple[Change, str]] = {
    "frame_of_2^40_pages": (lambda raw: images.announcing(raw, FrameKind.PAGES, PAGE_SIZE << 40), "limit"),
    "frame_of_2^40_runs": (
        lambda raw: images.payload_changed(
            raw, FrameKind.PAGES, lambda _: struct.pack("<IIII", 0, 0, 2**32 - 1, 0)
        ),
        "claims 4294967295 runs",
    ),
    "run_of_2^40_pages": (pages(0, 0, (PAGE_SIZE, PAGE_SIZE << 40)), "pages"),
    "entries_of_256_MiB_that_do_not_come": (
        lambda raw: images.announcing(raw, FrameKind.TREE, frames.ENTRIES_LIMIT_BYTES),
        "truncated",
    ),
    "entries_beyond_the_limit": (
        lambda raw: images.announcing(raw, FrameKind.TREE, frames.ENTRIES_LIMIT_BYTES + 1),
        "limit",
    ),
    "overlapping_mappings_in_outline": (overlap_in_outline, "out of order"),
    "overlapping_mappings_in_tree": (overlap_in_tree, "out of order"),
    "mapping_beyond_user_space": (
        in_outline(0, "spaces", 0, "vmas", 0, "end", value=1 << 63),
        "outside of user space",
    ),
    "mapping_with_impossible_protection": (
        in_outline(0, "spaces", 0, "vmas", 0, "protection", value=64),
        "impossible protection",
    ),
    "pid_0": (with_pid(0), "out of range"),
    "pid_of_init": (with_pid(1), "out of range"),
    "pid_beyond_any": (with_pid(1 << 22), "out of range"),
    "pid_of_the_header_differs": (in_header(pid=77), "do not match"),
    "thread_that_is_not_listed": (in_tree("processes", 0, "threads", 0, "tid", value=9), "threads"),
    "no_process": (in_outline(0, "identities", value=()), "no process"),
    "short_registers": (in_tree("processes", 0, "threads", 0, "registers", value=b"x"), "bytes of registers"),
    "short_xstate": (in_tree("processes", 0, "threads", 0, "xstate", value=b"x"), "extended state"),
    "layout_of_three": (in_tree("processes", 0, "memory", "layout", value=(1, 2, 3)), "layout"),
    "auxv_of_odd_length": (in_tree("processes", 0, "memory", "auxv", value=b"x"), "auxiliary vector"),
    "executable_that_is_not_listed": (in_tree("processes", 0, "exe", value=4000), "not listed"),
    "path_that_is_not_absolute": (in_outline(0, "path_files", 0, "path", value=b"etc"), "absolute"),
    "open_file_of_unknown_kind": (with_file(4711), "kind 4711"),
    "open_file_of_a_refused_kind": (with_file(19), "never carried"),
    "malformed_open_file": (with_file(1, b"\xc1"), "malformed"),
    "no_open_files": (without_files, "lacks open file"),
    "a_page_too_few": (counted(1, 0), "announces"),
    "a_frame_too_few": (counted(0, 1), "announces"),
    "page_outside_of_every_mapping": (pages(0, 0, (PAGE_SIZE, 2 * PAGE_SIZE)), ""),
    "page_of_no_process": (pages(7, 0, (PAGE_SIZE, 2 * PAGE_SIZE)), "process 7"),
    "page_of_no_object": (pages(frames.OBJECT, 9, (0, PAGE_SIZE)), "object 9"),
    "half_a_page": (pages(0, 0, (1, 2), data=b"x"), "impossible run"),
    "pages_backwards": (
        pages(0, 0, (2 * PAGE_SIZE, 3 * PAGE_SIZE), (0, PAGE_SIZE), data=bytes(2 * PAGE_SIZE)),
        "impossible run",
    ),
    "no_outline": (dropped(FrameKind.OUTLINE), "OUTLINE"),
    "no_tree": (dropped(FrameKind.TREE), "TREE"),
    "no_end": (dropped(FrameKind.END), "truncated"),
    "header_of_garbage": (
        lambda raw: images.payload_changed(raw, FrameKind.HEADER, lambda _: b"\xc1"),
        "HeaderEntry",
    ),
}


@pytest.mark.parametrize("name", DISHONEST)
def test_a_dishonest_image_is_refused_by_name(name: str, sample: Sample, tmp_path: Path) -> None:
    change, about = DISHONEST[name]
    expect_image_error(refused(change(sample.raw), sample, tmp_path), tmp_path, about=about)


def expect_refusal(error: GodwitError, what: str) -> None:
    assert isinstance(error, RefusedError), f"{type(error).__name__}: {error.message}"
    assert error.exit_status == 3
    assert error.refusals[0].what.startswith(what), error.line()
    assert error.refusals[0].remedy
    assert "\n" not in error.line()


def test_an_image_of_another_architecture_is_refused(sample: Sample, tmp_path: Path) -> None:
    error = refused(in_header(architecture="riscv64")(sample.raw), sample, tmp_path)
    expect_refusal(error, "architecture riscv64")


def test_an_image_that_needs_features_this_cpu_lacks_is_refused(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cpuinfo.read()
    monkeypatch.setattr(cpuinfo, "read", lambda: replace(whole, flags=whole.flags - {"sse2", "avx2"}))
    expect_refusal(refused(sample.raw, sample, tmp_path), "CPU features ")


def test_an_image_larger_than_the_free_memory_is_refused(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("godwit.migrate.admit._available_bytes", lambda: 4096)
    expect_refusal(refused(sample.raw, sample, tmp_path), "0 MiB of memory")


def test_an_image_whose_executable_is_gone_is_refused(sample: Sample, tmp_path: Path) -> None:
    raw = everywhere(
        lambda entry: images.deep(entry, ("path_files", 0, "path"), b"/nowhere/program"),
    )(sample.raw)
    error = refused(raw, sample, tmp_path)
    assert isinstance(error, RefusedError)
    assert "/nowhere/program" in error.line()


def _no_directory(path: Path) -> None:
    """Make nothing."""


def _a_file(path: Path) -> None:
    path.write_text("x")


def _stream_is_a_directory(path: Path) -> None:
    (path / STREAM_NAME).mkdir(parents=True)


@pytest.mark.parametrize("make", [_no_directory, Path.mkdir, _a_file, _stream_is_a_directory])
def test_a_directory_without_an_image_is_a_wrong_request(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    make(place)
    for pod in (True, False):
        with nothing_left("no such program"), pytest.raises(RequestError) as caught:
            api.restore(place, pod=pod)
        assert str(place) in caught.value.line()
        assert caught.value.remedy
        assert "\n" not in caught.value.line()


@pytest.mark.parametrize(
    "name", ["frame_of_2^40_pages", "entries_of_256_MiB_that_do_not_come", "run_of_2^40_pages"]
)
def test_no_memory_is_asked_for_before_lengths_were_checked(
    name: str, sample: Sample, tmp_path: Path
) -> None:
    """In 400 MB of address space such a claim must fail as a bad image, not for want of memory."""
    (tmp_path / STREAM_NAME).write_bytes(DISHONEST[name][0](sample.raw))
    done = subprocess.run(
        [
            "prlimit",
            "--as=400000000:unlimited",
            sys.executable,
            "-m",
            "tests.kernel.mover",
            "restore",
            tmp_path,
        ],
        env=tools.Machine(tmp_path).environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tools.ROOT,
    )
    assert done.returncode == ImageError.exit_status, done.stdout + done.stderr


def sizes(entry: Any, pattern: tuple[int, ...]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Yield every number in an entry with one of the values that no honest source would write."""
    for path, value in images.leaves(entry):
        if isinstance(value, int) and not isinstance(value, bool):
            for wrong in pattern:
                yield path, wrong


EXTREMES = (-1, 1 << 31, 1 << 63, (1 << 64) - 1)


def outcome_of(raw: bytes, sample: Sample, directory: Path) -> str:
    """Restore an image that may or may not be honest: it runs, or it is refused, and nothing else."""
    image = directory / "odd"
    image.mkdir(exist_ok=True)
    (image / STREAM_NAME).write_bytes(raw)
    with nothing_left(sample.marker):
        try:
            ended(api.restore(image, pod=True))
        except GodwitError as error:
            status, message = error.exit_status, error.message
            assert status != 70, message
            return error.line()
    return "runs"


@pytest.mark.parametrize("kind", [FrameKind.HEADER, FrameKind.OUTLINE, FrameKind.TREE, FrameKind.END])
def test_numbers_beyond_reason_never_end_in_a_bug(kind: FrameKind, sample: Sample, tmp_path: Path) -> None:
    """Each number of each entry, a sample of them: the image runs or is refused; a traceback is neither."""
    part = next(each for each in images.split(sample.raw) if each.kind is kind)
    entry = codec.decode(part.payload, images.TYPES[kind])
    chance = random.Random(11)  # seeded: the same each time
    places = list(sizes(entry, EXTREMES))
    for path, wrong in chance.sample(places, min(len(places), 60)):
        raw = images.changed(sample.raw, kind, functools.partial(images.deep, path=path, value=wrong))
        try:
            outcome_of(raw, sample, tmp_path)
        except AssertionError as error:
            error.add_note(f"with {kind.name} {path} = {wrong}")
            raise


def test_the_header_can_be_read_without_the_rest(sample: Sample) -> None:
    header = codec.decode(images.split(sample.raw)[0].payload, HeaderEntry)
    assert header.program == b"counter"
