"""The demonstration: a running program flies around a lab of three nodes, and its log proves it.

The program is moved by the very command a user types, started in the node where the program is.
What happens is told to a `watch` function many times a second; showing it is somebody else's work.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from godwit.errors import GodwitError, InternalError, MigrationError, NoProcessError, Survivor
from godwit.lab import flyer
from godwit.lab.cluster import Lab, Node
from godwit.lab.proof import Proof, Verdict, examine
from godwit.migrate.report import Report

ROUTE = ("a", "b", "c", "a")

_LOOK_S = 0.04  # between two looks at the log
_START_TIMEOUT_S = 60.0
_HOP_TIMEOUT_S = 120.0
_LINES_TIMEOUT_S = 60.0  # without a new line


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One finished move."""

    report: Report
    first_line: int  # the last in the log when it began
    last_line: int  # one that was written after it


@dataclass(slots=True, kw_only=True)
class Moment:
    """How things stand. The same object each time, changed in between."""

    program: str  # numpy or plain
    lab: str
    node: str = ROUTE[0]  # where the program is
    towards: str | None = None  # where it is flying to
    pid: int = 0  # as the node sees it
    line: int = 0  # the last one in the log
    hops: list[Hop] = field(default_factory=list[Hop])


Watch = Callable[[Moment], None]


