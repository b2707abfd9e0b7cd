"""A running `stateful.c`: one kind of state, and the program's own verdict on what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernel.counting import DEADLINE_S, ROOT, Machine, carrying, pods, session_strays, state_of, until

SOURCE_C = Path(__file__).with_name("stateful.c")
QUIET: dict[str, Any] = {
    "stdin": subprocess.DEVNULL,
    "stdout": subprocess.DEVNULL,
    "stderr": subprocess.DEVNULL,
    "start_new_session": True,
}


def compiled(directory: Path) -> Path:
    """Compile the program, statically: it needs no file but itself."""
    program = directory / "stateful"
    words = ["cc", "-O1", "-static", "-pthread", "-o", str(program), str(SOURCE_C)]
    subprocess.run(words, check=True, timeout=60)
    return program


@dataclass
class Stateful:
    """One program in one mode, wherever it is."""

    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def copies(self) -> list[int]:
        """List living processes of it. A dead original is reaped on the way.

        The original has no words any more when its first thread has ended.
        """
        original = {self.pid} if self.process.poll() is None else set()
        return sorted(original | set(carrying(str(self.directory), "cmdline")))

    def read(self, name: str) -> str:
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    def wait_for(self, name: str) -> str:
        """Return what the program writes into a file, once it has; its verdict ends the wait too."""
        until(
            lambda: self.read(name) or self.read("verdict") or not self.copies(),
            f"{name} of {[(pid, state_of(pid)) for pid in self.copies()]}",
        )
        return self.read(name)

    def verdict(self) -> str:
        """Let the program go and return what it says."""
        (self.directory / "go").touch()
        return self.wait_for("verdict") or f"no verdict; wait status {self.process.poll()}"

    def end(self) -> None:
        for pid in self.copies():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=DEADLINE_S)
        until(lambda: not self.copies(), "every copy is gone")


@contextlib.contextmanager
def stateful(program: Path, directory: Path, mode: str, ready: str = "ready") -> Iterator[Stateful]:
    """Run a mode until the end of the block; then no copy is left, and nothing else that came of it."""
    before, inits = set(session_strays(set())), set(pods())
    work = directory / mode
    work.mkdir()
    found = Stateful(subprocess.Popen([program, work, mode], cwd="/", **QUIET), work)
    try:
        assert found.wait_for(ready), found.read("verdict") or "it ended at once"
        yield found
        # What lies outside of processes (System V objects) it removes itself.
        if not found.read("verdict"):
            found.verdict()
    finally:
        found.end()
    until(lambda: not set(session_strays(set())) - before - {found.pid}, "no process is left")
    until(lambda: not set(pods()) - inits, "no pod is left")


def asked(directory: Path, *words: str | Path, before: Sequence[str] = ()) -> tuple[int, dict[str, Any], str]:
    """Have a process of its own do what `mover` can; return its status, what it said, and its complaints."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "tests.kernel.mover", *map(str, words)],
        env=Machine(directory).environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd=ROOT,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else {}, done.stderr


def checkpoint(running: Stateful, directory: Path, *words: str) -> Path:
    """Write an image; without `leave-running` the program ends with it."""
    image = directory / f"image{len(list(directory.glob('image*')))}"
    status, said, complaints = asked(directory, "checkpoint", str(running.pid), image, *words)
    assert status == 0, said or complaints
    return image


def restore(image: Path, directory: Path, before: Sequence[str] = ()) -> None:
    """Make it run again, in a pod."""
    status, said, complaints = asked(directory, "restore", image, before=before)
    assert status == 0, said or complaints


def move(running: Stateful, directory: Path, before: Sequence[str] = ()) -> None:
    """Move it into a pod on this machine."""
    image = checkpoint(running, directory)
    running.process.wait(timeout=DEADLINE_S)
    until(lambda: not running.copies(), "the original is gone")
    restore(image, directory, before)
