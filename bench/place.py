"""Where it is measured: two nodes of a laboratory, and a program that flies between them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from bench import quiet
from godwit import api
from godwit.lab.cluster import Lab, Node
from godwit.types import OwnedFd

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"
INSIDE = "bench.inside"
_READY_MS = 120_000
_TIMEOUT_S = 300.0


class Place:
    """A laboratory of two nodes, a and b, with the subject program in its shared directory."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator[Self]:
        """Build the subject and start the laboratory; both nodes are gone afterwards."""
        BUILD.mkdir(parents=True, exist_ok=True)
        program = BUILD / "subject"
        source = Path(__file__).with_name("subject.c")
        subprocess.run(["gcc", "-O2", "-pthread", "-o", program, source], check=True)
        with Lab.up(["a", "b"], name=f"bench-{os.getpid()}") as lab:
            shutil.copy(program, lab.shared / "subject")
            yield cls(lab)

    def word(self, node: str, *words: str | int, module: str = INSIDE) -> dict[str, Any]:
        """Run a word of a module in a node; return what it answers."""
        argv = inside(*words, module=module)
        done = self.lab.node(node).run(argv, cwd=str(ROOT), timeout_s=_TIMEOUT_S)
        if done.returncode:
            raise RuntimeError(f"{module} {words}: {done.stderr.decode(errors='replace')[-2000:]}")
        return dict(json.loads(done.stdout))

    @contextlib.contextmanager
    def serving(self, node: str, *words: str | int) -> Iterator[int]:
        """Start a word that serves in a node; yield the port it listens on."""
        with Started(self.lab.node(node), inside(*words), cwd=str(ROOT)) as started:
            yield int(started.line().split()[1])

    def subject(
        self, *, mib: int = 0, vmas: int = 0, fds: int = 0, threads: int = 0, processes: int = 0
    ) -> Flyer:
        """Start the subject in node a; return it once it holds all of that."""
        numbers = [str(number) for number in (mib, vmas, fds, threads, processes)]
        return Flyer(self, ["/shared/subject", *numbers])


class Started:
    """A program in a node whose standard output is read line by line. `with` ends it."""

    def __init__(self, node: Node, argv: Sequence[str], *, cwd: str = "/", stdin: int | None = None) -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        self._output = OwnedFd(read)
        with OwnedFd(write):
            self.process = node.start(argv, stdin=stdin, stdout=write, stderr=sys.stderr.fileno(), cwd=cwd)

    def line(self) -> str:
        """Wait for its first words. Raises RuntimeError when it ends or takes too long instead."""
        poller = select.poll()
        poller.register(self._output, select.POLLIN)
        if not poller.poll(_READY_MS):
            raise RuntimeError("the program does not get ready")
        text = os.read(self._output.number, 4096).decode()
        if not text:
            raise RuntimeError("the program ended before it was ready")
        return text

    def wait_for_end(self) -> None:
        """Wait until it has ended. Raises RuntimeError when that takes too long."""
        poller = select.poll()
        poller.register(self._output, select.POLLIN)
        while poller.poll(_READY_MS):
            if not os.read(self._output.number, 4096):
                return
        raise RuntimeError("the program does not end")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.close()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _says_ready(text: str) -> bool:
    if "\n" in text and not text.startswith("ready"):
        raise RuntimeError(f"the program says: {text}")
    return "\n" in text


class Flyer:
    """A program that is moved from one node to the other and back. `with` ends it, wherever it is."""

    def __init__(self, place: Place, argv: Sequence[str], ready: Callable[[str], bool] = _says_ready) -> None:
        """Start it; `ready` tells by what it has said so far whether it is."""
        self._place = place
        self.here, self.there = "a", "b"
        # Its output is a file: a pipe's other end would stay behind.
        said = place.lab.shared / "ready"
        said.write_bytes(b"")
        self._process = place.lab.node("a").start(argv, stdout="/shared/ready", stderr="/shared/ready")
        self.pid = int(self._process.node_pid)
        try:
            _wait_until_ready(lambda: ready(said.read_text()))
        except BaseException:
            self.close()
            raise

    def hop(self, strategy: str = "stopcopy", *, quietly: bool = True, **options: float) -> api.Report:
        """Move it to the other node; return the report.

        Args:
            strategy: As for `api.migrate`.
            quietly: Wait for a quiet moment before. In vain, if the program itself is busy.
            options: Further ones of `api.migrate`.
        """
        if quietly:
            quiet.wait()
        words = json.dumps({"strategy": strategy, **options})
        answer = self._place.word(self.here, "move", self.pid, self.there, words)
        report = msgspec.convert(answer, api.Report)
        self.pid = report.pid
        self.here, self.there = self.there, self.here
        return report

    def close(self) -> None:
        """End it and its children."""
        # The group holds its children; it leads one, for it was started in a session of its own.
        self._place.lab.node(self.here).run(["kill", "-KILL", "--", f"-{self.pid}", str(self.pid)])
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def inside(*words: str | int, module: str = INSIDE) -> list[str]:
    """Return the command line of a word of a module."""
    return [sys.executable, "-m", module, *(str(word) for word in words)]


def _wait_until_ready(ready: Callable[[], bool]) -> None:
    poller = select.poll()
    deadline = time.monotonic() + _READY_MS / 1000
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError("the program does not get ready")
        poller.poll(1)
