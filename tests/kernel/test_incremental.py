"""Images of a program that runs on: each can be restored, and holds what the program then held."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from godwit import api
from godwit.errors import BusyError, RefusedError, RequestError
from godwit.migrate import series, taking
from godwit.migrate.copying import Copying
from godwit.migrate.store import STREAM_NAME
from godwit.migrate.taking import Taken, Taker
from godwit.wire.frames import FrameKind
from tests.conftest import requires
from tests.kernel import counting as tools
from tests.kernel.counting import until
from tests.kernel.incremental import (
    answer,
    godwit,
    header_of,
    hidden,
    kinds,
    offset_in,
    phases,
    processes_in,
    shown,
    take,
)
from tests.workloads.driver import WORKLOADS, Running

pytestmark = requires("root", "command:cc")

# So that something changes at every moment, and an image is still small.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "mapper_c": ("rate=0", "mib=16"),
    "forker_c": ("children=8", "life_ms=50", "mib=4"),
    "truncator_c": ("rate=0",),
    "writer_c": ("rate=100", "mib=16"),
}
IMAGES = 6


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


# What `phases.py` says of its memory.
ZEROES, AS = digest(bytes(1 << 20)), digest(b"a" * (1 << 20))
FULL, EMPTY = digest(b"m" * (1_000 + (1 << 20))), digest(bytes(1_000 + (1 << 20)))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.compiled(tmp_path_factory.mktemp("counter"))


@contextlib.contextmanager
def workload(name: str, directory: Path, options: tuple[str, ...]) -> Iterator[Running]:
    reason = WORKLOADS[name].available()
    if reason is not None:
        pytest.skip(reason)
    running = Running.start(WORKLOADS[name], directory, options=options)
    try:
        running.pid()
        running.wait_alive()
        yield running
    finally:
        running.kill()


def judged(running: Running, image: Path, lines: bytes) -> str:
    """Make an image run in a pod, with its log as it then was; return the program's verdict about itself."""
    log = running.dir / "log"
    log.write_bytes(lines[: offset_in(image, log)])
    for path in (*running.dir.glob("result*"), running.dir / "stop"):
        path.unlink(missing_ok=True)
    (running.dir / "alive").write_text("0\n")
    restored = api.restore(image, pod=True)
    try:
        running.wait_alive()
        verdict = running.finish()
        assert (restored.wait() == 0) is verdict.ok, verdict.text
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(restored.pod_init or restored.root_pid, signal.SIGKILL)
    return verdict.text if not verdict.ok else "ok"


