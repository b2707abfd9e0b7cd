"""A series whose images do not belong together is refused in one line, and nothing of it is left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from godwit import api
from godwit.errors import GodwitError, ImageError, RequestError
from godwit.images import codec
from godwit.migrate.entries import EndEntry
from godwit.migrate.store import STREAM_NAME
from godwit.types import PAGE_SIZE
from godwit.wire import frames
from godwit.wire.frames import FrameKind
from tests.conftest import requires
from tests.kernel import counting as tools
from tests.kernel import images
from tests.kernel.incremental import header_of, kinds, take
from tests.kernel.test_bad_images import ended, nothing_left

pytestmark = [requires("root", "command:cc")]

Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Good:
    """Three images: a whole one, and two that go on from it and from each other."""

    directory: Path
    marker: str


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    directory = tmp_path_factory.mktemp("series")
    with tools.counting(tools.compiled(directory), directory) as counter:
        take(counter.pid, directory / "images", 3, after=lambda _: counter.wait_for_progress(2))
        marker = counter.marker
    assert header_of(directory / "images" / "0003").parent
    return Good(directory / "images", marker)


def refused(spoil: Spoil, good: Good, directory: Path, image: str = "0003") -> GodwitError:
    """Spoil a copy of the series, and restore an image that must not come to life; return the error."""
    at = directory / "images"
    shutil.copytree(good.directory, at)
    spoil(at)
    with nothing_left(good.marker), pytest.raises(GodwitError) as caught:
        ended(api.restore(at / image, pod=True))
    assert "\n" not in caught.value.line()
    return caught.value


def test_the_series_itself_comes_to_life(good: Good, tmp_path: Path) -> None:
    """What follows would prove nothing if it did not; also as a copy, and by a link to it."""
    shutil.copytree(good.directory, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy" / "0003")
    for image in (good.directory, good.directory / "0002", tmp_path / "copy", tmp_path / "link"):
        with nothing_left(good.marker):
            restored = api.restore(image, pod=True)
            tools.until(lambda: tools.state_of(restored.root_pid) in "RS", "it runs")  # noqa: B023
            ended(restored)


def rewritten(image: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Change the bytes of an image's stream."""

    def spoil(at: Path) -> None:
        path = at / image / STREAM_NAME
        path.write_bytes(change(path.read_bytes()))

    return spoil


def in_header(image: str, **values: object) -> Spoil:
    return rewritten(
        image,
        lambda raw: images.changed(raw, FrameKind.HEADER, lambda entry: replace(entry, **values)),
    )


def with_frames(image: str, change: Callable[[list[images.Frame]], list[images.Frame]]) -> Spoil:
    return rewritten(image, lambda raw: images.join(change(images.split(raw))))


def frame(kind: FrameKind, payload: bytes) -> images.Frame:
    return images.Frame(kind, payload, 0)


def before_end(kind: FrameKind, payload: bytes, image: str = "0003") -> Spoil:
    """Put one more frame about pages at the end of an image, and count it."""

    def change(parts: list[images.Frame]) -> list[images.Frame]:
        end = codec.decode(parts[-1].payload, EndEntry)
        more = codec.encode(replace(end, frames=end.frames + 1))
        return [*parts[:-1], frame(kind, payload), frame(FrameKind.END, more)]

    return with_frames(image, change)


def index_of(parts: list[images.Frame], kind: FrameKind) -> int:
    return next(at for at, part in enumerate(parts) if part.kind is kind)


def swapped(one: FrameKind, other: FrameKind) -> Spoil:
    def change(parts: list[images.Frame]) -> list[images.Frame]:
        first, second = index_of(parts, one), index_of(parts, other)
        parts[first], parts[second] = parts[second], parts[first]
        return parts

    return with_frames("0003", change)


def last_outline_as(kind: FrameKind) -> Spoil:
    """Let the last OUTLINE pass for a frame of another kind: a kind is in no checksum."""

    def change(parts: list[images.Frame]) -> list[images.Frame]:
        at = index_of(parts, FrameKind.TREE) - 1
        assert parts[at].kind is FrameKind.OUTLINE
        parts[at] = replace(parts[at], kind=kind)
        return parts

    return with_frames("0003", change)


def changed_parent(at: Path) -> None:
    """Give the parent another page, with every checksum right."""

    def change(payload: bytes) -> bytes:
        return payload[:-1] + bytes([payload[-1] ^ 1])

    rewritten("0002", lambda raw: images.payload_changed(raw, FrameKind.PAGES, change))(at)


def circle(at: Path) -> None:
    in_header("0001", parent=header_of(at / "0002").migration)(at)


def own_parent(at: Path) -> None:
    in_header("0003", parent=header_of(at / "0003").migration)(at)


def skipping_one(at: Path) -> None:
    """Let the third go on from the first."""
    in_header("0003", parent=header_of(at / "0001").migration)(at)


def twice(at: Path) -> None:
    shutil.copytree(at / "0002", at / ".0077")


def without(image: str) -> Spoil:
    return lambda at: shutil.rmtree(at / image)


def fifo(at: Path) -> None:
    (at / "0002" / STREAM_NAME).unlink()
    os.mkfifo(at / "0002" / STREAM_NAME)


def somebody_elses(at: Path) -> None:
    os.chown(at / "0002" / STREAM_NAME, 4711, 4711)


