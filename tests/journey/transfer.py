"""Every way of moving a program, behind one verb, with an eye on what each leaves behind.

A test starts a workload with `transfer.start(name)`, moves it with `transfer.move(program)` as often
as it likes and hears its verdict with `transfer.finish(program)`. Which way of moving that is the
fixture decides. All ways go through the command that users type.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import godwit
from godwit.lab import fabric
from godwit.lab.cluster import Lab, Node
from godwit.procfs import stat, status, tasks
from godwit.types import Pid
from tests.workloads.driver import CACHE, HERE, WORKLOADS, Running, processes_in, wait_until
from tests.workloads.redis_driver import RedisRunning, start

SOURCE = str(Path(godwit.__file__).resolve().parents[1])
GODWIT = (sys.executable, "-P", "-m", "godwit.cli.main")
MOVE_TIMEOUT_S = 120.0
QUIET_TIMEOUT_S = 20.0
REDIS_PORT = 7000


def environment(**more: str) -> dict[str, str]:
    """Return ours, in which the command finds the Godwit that is under test."""
    return {**os.environ, "PYTHONPATH": SOURCE, **more}


def run_godwit(*words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, on this machine."""
    return subprocess.run(
        [*GODWIT, *map(str, words)],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MOVE_TIMEOUT_S,
        check=False,
    )


def complaint(done: subprocess.CompletedProcess[str] | subprocess.CompletedProcess[bytes]) -> str:
    """Say how a command ended."""
    return f"exit status {done.returncode}: {done.stdout!r} {done.stderr!r}"


@dataclass(slots=True, kw_only=True)
class Program:
    """A workload under way. `pid` is its root's, as the machine sees it where it is now."""

    running: Running
    pid: int
    inner: int  # the pid by which it knows itself
    keeper: subprocess.Popen[bytes] | None = None  # its parent on this machine, which learns how it ends
    node: str = ""
    moves: int = 0
    reports: list[dict[str, Any]] = field(default_factory=list)


def unhealthy(pids: Sequence[int], proc: Path) -> Iterator[str]:
    """Name threads that are stopped or traced. They may end while we look."""
    for pid in map(Pid, pids):
        with contextlib.suppress(ProcessLookupError):
            for tid in tasks.list_tids(pid, proc=str(proc)):
                seen = status.read(pid, tid, proc=str(proc))
                if seen.state in "Tt" or seen.tracer_pid:
                    yield f"thread {tid} of {pid}: state {seen.state}, tracer {seen.tracer_pid}"


def records(root: Path) -> frozenset[str]:
    """List the moves that a machine still remembers. `root` leads to its files."""
    return frozenset(path.name for path in (root / "var/lib/godwit/moves").glob("*"))


def drafts(directory: Path) -> list[Path]:
    """List files that were never finished."""
    return [path for path in directory.rglob("*") if path.name.endswith(".partial")]


class Transfer(ABC):
    """One way of moving programs. Tests of one kind share it, each with a directory of its own."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.programs: list[Program] = []

    @abstractmethod
    def start(self, name: str, options: Sequence[str] = ()) -> Program:
        """Start a workload and return when it works."""

    def move(self, program: Program, destination: str | None = None) -> None:
        """Move it once, and see it work before and afterwards.

        Args:
            program: From `start`.
            destination: For those who have several, the next one otherwise.
        """
        program.running.wait_alive()
        self._move(program, destination)
        program.moves += 1
        program.running.wait_alive()
        self._examine(program)

    def finish(self, program: Program) -> None:
        """End it, and expect a good verdict and a machine as if it had never been."""
        verdict = program.running.finish()
        assert verdict.ok, verdict.text
        self._vanish(program)
        assert drafts(self.base) == []

    @abstractmethod
    def _move(self, program: Program, destination: str | None) -> None: ...

    @abstractmethod
    def _examine(self, program: Program) -> None:
        """See that the program is what it was: the same pid to itself, nobody stopped, nobody traced."""

    @abstractmethod
    def _vanish(self, program: Program) -> None: ...

    def close(self) -> None:
        """End what a failed test has left."""
        for program in self.programs:
            program.running.kill()


class Local(Transfer):
    """On this machine."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.inits: list[int] = []
        self.keepers: list[subprocess.Popen[bytes]] = []
        self.mounts = Path("/proc/self/mountinfo").read_text()
        self.records = records(Path("/"))

    def start(self, name: str, options: Sequence[str] = ()) -> Program:
        running = start(name, self.base / f"{name}-{len(self.programs)}", options=options)
        assert isinstance(running.handle, subprocess.Popen)
        pid = running.pid()
        program = Program(running=running, pid=pid, inner=pid, keeper=running.handle)
        self.programs.append(program)
        running.wait_alive()
        return program

    def _examine(self, program: Program) -> None:
        assert status.read(Pid(program.pid)).nspid[-1] == program.inner
        assert list(unhealthy(processes_in(program.running.dir), Path("/proc"))) == []

    def _vanish(self, program: Program) -> None:
        assert program.keeper is not None
        assert program.keeper.wait(QUIET_TIMEOUT_S) == 0, "the exit status is not the program's"
        assert wait_until(lambda: not processes_in(program.running.dir), QUIET_TIMEOUT_S)
        assert wait_until(lambda: not any(map(exists, self.inits)), QUIET_TIMEOUT_S), "a pod is left"
        assert Path("/proc/self/mountinfo").read_text() == self.mounts
        assert records(Path("/")) == self.records

    def close(self) -> None:
        super().close()
        for keeper in self.keepers:
            keeper.kill()
            keeper.wait()


