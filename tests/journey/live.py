"""Live moves: by a strategy of the test's choice, undone, or interrupted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from godwit.errors import BusyError, MigrationError
from godwit.lab import enter
from godwit.lab.cluster import Lab, Node
from godwit.lab.enter import Command
from tests.journey.transfer import (
    GODWIT,
    MOVE_TIMEOUT_S,
    QUIET_TIMEOUT_S,
    Flown,
    Program,
    command,
    complaint,
    environment,
)
from tests.workloads.driver import wait_until

# How memory is moved, as words for `godwit migrate`. A new strategy is a new name here.
STRATEGIES: dict[str, tuple[str, ...]] = {
    name: ("--strategy", name) for name in ("stopcopy", "precopy", "postcopy", "hybrid", "auto")
}
BUSY_TRIES = 20  # "changes faster than it can be looked at; try again in a moment"
UFFD_FLAGS = {"uw", "um"}  # of VmFlags


class Live(Flown):
    """Migrated in a lab with words of the test's choice."""

    def __init__(self, base: Path, lab: Lab, words: Sequence[str] = ()) -> None:
        super().__init__(base, lab)
        self.words = tuple(words)

    def _move(self, program: Program, destination: str | None) -> None:
        assert destination is not None
        done = self.attempt(program, destination)
        for _ in range(BUSY_TRIES):
            if done.returncode != BusyError.exit_status:
                break
            program.running.wait_alive()
            done = self.attempt(program, destination)
        assert done.returncode == 0, complaint(done) + self.log()
        self.arrived(program, json.loads(done.stdout), destination)

    def attempt(self, program: Program, destination: str, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Run the command once, to whatever end."""
        line = [*GODWIT, "migrate", str(program.pid), destination, "--json", *self.words, *words]
        return self.lab.node(program.node).run(line, env=environment(), timeout_s=MOVE_TIMEOUT_S)

    def begin(self, program: Program, destination: str, *words: str, columns: int = 0) -> Watched:
        """Begin a move that tells people where it stands, on a terminal of so many columns or a pipe."""
        line = [*GODWIT, "migrate", str(program.pid), destination, *self.words, *words]
        return Watched(self.lab.node(program.node), line, columns)

    def came(self, program: Program, destination: str, pid: int) -> None:
        """Note that a program has moved, and see that its source is empty and it works."""
        source = self.lab.node(program.node)
        program.node, program.pid = destination, pid
        self._expect_empty(source)
        program.moves += 1
        program.running.wait_alive()
        self._examine(program)

    def expect_nothing(self, node: Node) -> None:
        """See that a node has neither a process nor a memory of any move."""
        self._expect_empty(node)
        self._expect_forgotten(node)

    def expect_undone(self, program: Program, destination: str) -> None:
        """See that a program runs on where it was as if nobody had touched it, and nothing is elsewhere."""
        program.running.wait_alive()
        self._examine(program)
        node = self.lab.node(program.node)
        assert list(traces_of_tracking(node)) == []
        assert node.pid_alive(program.pid)
        # The destination may still be ending what it had begun to build.
        other = self.lab.node(destination)
        assert wait_until(lambda: not other.pids(), QUIET_TIMEOUT_S), {
            pid: command(other.path(f"proc/{pid}")) for pid in other.pids()
        }
        assert self._mounts(other) == self.mounts[other.name]
        for each in (node, other):
            self._expect_forgotten(each)


def traces_of_tracking(node: Node) -> Iterator[str]:
    """Name what a watch over writes has left in the processes of a node."""
    for pid in node.pids():
        process = node.path(f"proc/{pid}")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in (process / "smaps").read_text().splitlines():
                if line.startswith("VmFlags:") and UFFD_FLAGS & set(line.split()):
                    yield f"process {pid} has a mapping of {line}"
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if "userfaultfd" in os.readlink(fd):
                        yield f"process {pid} has {os.readlink(fd)} as {fd.name}"


def undone(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return why a move was undone, having seen that this is what the command says."""
    assert done.returncode == MigrationError.exit_status, complaint(done)
    error: dict[str, Any] = json.loads(done.stdout)["error"]
    assert error["class"] == "MigrationError"
    assert error["survivor"] == "source", error
    return str(error["message"])


def terminal(columns: int) -> tuple[int, int]:
    """Open a terminal of that width; return our end and the program's."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ours, theirs


class Watched:
    """A `godwit migrate` in a node, whose progress is read line by line. `with` ends it."""

    def __init__(self, node: Node, words: Sequence[str], columns: int) -> None:
        self._out, out = os.pipe2(os.O_CLOEXEC)
        self._err, err = terminal(columns) if columns else os.pipe2(os.O_CLOEXEC)
        self.said = ""
        try:
            env = environment(TERM="xterm")
            wanted = Command(argv=tuple(words), env=env, stdout=out, stderr=err)
            self._pid: int | None = enter.start_attached(node.record, wanted)
        finally:
            os.close(out)
            os.close(err)

    def wait_for(self, pattern: str, deadline_s: float = QUIET_TIMEOUT_S) -> re.Match[str]:
        """Read standard error until a line matches; fail if it ends or the time is over before."""
        end = time.monotonic() + deadline_s
        while (found := re.search(pattern, self.said, re.MULTILINE)) is None:
            poll = select.poll()
            poll.register(self._err, select.POLLIN)
            ready = poll.poll(max(end - time.monotonic(), 0) * 1000)
            data = self._read(self._err) if ready else b""
            assert data, f"no {pattern!r} in {self.said!r}"
            self.said += data.decode()
        return found

    @staticmethod
    def _read(fd: int) -> bytes:
        try:
            return os.read(fd, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal whose other end is closed
                raise
            return b""

    def interrupt(self) -> None:
        """Do what ^C does."""
        assert self._pid is not None
        os.kill(self._pid, signal.SIGINT)

    def finish(self, deadline_s: float = MOVE_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Read to the end; return how it ended and what it said in all."""
        out = b""
        poll = select.poll()
        for fd in (self._out, self._err):
            poll.register(fd, select.POLLIN)
        end, reading = time.monotonic() + deadline_s, {self._out, self._err}
        while reading:
            ready = poll.poll(max(end - time.monotonic(), 0) * 1000)
            assert ready, f"it does not end; so far: {self.said!r}"
            for fd, _ in ready:
                data = self._read(fd)
                if fd == self._out:
                    out += data
                else:
                    self.said += data.decode()
                if not data:
                    poll.unregister(fd)
                    reading.discard(fd)
        assert self._pid is not None
        _, status = os.waitpid(self._pid, 0)
        self._pid = None
        return subprocess.CompletedProcess(
            "migrate", os.waitstatus_to_exitcode(status), out.decode(), self.said
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._out)
        os.close(self._err)
