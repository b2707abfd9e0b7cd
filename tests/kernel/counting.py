"""A program that counts into a file, machines to move it between, and the questions asked after a disaster.

Source and destination are this machine: pods make that possible. Each end has a journal of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.migrate import certs, journal
from godwit.migrate.journal import Record, State
from tests.conftest import SESSION_VARIABLE

SOURCE_C = Path(__file__).with_name("counter.c")
ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0


def until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Return once the condition holds; fail when it does not hold in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"still not so after {deadline_s:.0f} s: {what}"
        select.select([], [], [], 0.005)


def compiled(directory: Path) -> Path:
    """Compile the program, statically: it needs no file but itself."""
    program = directory / "counter"
    subprocess.run(["cc", "-O1", "-static", "-o", program, SOURCE_C], check=True, timeout=60)
    return program


def state_of(pid: int) -> str:
    """Return the letter of /proc/PID/stat, or an empty string."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def parent_of(pid: int) -> int:
    """Return the parent of a process, 0 if it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return 0


def carrying(text: str, where: str) -> list[int]:
    """List living processes with `text` as one word of their arguments (cmdline) or environment (environ)."""
    found = []
    for path in Path("/proc").glob(f"[0-9]*/{where}"):
        with contextlib.suppress(OSError):
            if text.encode() in path.read_bytes().split(b"\0") and state_of(int(path.parts[2])) not in "ZX":
                found.append(int(path.parts[2]))
    return found


@dataclass
class Counting:
    """One running counter program, wherever it is."""

    process: subprocess.Popen[bytes]
    marker: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def copies(self) -> list[int]:
        """List living copies. A dead original is reaped on the way."""
        self.process.poll()
        return carrying(self.marker, "cmdline")

    def lines(self) -> list[str]:
        text = self.log.read_text() if self.log.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def check_log(self) -> None:
        lines = self.lines()
        wrong = [(at, line) for at, line in enumerate(lines) if line != str(at)]
        assert not wrong, f"line {wrong[0][0]} of the log is {wrong[0][1]!r}"

    def wait_for_progress(self, lines: int = 10) -> None:
        before = len(self.lines())
        copies = self.copies()
        states = {pid: state_of(pid) for pid in copies}
        until(lambda: len(self.lines()) >= before + lines, f"the log grows; copies {states}")

    def only_copy(self) -> int:
        """Return the pid of the only copy, having seen that it runs and that its log has no gap."""
        until(lambda: len(self.copies()) == 1, f"one copy, not {self.copies()}")
        self.wait_for_progress()
        self.check_log()
        copies = self.copies()
        assert len(copies) == 1
        assert state_of(copies[0]) in "RSD"
        return copies[0]

    def end(self) -> None:
        for pid in self.copies():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=DEADLINE_S)
        until(lambda: not self.copies(), "every copy is gone")


@contextlib.contextmanager
def counting(program: Path, directory: Path, mib: int = 0) -> Iterator[Counting]:
    """Run a counter until the end of the block; then no copy is left, wherever it went.

    With `mib` it has so much more memory, which it goes through in 8 lines per MiB.
    """
    marker = f"counting-{uuid.uuid4().hex}"
    log = directory / f"{marker}.log"
    process = subprocess.Popen(
        [program, log, marker, str(mib)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    found = Counting(process, marker, log)
    try:
        found.wait_for_progress(3)
        yield found
    finally:
        found.end()


@dataclass
class Machine:
    """One end: its certificates and journal, and the environment that names them."""

    directory: Path
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def journal(self) -> Path:
        return self.directory / "moves"

    def environment(self) -> dict[str, str]:
        paths = {"GODWIT_CERTS": str(self.directory / "certs"), "GODWIT_STATE_DIR": str(self.journal)}
        python = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        return {**os.environ, **paths, **python, **self.extra}

    def records(self) -> list[Record]:
        """Return the journal's records as they lie there, without settling anything."""
        before = os.environ.get("GODWIT_STATE_DIR")
        os.environ["GODWIT_STATE_DIR"] = str(self.journal)
        try:
            return list(journal.every())
        finally:
            if before is None:
                del os.environ["GODWIT_STATE_DIR"]
            else:
                os.environ["GODWIT_STATE_DIR"] = before

    def undecided(self) -> list[Record]:
        return [each for each in self.records() if each.state in (State.COMMITTED, State.READY)]

    def recover(self) -> list[dict[str, Any]]:
        """Settle what was left undecided, as `godwit recover` on that machine would."""
        done = subprocess.run(
            [sys.executable, "-m", "tests.kernel.mover", "recover"],
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found


@dataclass
class Pair:
    """Two machines whose certificates are of one authority."""

    source: Machine
    destination: Machine

    @classmethod
    def make(cls, directory: Path) -> Pair:
        authority = certs.make_authority("test")
        pair = cls(Machine(directory / "source"), Machine(directory / "destination"))
        for machine in (pair.source, pair.destination):
            authority.issue(machine.directory.name, ["127.0.0.1"]).write(machine.directory / "certs")
        return pair


@dataclass
class Server:
    """A listening `godwit receive`."""

    process: subprocess.Popen[str]
    address: str
    token: str  # in the environment of the server and of all that it forks

    @property
    def host(self) -> str:
        return f"tls://{self.address}"

    def wait_until_idle(self) -> None:
        """Return once nothing but the listener itself is at work."""
        until(lambda: self.workers() == [], f"the receiving processes end; {self.workers()} remain")

    def workers(self) -> list[int]:
        listener = self.process.pid
        return [pid for pid in carrying(self.token, "environ") if pid != listener]


@contextlib.contextmanager
def serving(machine: Machine, **extra: str) -> Iterator[Server]:
    """Let a machine receive until the end of the block."""
    token = f"GODWIT_TEST_SERVER={uuid.uuid4().hex}"
    name, _, value = token.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kernel.mover", "serve"],
        env={**machine.environment(), **extra, name: value},
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    with process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, "the server did not start"
            yield Server(process, address, token)
        finally:
            for pid in carrying(token, "environ"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Outcome:
    """What a `migrate` in a process of its own said."""

    status: int  # negative: killed by that signal
    report: dict[str, Any] | None
    error: dict[str, Any] | None

    @property
    def survivor(self) -> str:
        told = self.report or self.error
        return "" if told is None else str(told["survivor"])


def start_move(pid: int, host: str, machine: Machine, *words: str, **extra: str) -> subprocess.Popen[str]:
    """Begin a move in a process of its own, which leads its group."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kernel.mover", "migrate", str(pid), host, *words],
        env={**machine.environment(), **extra},
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def finish_move(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a move and read what it said."""
    out, _ = process.communicate(timeout=90)
    told: dict[str, Any] = json.loads(out) if out.strip() else {}
    return Outcome(process.returncode, told.get("report"), told.get("error"))


def move(pid: int, host: str, machine: Machine, *words: str, **extra: str) -> Outcome:
    """Move, and return what was said."""
    return finish_move(start_move(pid, host, machine, *words, **extra))


def pods() -> dict[int, list[int]]:
    """Return the init of every pod with its children: those of this session, and those nobody owns."""
    word = f"{SESSION_VARIABLE}={os.environ.get(SESSION_VARIABLE, '')}"
    ours = set(carrying(word, "environ"))
    found = {}
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            pid = int(path.parts[2])
            if not path.read_text().startswith("godwit-pod") or state_of(pid) in "ZX":
                continue
            children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if ours & {parent, *children} or (parent == 1 and not children):
                found[pid] = children
    return found


def session_strays(allowed: set[int]) -> dict[int, str]:
    """Return processes that carry this test session and are not `allowed`, with their states."""
    word = f"{SESSION_VARIABLE}={os.environ.get(SESSION_VARIABLE, '')}"
    return {
        pid: state_of(pid) for pid in carrying(word, "environ") if pid not in allowed and pid != os.getpid()
    }