class Unmoved(Local):
    """None: so that the test itself is known to be right."""

    def _move(self, program: Program, destination: str | None) -> None:
        pass


class Restored(Local):
    """Checkpoint, end, and restore: with the same pids, on the same machine."""

    options: tuple[str, ...] = ()

    def _move(self, program: Program, destination: str | None) -> None:  # noqa: ARG002
        image = self.base / f"image-{program.inner}-{program.moves}"
        done = run_godwit("checkpoint", str(program.pid), "--output", image, "--json")
        assert done.returncode == 0, complaint(done)
        assert program.keeper is not None
        program.keeper.wait(QUIET_TIMEOUT_S)
        self._restore(program, image)
        # A file that has been read is not held by what was made from it.
        shutil.rmtree(image)

    def _restore(self, program: Program, image: Path) -> None:
        pid_file, errors = image.with_suffix(".pid"), image.with_suffix(".err")
        words = [*GODWIT, "restore", str(image), "--quiet", "--pid-file", str(pid_file), *self.options]
        with errors.open("wb") as stderr:
            program.keeper = subprocess.Popen(
                words, env=environment(), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
            )
        self.keepers.append(program.keeper)
        keeper = program.keeper
        assert wait_until(lambda: pid_file.exists() or keeper.poll() is not None, MOVE_TIMEOUT_S)
        assert pid_file.exists(), f"exit status {keeper.returncode}: {errors.read_text()}"
        program.pid = int(pid_file.read_text())
        self._note(program)

    def _note(self, program: Program) -> None:
        assert program.pid == program.inner


class Podded(Restored):
    """Checkpoint, end, and restore in a pod."""

    options = ("--pod",)

    def _note(self, program: Program) -> None:
        self.inits.append(stat.read(Pid(program.pid)).ppid)


def exists(pid: int) -> bool:
    """Tell whether there is a process of that pid here, be it a zombie."""
    return Path(f"/proc/{pid}").exists()