def every_image_acquits(name: str, directory: Path, count: int, interval_s: float) -> None:
    at = directory / "images"
    with workload(name, directory / "work", PROGRAMS[name]) as running:
        found = take(running.pid(), at, count, interval_s=interval_s)
        running.wait_alive()
        assert running.finish().ok
        running.kill()
        lines = (running.dir / "log").read_bytes()
        for image in found.images:
            assert judged(running, at / image.image, lines) == "ok", image


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_image_of_a_program_that_changes_all_the_time_acquits(name: str, tmp_path: Path) -> None:
    every_image_acquits(name, tmp_path, IMAGES, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_one_of_many_images_acquits(name: str, tmp_path: Path) -> None:
    every_image_acquits(name, tmp_path, 40, 0.3)


def test_an_image_holds_what_has_changed_since_the_one_before(tmp_path: Path) -> None:
    with workload("writer_c", tmp_path / "work", ("mib=64", "rate=4")) as running:
        found = take(running.pid(), tmp_path / "images", 4, interval_s=0.1)
        running.wait_alive()
        assert running.finish().ok
    whole, *rest = found.images
    assert (whole.goes_on_from, [each.goes_on_from for each in rest]) == ("", ["0001", "0002", "0003"])
    assert whole.report.pages > 64 << 8
    for each in rest:
        assert each.report.pages * 8 < whole.report.pages, each
        assert each.report.bytes_sent * 8 < whole.report.bytes_sent, each
        path = tmp_path / "images" / each.image / STREAM_NAME
        assert each.report.bytes_sent == path.stat().st_size


def test_memory_is_written_before_the_freeze(tmp_path: Path) -> None:
    """One image of a program that runs on, as in a series: what it does not change is not waited for."""
    with workload("writer_c", tmp_path / "work", ("mib=64", "rate=4")) as running:
        report = api.checkpoint(running.pid(), tmp_path / "image", leave_running=True)
        running.wait_alive()
        assert running.finish().ok
        running.kill()
        assert (report.strategy, report.survivor) == ("precopy", "source")
        found = kinds(tmp_path / "image")
        frozen = found[found.index(FrameKind.TREE) :]
        assert found.count(FrameKind.PAGES) > 8 * frozen.count(FrameKind.PAGES)
        assert judged(running, tmp_path / "image", (running.dir / "log").read_bytes()) == "ok"


def test_one_image_needs_no_noting_of_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit.migrate.copying.can_track", lambda _: False)
    with phases(tmp_path / "work", "anonymous") as running:
        report = api.checkpoint(running.pid, tmp_path / "image", leave_running=True)
        running.end()
        assert report.strategy == "stopcopy"
        assert answer(tmp_path / "image", running.directory) == f"anonymous 0: anonymous={AS}"


def told(script: str, directory: Path) -> list[str]:
    """Take an image in each of two phases of a program; return what each says."""
    at = directory / "images"
    with phases(directory / "work", script) as running:
        found = take(running.pid, at, 2, after=lambda number: running.next() if number == 1 else None)
        running.end()
        return [answer(at / image.image, running.directory) for image in found.images]


def test_pages_that_were_given_up_do_not_come_back(tmp_path: Path) -> None:
    first, second = told("anonymous", tmp_path)
    assert (first, second) == (f"anonymous 0: anonymous={AS}", f"anonymous 1: anonymous={ZEROES}")


def test_what_was_cut_off_an_object_does_not_come_back(tmp_path: Path) -> None:
    full, empty = told("object", tmp_path)
    assert (full, empty) == (f"object 0: memfd={FULL}", f"object 1: memfd={EMPTY}")


def test_a_file_that_is_gone_by_now_is_not_asked_for(tmp_path: Path) -> None:
    """The first image maps it, and cannot be restored any more; the one that goes on from it can."""
    at = tmp_path / "images"
    with phases(tmp_path / "work", "file") as running:
        take(running.pid, at, 2, after=lambda number: running.next() if number == 1 else None)
        running.end()
        assert header_of(at / "0002").parent == header_of(at / "0001").migration
        assert answer(at / "0002", running.directory) == "file 1: "
        with pytest.raises(RefusedError, match="mapped"):
            api.restore(at / "0001", pod=True)


def test_a_program_that_executes_another_is_the_other_then(tmp_path: Path) -> None:
    first, second = told("exec", tmp_path)
    assert first == f"exec 0: anonymous={AS}"
    assert second == "executed 0: executed="
    assert header_of(tmp_path / "images" / "0002").parent == header_of(tmp_path / "images" / "0001").migration


def test_a_new_process_is_in_the_next_image(tmp_path: Path) -> None:
    """And who was there already has its memory of the image before."""
    first, second = told("fork", tmp_path)
    assert (first, second) == (f"fork 0: anonymous={AS}", f"fork 1: anonymous={AS}")
    whole, more = (tmp_path / "images" / name for name in ("0001", "0002"))
    assert header_of(more).parent == header_of(whole).migration
    assert (processes_in(whole), processes_in(more)) == (1, 2)


def test_when_a_tree_must_be_made_anew_the_image_is_whole(tmp_path: Path) -> None:
    """A process of another session than before cannot have been there before."""
    assert told("session", tmp_path) == ["session 0: ", "session 1: "]
    assert header_of(tmp_path / "images" / "0002").parent == ""


def test_a_tree_that_must_be_made_anew_right_before_a_freeze_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written in rounds is of no use then, and does not stay."""
    at = tmp_path / "images"
    real = Taker._freeze
    with phases(tmp_path / "work", "session") as running:

        def freeze(self: Taker, image: Any, copying: Copying) -> Taken:  # noqa: ANN401
            if image.parent:
                running.next()
            return real(self, image, copying)

        monkeypatch.setattr(Taker, "_freeze", freeze)
        found = take(running.pid, at, 2, after=lambda _: None)
        running.end()
    assert [image.goes_on_from for image in found.images] == ["", ""]
    assert header_of(at / "0002").parent == ""
    assert FrameKind.ROUND not in kinds(at / "0002")
    assert answer(at / "0002", running.directory) == "session 1: "


def test_an_object_that_came_up_right_before_a_freeze_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What becomes a hole in it later must be told, so it must be known that it was there."""
    at = tmp_path / "images"
    real = Taker._go_round
    with phases(tmp_path / "work", "memfd") as running:

        def rounds(*arguments: object) -> None:
            real(*arguments)  # type: ignore[arg-type]
            if running.phase() == "memfd 0":
                running.next()

        monkeypatch.setattr(Taker, "_go_round", rounds)
        take(running.pid, at, 2, after=lambda number: running.next() if number == 1 else None)
        running.end()
        full, empty = (answer(at / name, running.directory) for name in ("0001", "0002"))
        assert (full, empty) == (f"memfd 1: memfd={FULL}", f"memfd 2: memfd={EMPTY}")


# --- a series and its directory -----------------------------------------------------------------


def test_only_the_newest_are_kept_and_what_they_go_on_from(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(series, "CHAIN_IMAGES", 3)
    monkeypatch.setattr(series, "_is_larger", lambda *_: False)
    at = tmp_path / "images"
    seen: list[set[str]] = []
    with tools.counting(program, tmp_path) as counter:
        take(counter.pid, at, 7, keep=2, after=lambda _: seen.append(set(os.listdir(at))))
        counter.wait_for_progress()
    assert (shown(at), hidden(at)) == (["0006", "0007"], [".0004", ".0005"])
    assert header_of(at / "0007").parent == ""
    assert header_of(at / "0006").parent == header_of(at / ".0005").migration
    assert "0003" in seen[3]
    # 0005 may just be on its way out of sight.
    assert {name.removeprefix(".") for name in seen[-1]} == {"0004", "0005", "0006", "0007"}
    for name in shown(at):
        restored = api.restore(at / name, pod=True)
        os.kill(restored.root_pid, signal.SIGKILL)
        assert restored.wait() == 128 + signal.SIGKILL


def test_a_row_larger_than_its_whole_image_ends(tmp_path: Path) -> None:
    with workload("writer_c", tmp_path / "work", ("mib=16", "rate=200")) as running:
        found = take(running.pid(), tmp_path / "images", 6, interval_s=0.2)
        assert running.finish().ok
    row: list[int] = []
    for image in found.images:
        if not image.goes_on_from:
            assert not row or sum(row[1:]) > row[0]
            row.clear()
        row.append(image.report.bytes_sent)
        assert sum(row[1:-1]) <= row[0]
    assert sum(not image.goes_on_from for image in found.images) > 1


def test_a_series_goes_on_counting_and_begins_whole(program: Path, tmp_path: Path) -> None:
    at = tmp_path / "images"
    with tools.counting(program, tmp_path) as counter:
        take(counter.pid, at, 2)
        (at / ".0007.partial").mkdir()
        (at / ".0007.partial" / "stream.godwit.partial").write_bytes(b"half")
        (at / ".0001").mkdir()
        found = take(counter.pid, at, 2)
        assert counter.only_copy() == counter.pid
    assert [image.image for image in found.images] == ["0003", "0004"]
    assert [image.goes_on_from for image in found.images] == ["", "0003"]
    assert (shown(at), hidden(at)) == (["0001", "0002", "0003", "0004"], [])


def test_images_of_another_program_are_not_mixed_with(program: Path, tmp_path: Path) -> None:
    at = tmp_path / "images"
    with tools.counting(program, tmp_path) as counter:
        take(counter.pid, at, 1)
    with tools.counting(program, tmp_path) as other:
        with pytest.raises(RequestError, match="another program"):
            take(other.pid, at, 1)
        with pytest.raises(RequestError, match="image already"):
            api.checkpoint(other.pid, at)
        api.checkpoint(other.pid, tmp_path / "single", leave_running=True)
        with pytest.raises(RequestError, match="single image"):
            take(other.pid, tmp_path / "single", 1)
        assert other.only_copy() == other.pid
    assert shown(at) == ["0001"]


def test_two_series_do_not_share_a_directory(program: Path, tmp_path: Path) -> None:
    at = tmp_path / "images"
    at.mkdir()
    fd = os.open(at, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with tools.counting(program, tmp_path) as counter, pytest.raises(BusyError, match="another series"):
            take(counter.pid, at, 1)
    finally:
        os.close(fd)


def test_a_kernel_that_cannot_note_writes_is_refused(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tools.counting(program, tmp_path) as counter:
        monkeypatch.setattr(taking, "can_track", lambda _: False)
        with pytest.raises(RefusedError, match="WP_ASYNC"):
            take(counter.pid, tmp_path / "images", 1)
        monkeypatch.undo()

        def fails(*_: object) -> None:
            raise OSError(22, "userfaultfd: Invalid argument")

        monkeypatch.setattr("godwit.engine.tracking.Watch.update", fails)
        with pytest.raises(RefusedError, match="WP_ASYNC"):
            take(counter.pid, tmp_path / "images", 1)
        assert counter.only_copy() == counter.pid
    assert not (tmp_path / "images").exists()


def failing(at: int) -> Callable[..., None]:
    """Have the freeze of one image fail, in the process that takes them."""
    real, calls = Taker._freeze, 0

    def freeze(self: Taker, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            raise BusyError("a thread cannot be stopped now")
        return real(self, *arguments)  # type: ignore[arg-type]

    return freeze  # type: ignore[return-value]


def test_after_an_image_that_failed_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Taker, "_freeze", failing(3))
    at = tmp_path / "images"
    with workload("writer_c", tmp_path / "work", PROGRAMS["writer_c"]) as running:
        found = take(running.pid(), at, 4)
        assert running.finish().ok
        running.kill()
        assert [image.goes_on_from for image in found.images] == ["", "0001", "", "0003"]
        assert hidden(at) == []
        assert judged(running, at / "0004", (running.dir / "log").read_bytes()) == "ok"


# --- the command ----------------------------------------------------------------------------------


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_interrupted_it_ends_well_and_the_program_runs_on(program: Path, tmp_path: Path) -> None:
    at = tmp_path / "images"
    with tools.counting(program, tmp_path) as counter:
        command = godwit("checkpoint", str(counter.pid), "--output", at, "--interval", "50ms", "--json")
        until(lambda: len(shown(at) if at.exists() else []) >= 3, "three images")
        os.killpg(command.pid, signal.SIGINT)
        out, err = command.communicate(timeout=30)
        assert (command.returncode, err) == (0, "")
        *told_images, end = lines(out)
        assert end == {"ended": {"images": len(told_images), "newest": shown(at)[-1], "program_ended": False}}
        assert [each["image"] for each in told_images][-1] == shown(at)[-1]
        assert {"pages", "bytes_sent", "freeze_ms", "goes_on_from"} <= told_images[0].keys()
        assert [name for name in hidden(at) if "partial" in name] == []
        assert counter.only_copy() == counter.pid
    restored = api.restore(at, pod=True)
    os.kill(restored.root_pid, signal.SIGKILL)
    assert restored.report.migration == header_of(at / shown(at)[-1]).migration
    assert restored.wait() == 128 + signal.SIGKILL


def test_interrupted_before_its_first_image_it_leaves_nothing(program: Path, tmp_path: Path) -> None:
    with tools.counting(program, tmp_path) as counter:

        def stop(event: api.ProgressEvent) -> None:
            if event.stage == "round":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            api.checkpoint_series(counter.pid, tmp_path / "images", interval_s=5, progress=stop)
        assert counter.only_copy() == counter.pid
    assert not (tmp_path / "images").exists()


def test_it_ends_with_the_program_and_says_so(program: Path, tmp_path: Path) -> None:
    at = tmp_path / "images"
    with tools.counting(program, tmp_path) as counter:
        command = godwit("checkpoint", str(counter.pid), "--output", at, "--interval", "50ms", "--keep", "2")
        until(lambda: "0003" in (shown(at) if at.exists() else []), "three images")
        counter.end()
        out, err = command.communicate(timeout=30)
    assert (command.returncode, err) == (0, "")
    assert f"pid {counter.pid} has ended; " in out
    assert str(at / shown(at)[-1]) in out


def after_the_first(monkeypatch: pytest.MonkeyPatch, act: Callable[[Taker], None]) -> None:
    """Have something happen, where images are taken, right before the freeze of the second."""
    real, calls = Taker._freeze, 0

    def freeze(self: Taker, image: Any, copying: Copying) -> Taken:  # noqa: ANN401
        nonlocal calls
        calls += 1
        if calls == 2:
            act(self)
        return real(self, image, copying)

    monkeypatch.setattr(Taker, "_freeze", freeze)


def test_it_ends_with_a_program_that_ends_while_an_image_is_made(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "images"
    with tools.counting(program, tmp_path) as counter:
        after_the_first(monkeypatch, lambda _: os.kill(counter.pid, signal.SIGKILL))
        ended = api.checkpoint_series(counter.pid, at, interval_s=0.01)
    assert ended == api.Ended(images=1, newest="0001", program_ended=True)
    assert (shown(at), hidden(at)) == (["0001"], [])


def test_interrupted_within_an_image_it_gives_that_one_up(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "images"

    def interrupted(taker: Taker) -> None:
        os.kill(os.getppid(), signal.SIGINT)
        until(taker._line.cancelled, "the wish to stop comes")

    with tools.counting(program, tmp_path) as counter:
        after_the_first(monkeypatch, interrupted)
        ended = api.checkpoint_series(counter.pid, at, interval_s=0.01)
        assert counter.only_copy() == counter.pid
    assert ended == api.Ended(images=1, newest="0001", program_ended=False)
    assert (shown(at), hidden(at)) == (["0001"], [])


def test_killed_at_any_moment_it_leaves_images_that_can_be_restored(program: Path, tmp_path: Path) -> None:
    at = tmp_path / "images"
    for count in range(1, 4):
        with tools.counting(program, tmp_path) as counter:
            command = godwit(
                "checkpoint", str(counter.pid), "--output", at, "--interval", "1ms", "--keep", "2"
            )
            until(lambda: len(shown(at) if at.exists() else []) >= min(count, 2), "images")  # noqa: B023
            os.killpg(command.pid, signal.SIGKILL)
            command.communicate(timeout=30)
            assert counter.only_copy() == counter.pid
        for name in shown(at):
            restored = api.restore(at / name, pod=True)
            os.kill(restored.root_pid, signal.SIGKILL)
            assert restored.wait() == 128 + signal.SIGKILL
        shutil.rmtree(at)
