"""Series of images of a program, taken in this process, and the program as it was at each of them."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from godwit import api
from godwit.images import codec
from godwit.migrate.entries import FilesEntry, HeaderEntry
from godwit.migrate.series import _Series
from godwit.migrate.store import STREAM_NAME
from godwit.resources import regular
from godwit.resources.process import TreeEntry
from godwit.resources.regular import RegularEntry
from godwit.types import OwnedFd
from godwit.wire.frames import FrameKind
from tests.kernel import images
from tests.kernel.counting import ROOT, carrying, until
from tests.kernel.stateful import QUIET

PHASES_PY = Path(__file__).with_name("phases.py")


@dataclass
class Series:
    """What a series has told."""

    images: list[api.Image] = field(default_factory=list[api.Image])
    ended: api.Ended | None = None


def take(
    pid: int,
    directory: Path,
    count: int,
    *,
    keep: int = 100,
    interval_s: float = 0.05,
    after: Callable[[int], None] | None = None,
) -> Series:
    """Take images until there are so many.

    After each, `after` is called with their number, and the next is not begun before it returns.
    """
    found = Series()
    reading, writing = os.pipe()

    def made(image: api.Image) -> None:
        found.images.append(image)
        if after is not None:
            after(len(found.images))
        if len(found.images) >= count:
            raise KeyboardInterrupt
        os.write(writing, b"x")

    def wait_for_turn(running: _Series, program: OwnedFd) -> bool:
        ready, _, _ = select.select([reading, running.line.fileno(), program.number], [], [])
        return ready == [reading] and bool(os.read(reading, 1))

    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        stack.callback(os.close, writing)
        if after is not None:
            os.write(writing, b"x")
            stack.enter_context(mock.patch.object(_Series, "_wait", wait_for_turn))
        found.ended = api.checkpoint_series(pid, directory, interval_s=interval_s, keep=keep, made=made)
    return found


def header_of(image: Path) -> HeaderEntry:
    """Return what an image says of itself."""
    return codec.decode(images.split((image / STREAM_NAME).read_bytes())[0].payload, HeaderEntry)


def kinds(image: Path) -> list[FrameKind]:
    """List the frames of an image."""
    return [part.kind for part in images.split((image / STREAM_NAME).read_bytes())]


def offset_in(image: Path, name: Path) -> int:
    """Return how far the program had come in a file."""
    part = next(
        each for each in images.split((image / STREAM_NAME).read_bytes()) if each.kind is FrameKind.FILES
    )
    for file in codec.decode(part.payload, FilesEntry).files:
        if file.tag != regular.KIND.tag:
            continue
        entry = codec.decode(file.body, RegularEntry)
        if entry.file is not None and entry.file.path == os.fsencode(name):
            return entry.offset
    raise AssertionError(f"{name} is not open in {image}")


def processes_in(image: Path) -> int:
    """Count the processes of an image."""
    part = next(
        each for each in images.split((image / STREAM_NAME).read_bytes()) if each.kind is FrameKind.TREE
    )
    return len(codec.decode(part.payload, TreeEntry).processes)


def shown(directory: Path) -> list[str]:
    """Name the images that a user sees."""
    return sorted(path.name for path in directory.iterdir() if re.fullmatch("[0-9]+", path.name))


def hidden(directory: Path) -> list[str]:
    """Name everything else."""
    return sorted(path.name for path in directory.iterdir() if path.name not in shown(directory))


# --- a program whose state is told by its phase -------------------------------------------------


@dataclass
class Phases:
    """A running `phases.py`."""

    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def phase(self) -> str:
        path = self.directory / "phase"
        return path.read_text() if path.exists() else ""

    def next(self) -> None:
        """Have it go on to the next phase."""
        before = self.phase()
        (self.directory / "next").touch()
        until(lambda: self.phase() not in ("", before), f"a phase after {before}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        until(lambda: not carrying(str(self.directory), "cmdline"), "every copy is gone")


@contextlib.contextmanager
def phases(directory: Path, script: str) -> Iterator[Phases]:
    """Run a script of phases until the end of the block."""
    directory.mkdir()
    words = [sys.executable, "-B", str(PHASES_PY), str(directory), script]
    found = Phases(
        subprocess.Popen(words, cwd=directory, env={"PATH": os.environ["PATH"]}, **QUIET), directory
    )
    try:
        until(found.phase, "it begins")
        yield found
    finally:
        found.end()


def answer(image: Path, directory: Path) -> str:
    """Make an image run in a pod, ask the program what it knows, and let it end."""
    for name in ("answer", "next"):
        (directory / name).unlink(missing_ok=True)
    restored = api.restore(image, pod=True)
    (directory / "ask").touch()
    try:
        assert restored.wait() == 0
    finally:
        (directory / "ask").unlink()
    return (directory / "answer").read_text()


def copied(series: Path, to: Path) -> Path:
    """Copy a series, hidden images too."""
    shutil.copytree(series, to)
    return to


def godwit(*words: str | Path) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "godwit.cli.main", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