class Flown(Transfer):
    """Migrated in a lab, from node to node. `base` is /shared in each of them."""

    def __init__(self, base: Path, lab: Lab) -> None:
        super().__init__(base)
        self.lab = lab
        self.mounts = {node.name: self._mounts(node) for node in lab.nodes}
        self.records = {node.name: self._records(node) for node in lab.nodes}

    @staticmethod
    def _records(node: Node) -> frozenset[str]:
        # What this machine itself remembers shows in every node.
        return records(node.path("/")) - records(Path("/"))

    def _expect_forgotten(self, node: Node) -> None:
        # A destination forgets once it has heard of the end, which nobody waits for.
        def more() -> frozenset[str]:
            return self._records(node) - self.records[node.name]

        assert wait_until(lambda: not more(), QUIET_TIMEOUT_S), f"node {node.name} remembers {more()}"

    @staticmethod
    def _mounts(node: Node) -> str:
        return node.path("proc/1/mountinfo").read_text()

    def start(self, name: str, options: Sequence[str] = ()) -> Program:
        first = self.lab.nodes[0]
        directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.base))
        kind = RedisRunning if name == "redis" else Running
        running = kind(WORKLOADS[name], directory, None)
        program = Program(running=running, pid=0, inner=0, node=first.name)
        self.programs.append(program)
        if name == "redis":
            options = ("--port", str(REDIS_PORT), "--bind", "0.0.0.0", *options)
        first.start(self._words(running, options), env=environment()).close()
        program.pid = program.inner = running.pid()
        if isinstance(running, RedisRunning):
            running.load(REDIS_PORT, lambda port: self._connect(program, port))
        running.wait_alive()
        return program

    def _words(self, running: Running, options: Sequence[str]) -> list[str]:
        """Return the words that start it in a node: what they name lies in /shared."""
        built = running.workload.build()
        if CACHE in built.parents:
            shared_copy(built, self.base / "cache" / built.name)
        shared_copy(HERE, self.base / "workloads")
        moved = {str(CACHE): "/shared/cache", str(HERE): "/shared/workloads", str(self.base): "/shared"}
        return [replace_all(word, moved) for word in running.workload.argv(running.dir, options)]

    def _connect(self, program: Program, port: int) -> Any:  # noqa: ANN401 - a socket, as the driver wants it
        node = self.lab.node(program.node)
        return fabric.connect(self.lab.record.owner.pid, node.address, port, QUIET_TIMEOUT_S)

    def _move(self, program: Program, destination: str | None) -> None:
        names = [node.name for node in self.lab.nodes]
        destination = destination or names[(names.index(program.node) + 1) % len(names)]
        source = self.lab.node(program.node)
        words = [*GODWIT, "migrate", str(program.pid), destination, "--json"]
        done = source.run(words, env=environment(), timeout_s=MOVE_TIMEOUT_S)
        assert done.returncode == 0, complaint(done) + self.log()
        self.arrived(program, json.loads(done.stdout), destination)

    def arrived(self, program: Program, report: dict[str, Any], destination: str) -> None:
        """Believe a report, once its source has been seen to be empty."""
        source = self.lab.node(program.node)
        program.node, program.pid = destination, report["pid"]
        program.reports.append(report)
        assert (report["source"], report["destination"]) == (source.name, destination)
        assert report["survivor"] == "destination"
        self._expect_empty(source)

    def log(self) -> str:
        """Return the end of what the laboratory has logged."""
        return "\n" + (self.lab.record.directory / "log").read_text(errors="replace")[-4000:]

    def _expect_empty(self, node: Node) -> None:
        def left() -> dict[int, str]:
            return {pid: command(node.path(f"proc/{pid}")) for pid in node.pids()}

        assert wait_until(lambda: not left(), QUIET_TIMEOUT_S), f"node {node.name} still has {left()}"
        assert self._mounts(node) == self.mounts[node.name]

    def _examine(self, program: Program) -> None:
        node = self.lab.node(program.node)
        proc = node.path("proc")
        assert status.read(Pid(program.pid), proc=str(proc)).nspid[-1] == program.inner
        assert list(unhealthy(node.pids(), proc)) == []

    def _vanish(self, program: Program) -> None:  # noqa: ARG002
        for node in self.lab.nodes:
            self._expect_empty(node)
            self._expect_forgotten(node)

    def close(self) -> None:
        for node in self.lab.nodes:
            for pid in node.pids():
                node.run(["kill", "-KILL", str(pid)])
            wait_until(partial(is_empty, node), QUIET_TIMEOUT_S)


def is_empty(node: Node) -> bool:
    """Tell whether a node has no process but its first."""
    return not node.pids()


def command(process: Path) -> str:
    """Return the words of a process, from its directory in /proc."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def replace_all(text: str, replacements: Mapping[str, str]) -> str:
    """Replace each key by its value."""
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def shared_copy(origin: Path, copy: Path) -> None:
    """Copy a file or a directory, unless that was done before."""
    if copy.exists():
        return
    copy.parent.mkdir(exist_ok=True)
    make = partial(shutil.copytree, symlinks=True) if origin.is_dir() else shutil.copy2
    make(origin, copy)