class _Tail:
    """The log, as far as it is written. Only what is new is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.number = 0

    def look(self) -> int:
        """Return the number of the last whole line."""
        try:
            with self._path.open("rb") as log:
                log.seek(self._offset)
                new = log.read()
        except FileNotFoundError:
            return 0
        whole = new.rpartition(b"\n")[0]
        if whole:
            self._offset += len(whole) + 1
            self.number = int(whole.rpartition(b"\n")[2].split()[0])
        return self.number


class Demo:
    """A lab and the program in it: `with Demo.up(watch) as demo: demo.run(250)`."""

    def __init__(self, lab: Lab, watch: Watch) -> None:
        self._lab = lab
        self._watch = watch
        kind = "numpy" if importlib.util.find_spec("numpy") else "plain"
        self.now = Moment(program=kind, lab=lab.name)
        self._tail = _Tail(lab.shared / "log")

    @classmethod
    @contextlib.contextmanager
    def up(cls, watch: Watch) -> Iterator[Self]:
        """Start a lab of three nodes, which is gone when the block or this process ends, however it ends."""
        name = f"demo-{os.getpid()}"
        with _guarded(name), Lab.up(sorted(set(ROUTE)), name=name) as lab:
            yield cls(lab, watch)

    def run(self, lines_per_stop: int) -> Proof:
        """Start the program, move it along the route, end it, and examine its log.

        Args:
            lines_per_stop: How many lines it shall write on each node before it moves on.

        Raises:
            MigrationError: A move failed.
            GodwitError: The program did not start, or fell silent.
        """
        self._start_program()
        self._stay(lines_per_stop)
        for destination in ROUTE[1:]:
            self._hop(destination)
            self._stay(lines_per_stop)
        verdict = self._end_program()
        with (self._lab.shared / "log").open("rb") as log:
            return examine(log, flyer.SHAPES[self.now.program], verdict)

    def _start_program(self) -> None:
        # A copy: what flies must be at every destination, and /shared is.
        source = Path(flyer.__file__).read_bytes()
        (self._lab.shared / "flyer.py").write_bytes(source)
        # -I: neither our environment nor our directory.
        argv = [sys.executable, "-I", "flyer.py", "log", "verdict.json", self.now.program]
        env = {"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1"}
        with contextlib.closing(
            self._node().start(argv, cwd="/shared", stdout="out", stderr="err", env=env)
        ) as program:
            self.now.pid = program.node_pid
        self._until(lambda: self.now.line > 0, _START_TIMEOUT_S, "wrote no line")

    def _stay(self, lines: int) -> None:
        goal = self.now.line + lines
        last, deadline = self.now.line, time.monotonic() + _LINES_TIMEOUT_S
        while self.now.line < goal:
            self._look()
            if self.now.line > last:
                last, deadline = self.now.line, time.monotonic() + _LINES_TIMEOUT_S
            elif time.monotonic() > deadline or not self._node().pid_alive(self.now.pid):
                raise self._program_error(f"fell silent at line {last}")

    def _hop(self, destination: str) -> None:
        number = len(self.now.hops) + 1
        first = self._tail.look()
        answer, complaint = f"/shared/hop-{number}.json", f"/shared/hop-{number}.err"
        argv = [sys.executable, "-P", "-m", "godwit.cli.main"]
        argv += ["migrate", str(self.now.pid), destination, "--json"]
        self.now.towards = destination
        mover = self._node().start(argv, stdout=answer, stderr=complaint, env=_own_environment())
        with contextlib.closing(mover):
            deadline = time.monotonic() + _HOP_TIMEOUT_S
            while not mover.wait(_LOOK_S):
                self._look_now()
                if time.monotonic() > deadline:
                    mover.kill(signal.SIGKILL)
                    raise GodwitError(f"moving to {destination} took longer than {_HOP_TIMEOUT_S:.0f} s")
        report = _read_report(self._lab.shared / Path(answer).name, self._lab.shared / Path(complaint).name)
        if report.pid and not self._lab.node(destination).pid_alive(report.pid):
            raise InternalError(f"node {destination} has no process {report.pid} after the move")
        if self._node().pid_alive(self.now.pid):
            raise InternalError(f"node {self.now.node} still has process {self.now.pid} after the move")
        self.now.node, self.now.towards, self.now.pid = destination, None, report.pid
        # One line more, so that the gap which the move made lies between `first` and the last.
        landed = self._tail.look()
        self._until(lambda: self.now.line > landed, _LINES_TIMEOUT_S, "fell silent after a move")
        self.now.hops.append(Hop(report=report, first_line=first, last_line=self.now.line))

    def _end_program(self) -> Verdict:
        self._node().run(["kill", "-TERM", str(self.now.pid)])
        verdict = self._lab.shared / "verdict.json"
        self._until(verdict.exists, _LINES_TIMEOUT_S, "gave no verdict")
        return msgspec.json.decode(verdict.read_bytes(), type=Verdict)

    def _until(self, holds: Callable[[], bool], timeout_s: float, complaint: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            self._look()
            gone = not self._node().pid_alive(self.now.pid)
            if (gone or time.monotonic() > deadline) and not holds():
                raise self._program_error(complaint)

    def _look(self) -> None:
        """Wait for the next look, or for the end of the node."""
        held = self._node().record.init.hold()
        if held is None:
            raise InternalError(f"node {self.now.node} has died")
        with held:
            poller = select.poll()
            poller.register(held, select.POLLIN)
            poller.poll(_LOOK_S * 1000)
        self._look_now()

    def _look_now(self) -> None:
        self.now.line = self._tail.look()
        self._watch(self.now)

    def _node(self) -> Node:
        return self._lab.node(self.now.node)

    def _program_error(self, complaint: str) -> GodwitError:
        err = self._lab.shared / "err"
        said = err.read_text(errors="replace").strip().rpartition("\n")[2] if err.exists() else ""
        return GodwitError(f"the program {complaint}" + (f": {said}" if said else ""))


@contextlib.contextmanager
def _guarded(name: str) -> Iterator[None]:
    """Have a process of its own take the lab down should this one be killed."""
    argv = [sys.executable, "-P", "-m", __name__, name]
    env = _own_environment()
    # Its standard input ends when we do. A session of its own: Ctrl-C is for us.
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=env, start_new_session=True):
        yield


def guard(name: str) -> None:
    """Wait until standard input ends; then take the lab down if it is still up."""
    while os.read(0, 4096):
        pass
    with contextlib.suppress(NoProcessError):
        Lab.find(name).down()


def _own_environment() -> dict[str, str]:
    source = str(Path(__file__).resolve().parents[2])
    search = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search)}


def _read_report(answer: Path, complaint: Path) -> Report:
    said = answer.read_bytes().strip()
    words = complaint.read_text(errors="replace").strip()
    if not said:
        raise MigrationError(
            f"the mover died: {words.rpartition(chr(10))[2]}",
            survivor=Survivor.UNDECIDED,
            remedy="godwit recover",
        )
    decoded: dict[str, Any] = msgspec.json.decode(said)
    error = decoded.get("error")
    if error is not None and error["class"] == InternalError.__name__:
        raise InternalError(f"the move failed: {error['message']}", remedy=error["remedy"])
    if error is not None:
        raise MigrationError(
            f"the move failed: {error['message']}",
            survivor=Survivor(error["survivor"] or "source"),
            remedy=error["remedy"],
        )
    return msgspec.convert(decoded, Report)


if __name__ == "__main__":
    guard(sys.argv[1])
