"""Where it is measured: two nodes of a laboratory, and a program that flies between them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from bench import quiet
from godwit import api
from godwit.lab.cluster import Lab, Node
from godwit.types import OwnedFd

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"
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

    def word(self, node: str, *words: str | int) -> dict[str, Any]:
        """Run a word of `bench.inside` in a node; return what it answers."""
        done = self.lab.node(node).run(inside(*words), cwd=str(ROOT), timeout_s=_TIMEOUT_S)
        if done.returncode:
            raise RuntimeError(f"bench.inside {words}: {done.stderr.decode(errors='replace')[-2000:]}")
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

    def __init__(self, node: Node, argv: Sequence[str], *, cwd: str = "/") -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        self._output = OwnedFd(read)
        with OwnedFd(write):
            self.process = node.start(argv, stdout=write, stderr=sys.stderr.fileno(), cwd=cwd)

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

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.close()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Flyer:
    """A program that is moved from one node to the other and back. `with` ends it, wherever it is."""

    def __init__(self, place: Place, argv: Sequence[str]) -> None:
        self._place = place
        self._here, self._there = "a", "b"
        # Its output is a file: a pipe's other end would stay behind.
        ready = place.lab.shared / "ready"
        ready.write_bytes(b"")
        self._process = place.lab.node("a").start(argv, stdout="/shared/ready", stderr="/shared/ready")
        self.pid = int(self._process.node_pid)
        _wait_for_line(ready)

    def hop(self) -> api.Report:
        """Move it to the other node, in a quiet moment if there is one; return the report."""
        quiet.wait()
        answer = self._place.word(self._here, "move", self.pid, self._there)
        report = msgspec.convert(answer, api.Report)
        self.pid = report.pid
        self._here, self._there = self._there, self._here
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        # The group holds its children; it leads one, for it was started in a session of its own.
        self._place.lab.node(self._here).run(["kill", "-KILL", "--", f"-{self.pid}", str(self.pid)])
        self._process.close()


def inside(*words: str | int) -> list[str]:
    """Return the command line of a word of `bench.inside`."""
    return [sys.executable, "-m", "bench.inside", *(str(word) for word in words)]


def _wait_for_line(path: Path) -> None:
    poller = select.poll()
    for _ in range(_READY_MS):
        text = path.read_text()
        if "\n" in text:
            if not text.startswith("ready"):
                raise RuntimeError(f"the program says: {text}")
            return
        poller.poll(1)
    raise RuntimeError("the program does not get ready")