RUN = frames.pages_head(0, 0, [(PAGE_SIZE, 2 * PAGE_SIZE)])
WRONG: dict[str, tuple[Spoil, str]] = {
    "missing_parent": (without("0002"), "which is not in"),
    "missing_first": (without("0001"), "which is not in"),
    "parent_that_has_changed": (changed_parent, "has changed since"),
    "parent_cut_short": (rewritten("0001", lambda raw: raw[: len(raw) // 2]), "truncated"),
    "parent_that_is_a_fifo": (fifo, "which is not in"),
    "parent_of_another_user": (somebody_elses, "which is not in"),
    "parent_with_a_damaged_page": (
        rewritten("0001", lambda raw: raw[:-200] + bytes([raw[-200] ^ 1]) + raw[-199:]),
        "damaged",
    ),
    "parents_in_a_circle": (circle, "in a circle"),
    "its_own_parent": (own_parent, "in a circle"),
    "parent_out_of_order": (skipping_one, "has changed since"),
    "parent_there_twice": (twice, "more than once"),
    "parent_of_another_program": (in_header("0002", pid=77), "another program"),
    "parent_of_another_architecture": (in_header("0002", architecture="riscv64"), "another architecture"),
    "parent_by_path": (in_header("0003", parent="../images/0002"), "impossible name"),
    "parent_by_absolute_path": (in_header("0003", parent="/etc/passwd"), "impossible name"),
    "parent_of_many_letters": (in_header("0003", parent="a" * 100_000), "impossible name"),
    "parent_with_a_line_end": (in_header("0003", parent="0" * 32 + "\n"), "impossible name"),
    "tree_before_outline": (swapped(FrameKind.OUTLINE, FrameKind.TREE), "where OUTLINE should come"),
    "files_before_tree": (swapped(FrameKind.FILES, FrameKind.TREE), "where"),
    "pages_before_outline": (swapped(FrameKind.OUTLINE, FrameKind.PAGES), "where OUTLINE should come"),
    "outline_that_passes_for_a_round": (last_outline_as(FrameKind.ROUND), "malformed RoundEntry"),
    "more_after_the_end": (
        with_frames("0003", lambda parts: [*parts, parts[-1]]),
        "goes on after its end",
    ),
    "more_after_the_parents_end": (
        with_frames("0002", lambda parts: [*parts, parts[-1]]),
        "goes on after its end",
    ),
    "pages_left_behind": (before_end(FrameKind.LEFT, RUN), "no image may"),
    "drop_beyond_the_mappings": (before_end(FrameKind.DROP, RUN), "no private mapping"),
    "drop_beyond_the_mappings_of_the_parent": (before_end(FrameKind.DROP, RUN, "0002"), "no private mapping"),
    "drop_of_a_process_there_is_not": (
        before_end(FrameKind.DROP, frames.pages_head(7, 0, [(PAGE_SIZE, 2 * PAGE_SIZE)])),
        "process 7",
    ),
    "drop_of_an_object_there_is_not": (
        before_end(FrameKind.DROP, frames.pages_head(frames.OBJECT, 9, [(0, PAGE_SIZE)])),
        "memory object 9",
    ),
    "a_frame_of_a_move": (before_end(FrameKind.GO, b"\x80"), "GO where"),
    "a_round_of_nothing": (
        with_frames("0003", lambda parts: [part for part in parts if part.kind is not FrameKind.ROUND][:2]),
        "truncated",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_images_that_do_not_belong_together_are_refused_by_name(
    name: str, good: Good, tmp_path: Path
) -> None:
    spoil, about = WRONG[name]
    error = refused(spoil, good, tmp_path)
    assert type(error) is ImageError, f"{type(error).__name__}: {error.message}"
    assert error.exit_status == 6
    assert about in error.line(), error.line()
    assert str(tmp_path) in error.line()
    assert len(error.line()) < 1000


def test_an_image_needs_no_later_one(good: Good, tmp_path: Path) -> None:
    shutil.copytree(good.directory, tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "0003")
    changed = tmp_path / "images" / "0002"
    changed.rename(tmp_path / "images" / ".0002")
    with nothing_left(good.marker):
        ended(api.restore(tmp_path / "images", pod=True))
        ended(api.restore(tmp_path / "images" / ".0002", pod=True))


def test_the_newest_is_that_of_the_highest_number(good: Good, tmp_path: Path) -> None:
    shutil.copytree(good.directory, tmp_path / "images")
    (tmp_path / "images" / "0003").rename(tmp_path / "images" / "10003")
    for stray in ("0009", "20000.partial", ".20000.partial", "99999x", "notes"):
        (tmp_path / "images" / stray).mkdir()
    with nothing_left(good.marker):
        restored = api.restore(tmp_path / "images", pod=True)
        assert restored.report.migration == header_of(good.directory / "0003").migration
        ended(restored)


def test_a_directory_with_nothing_but_hidden_images_holds_none(good: Good, tmp_path: Path) -> None:
    shutil.copytree(good.directory, tmp_path / "images")
    for image in ("0001", "0002", "0003"):
        (tmp_path / "images" / image).rename(tmp_path / "images" / f".{image}")
    with pytest.raises(RequestError, match="holds no image"):
        api.restore(tmp_path / "images", pod=True)


def test_an_increment_has_what_the_specification_says(good: Good) -> None:
    found = kinds(good.directory / "0002")
    assert found[:2] == [FrameKind.HEADER, FrameKind.OUTLINE]
    frozen = found[found.index(FrameKind.TREE) - 1 :]
    assert frozen[:3] == [FrameKind.OUTLINE, FrameKind.TREE, FrameKind.FILES]
    assert frozen[-1] is FrameKind.END
    assert set(frozen[3:-1]) <= {FrameKind.PAGES, FrameKind.DROP}
    assert set(found[2 : -len(frozen)]) <= {
        FrameKind.PAGES,
        FrameKind.DROP,
        FrameKind.ROUND,
        FrameKind.OUTLINE,
    }
