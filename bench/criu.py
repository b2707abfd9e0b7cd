"""The same programs through another engine, if the machine has it: `criu dump` and `criu restore`.

Both run on this machine, one after the other, with the image in memory: nothing goes over a network. Only the
command line is used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from bench import quiet
from bench.live import Case, Sizes, programs
from bench.numbers import MIB, Missing, Result, result, size_text
from bench.writer import GAP_MS, Load, acquitted, has_begun, longest_gap_ms
from godwit.linux import abi
from godwit.resources.credentials import PR_SET_CHILD_SUBREAPER
from tests.workloads.driver import WORKLOADS, Running, processes_in, wait_until

_NAME = "criu"
_TIMEOUT_S = 300.0
_READY_S = 120.0


def rows(sizes: Sizes) -> Iterator[Result | Missing]:
    """Measure the same programs by dump and restore."""
    why_not = missing()
    if why_not:
        yield Missing(name=_NAME, why=why_not)
        return
    idle = Case(
        name=f"{size_text(sizes.large_mib)} idle", load=Load(mib=sizes.large_mib), runs=sizes.large_runs
    )
    ways = [False, True] if not _run("check", "--feature", "mem_dirty_track").returncode else [False]
    for case in [*programs(sizes), idle]:
        if shutil.disk_usage("/dev/shm").free < 2 * case.load.mib * MIB:
            yield Missing(name=f"{_NAME}, {case.name}", why="/dev/shm is too small for its image")
            continue
        for before in ways:
            yield from _measured(case, pre_dump=before)


def missing() -> str:
    """Say why there is nothing to compare with; empty if there is."""
    if shutil.which(_NAME) is None:
        return "it is not on the PATH"
    done = _run("check")
    if not done.returncode:
        return ""
    return f"`criu check` says: {done.stderr.strip().rpartition(chr(10))[2] or done.returncode}"


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([_NAME, *words], check=False, capture_output=True, text=True, timeout=_TIMEOUT_S)


def _measured(case: Case, *, pre_dump: bool) -> Iterator[Result]:
    way = "pre-dump, dump and restore" if pre_dump else "dump and restore"
    gaps: list[float] = []
    totals: list[float] = []
    with _Program(case.load) as program:
        for _ in range(case.runs):
            gap_ms, total_ms = program.through(pre_dump=pre_dump)
            gaps.append(gap_ms)
            totals.append(total_ms)
        acquitted(program.running)
    yield result(f"criu {way}, longest gap seen inside, {case.name}", "ms", gaps)
    yield result(f"criu {way}, whole, {case.name}", "ms", totals)


class _Program:
    """A writer on this machine. `with` ends it."""

    def __init__(self, load: Load) -> None:
        self._stack = contextlib.ExitStack()
        self._load = load

    def __enter__(self) -> Self:
        with self._stack as stack:
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm")))
            self._images = base / "images"
            workload = WORKLOADS["writer_c"]
            self.running = Running(workload, base / "program", None)
            self.running.dir.mkdir()
            stack.enter_context(_adopting_orphans())
            argv = [str(workload.build()), str(self.running.dir), *self._load.words()]
            # Not by Popen, which would not know that the pid comes back.
            self._pid = _spawn_in_session(argv)
            stack.callback(self._end)
            if not wait_until(lambda: has_begun(self.running.dir), _READY_S):
                raise RuntimeError("the program does not get ready")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def through(self, *, pre_dump: bool) -> tuple[float, float]:
        """Dump and restore it; return the longest gap that it saw, and how long all of it took, in ms."""
        for number in range(2):
            (self._images / str(number)).mkdir(parents=True)
        if not self._load.busy:
            quiet.wait()
        before_ns = time.time_ns()
        more: list[str] = []
        if pre_dump:
            self._step("pre-dump", "0", "--tree", str(self._pid), "--track-mem")
            more = ["--track-mem", "--prev-images-dir", "../0"]
        self._step("dump", "1", "--tree", str(self._pid), *more)
        # Its pid is free for its copy only when its parent has heard. Restored, it is our child once more.
        os.waitpid(self._pid, 0)
        self._step("restore", "1", "--restore-detached")
        total_ms = (time.time_ns() - before_ns) / 1e6
        # The gap is noted at the first tick after it.
        beats = self.running.alive()
        if not wait_until(lambda: self.running.alive() > beats + 1, _READY_S):
            raise RuntimeError("the program does not go on after criu restore")
        gap_ms = longest_gap_ms(self.running.dir, before_ns, time.time_ns())
        shutil.rmtree(self._images)
        return max(gap_ms, GAP_MS), total_ms

    def _step(self, word: str, directory: str, *options: str) -> None:
        images = self._images / directory
        log = images / f"{word}.log"
        done = _run(word, "--images-dir", str(images), "--log-file", log.name, *options)
        if done.returncode:
            last = log.read_text(errors="replace")[-500:] if log.exists() else done.stderr
            raise RuntimeError(f"criu {word}: {last}")

    def _end(self) -> None:
        for pid in processes_in(self.running.dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Be the parent of those below us whose parent has ended."""
    abi.syscall("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        abi.syscall("prctl", PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _spawn_in_session(argv: list[str]) -> int:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsid=True)
