"""Start the workloads, see that they live, end them and hear their verdict.

A workload is one of `WORKLOADS`. Started in a directory of its own it counts in `alive`, runs until a
file `stop` appears there, then verifies itself and writes `result`: "ok ..." or "bad: reason". It may be
moved meanwhile, so nothing here waits for a pid: all that is known of it is known from its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE / "programs"
CACHE = Path(tempfile.gettempdir()) / f"godwit-workloads-{os.geteuid()}"
C_FLAGS = ("-std=gnu17", "-O2", "-Wall", "-Wextra", "-pthread", "-frounding-math")
LOOK_AGAIN_MS = 10

Launcher = Callable[[Sequence[str]], object]


class WorkloadError(Exception):
    """A workload could not be built or started, does not live, or has ended before it was asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The verdict of a workload about itself."""

    ok: bool
    text: str


def wait_until(condition: Callable[[], bool], deadline_s: float) -> bool:
    """Ask the condition again and again until it holds. False: the time has run out first."""
    end = time.monotonic() + deadline_s
    nothing = select.poll()
    while not condition():
        if time.monotonic() > end:
            return False
        nothing.poll(LOOK_AGAIN_MS)
    return True


def _tree_digest(files: Sequence[Path], salt: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join(salt).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _build(output: Path, argv: Callable[[Path], Sequence[str]], env: dict[str, str] | None = None) -> None:
    """Run a compiler once; what it leaves appears under its name only when complete."""
    if output.exists():
        return
    output.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if output.parent.stat().st_uid != os.geteuid():
        raise WorkloadError(f"{output.parent} belongs to somebody else: what it holds would be run")
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        fresh = Path(scratch) / "out"
        done = subprocess.run(
            argv(fresh),
            check=False,
            capture_output=True,
            text=True,
            cwd=PROGRAMS,
            env={**os.environ, **(env or {})},
        )
        if done.returncode != 0:
            raise WorkloadError(f"cannot build {output.name}: {done.stderr.strip()}")
        with contextlib.suppress(OSError):
            fresh.rename(output)  # Another test run may have been first: the same bytes.
    if not output.exists():
        raise WorkloadError(f"cannot build {output.name}: the compiler left nothing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A program that checks itself: how to find it, build it and start it."""

    name: str
    needs: tuple[str, ...] = ()  # programs that must be on the PATH
    needs_module: str = ""  # of the Python that runs it
    about: str = ""

    def available(self) -> str | None:
        """None when it can run here, else the reason why not."""
        for program in self.needs:
            if shutil.which(program) is None:
                return f"{program} is not installed"
        if self.needs_module:
            words = [sys.executable, "-c", f"import {self.needs_module}"]
            if subprocess.run(words, check=False, capture_output=True).returncode != 0:
                return f"{sys.executable} has no module {self.needs_module}"
        return None

    def build(self, cache_dir: Path = CACHE) -> Path:
        """Make what must be made, once for each state of the sources. Returns what `command` starts."""
        del cache_dir
        return PROGRAMS

    def command(self, built: Path, directory: Path) -> list[str]:
        """The words that start the program itself."""
        raise NotImplementedError

    def argv(self, directory: Path, options: Sequence[str] = (), cache_dir: Path = CACHE) -> list[str]:
        """All words: run anywhere, by anyone, they become the program in its directory and an own session."""
        words = self.command(self.build(cache_dir), directory)
        return ["/bin/sh", str(HERE / "start.sh"), str(directory), *words, *options]


@dataclass(frozen=True, slots=True, kw_only=True)
class CWorkload(Workload):
    """Compiled with gcc from files in `c/`."""

    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()

    def build(self, cache_dir: Path = CACHE) -> Path:
        """Compile."""
        sources = [HERE / "c" / name for name in (*self.sources, "common.c")]
        headers = sorted((HERE / "c").glob("*.h"))
        flags = [*C_FLAGS, *self.flags]
        output = cache_dir / f"{self.name}-{_tree_digest([*sources, *headers], flags)}"
        _build(output, lambda fresh: ["gcc", *flags, "-o", str(fresh), *map(str, sources), "-lm", "-lrt"])
        return output

    def command(self, built: Path, directory: Path) -> list[str]:
        """The program and its directory."""
        return [str(built), str(directory)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptWorkload(Workload):
    """Run by an interpreter. `{script}`, `{dir}` and `{python}` are filled in."""

    script: str
    words: tuple[str, ...]

    def command(self, built: Path, directory: Path) -> list[str]:
        """The interpreter, the script and its directory."""
        values = {"script": str(built / self.script), "dir": str(directory), "python": sys.executable}
        return [word.format(**values) for word in self.words]


@dataclass(frozen=True, slots=True, kw_only=True)
class JavaWorkload(Workload):
    """Compiled with javac; the options of the virtual machine differ."""

    jvm: tuple[str, ...] = ()

    def build(self, cache_dir: Path = CACHE) -> Path:
        """Compile to a directory of classes."""
        source = PROGRAMS / "Chain.java"
        output = cache_dir / f"java-{_tree_digest([source], ())}"
        _build(output, lambda fresh: ["javac", "-d", str(fresh), str(source)])
        return output

    def command(self, built: Path, directory: Path) -> list[str]:
        """The virtual machine and the class."""
        return ["java", *self.jvm, "-cp", str(built), "Chain", str(directory)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoWorkload(Workload):
    """Compiled with go, without cgo: a static binary."""

    def build(self, cache_dir: Path = CACHE) -> Path:
        """Compile."""
        source = PROGRAMS / "go_static.go"
        output = cache_dir / f"go_static-{_tree_digest([source], ())}"
        env = {"CGO_ENABLED": "0", "GO111MODULE": "off", "GOCACHE": str(cache_dir / "gocache"), "GOFLAGS": ""}
        _build(output, lambda fresh: ["go", "build", "-o", str(fresh), str(source)], env)
        return output

    def command(self, built: Path, directory: Path) -> list[str]:
        """The program and its directory."""
        return [str(built), str(directory)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisWorkload(Workload):
    """redis-server, which knows nothing of us: `redis_driver.RedisRunning` checks it from outside."""

    def command(self, built: Path, directory: Path) -> list[str]:
        """The server without any persistence; port and address come as options."""
        del built
        fixed = ["--save", "", "--appendonly", "no", "--daemonize", "no", "--protected-mode", "no"]
        return ["redis-server", *fixed, "--dir", str(directory)]


def _python(name: str, about: str, needs_module: str = "", needs: tuple[str, ...] = ()) -> ScriptWorkload:
    return ScriptWorkload(
        name=name,
        about=about,
        needs=needs,
        needs_module=needs_module,
        script=f"{name}.py",
        words=("{python}", "-B", "{script}", "{dir}"),
    )


def _c(name: str, about: str, *more: str, flags: tuple[str, ...] = ()) -> CWorkload:
    return CWorkload(name=name, about=about, needs=("gcc",), sources=(f"{name}.c", *more), flags=flags)


_ALL: tuple[Workload, ...] = (
    _c("static_c", "one thread, 4 MiB, no libc of the machine", flags=("-static",)),
    _c("threads_c", "fifty threads, mutexes, condition variables, barrier"),
    _c("signals_c", "actions, masks, pending signals, timers", "signals_pending.c", "signals_timers.c"),
    _c("calls_c", "a thread blocked in each of many calls", "calls_list.c"),
    _c("fds_c", "descriptors of every kind", "fds_files.c", "fds_queues.c", "fds_events.c"),
    _c("memory_c", "mappings of every kind", "memory_regions.c", "memory_sharing.c"),
    _c("mapper_c", "mappings that change", "mapper_regions.c", "mapper_operations.c", "pages.c"),
    _c("writer_c", "a big array under random writes", "pages.c"),
    _c("forker_c", "children on copied memory", "pages.c"),
    _c("threader_c", "threads born and dying", "pages.c"),
    _c("truncator_c", "memfds cut and stretched by two processes", "pages.c"),
    _c("kernelio_c", "memory that the kernel touches", "kernelio_calls.c", "kernelio_threads.c", "pages.c"),
    _c("spaces_c", "memory of every kind: huge, shared, locked, reserved, sparse", "pages.c"),
    _python("tree_py", "five processes, two sessions, zombies"),
    ScriptWorkload(
        name="tree_sh",
        about="the same of shells",
        script="tree_sh.sh",
        words=("sh", "{script}", "{dir}"),
        needs=("setsid",),
    ),
    _python("numpy_py", "256 MiB, BLAS threads, a child on a pipe", needs_module="numpy"),
    _python("log_py", "numbered lines in files"),
    _python("sqlite_py", "commits without pause", needs_module="sqlite3"),
    ScriptWorkload(
        name="node_js",
        about="V8, a worker, timers",
        needs=("node",),
        script="node_js.js",
        words=("node", "{script}", "{dir}"),
    ),
    JavaWorkload(
        name="java",
        about="threads and garbage",
        needs=("java", "javac"),
        jvm=("-XX:-UsePerfData", "-Xmx256m"),
    ),
    JavaWorkload(name="java_default", about="the same as people start it", needs=("java", "javac")),
    GoWorkload(name="go_static", about="64 goroutines", needs=("go",)),
    ScriptWorkload(
        name="pipeline_sh",
        about="a pipeline through gzip",
        needs=("bash", "gzip"),
        script="pipeline_sh.sh",
        words=("bash", "{script}", "{python}", "{dir}"),
    ),
    _python("redis_py", "a server with its only client, which writes all the time", needs=("redis-server",)),
    RedisWorkload(name="redis", about="a server with data", needs=("redis-server",)),
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}


def launch_here(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the words on this machine, in a session of their own, and return the handle that reaps them."""
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


class Running:
    """A workload that has been started, known by its directory."""

    def __init__(self, workload: Workload, directory: Path, handle: object) -> None:
        self.workload = workload
        self.dir = directory
        self.handle = handle  # what the launcher returned

    @classmethod
    def start(
        cls,
        workload: Workload,
        directory: Path,
        launcher: Launcher = launch_here,
        options: Sequence[str] = (),
        cache_dir: Path = CACHE,
    ) -> Self:
        """Start it in the directory, which must be empty. Options are words such as `hold_ms=500`."""
        directory.mkdir(parents=True, exist_ok=True)
        return cls(workload, directory, launcher(workload.argv(directory, options, cache_dir)))

    def _read(self, name: str) -> str:
        try:
            return (self.dir / name).read_text()
        except FileNotFoundError:
            return ""

    def pid(self, deadline_s: float = 20.0) -> int:
        """The pid of the root process in the namespace where it was started."""
        if not wait_until((self.dir / "pid").exists, deadline_s):
            raise WorkloadError(f"{self.workload.name} was not started: {self._read('stderr').strip()}")
        return int(self._read("pid"))

    def alive(self) -> int:
        """How many units of work are done."""
        text = self._read("alive").strip()
        return int(text) if text.isdigit() else 0  # Shells empty the file before they fill it.

    def result(self) -> Result | None:
        """The verdict, once there is one."""
        text = self._read("result").strip()
        return Result(ok=text.startswith("ok"), text=text) if text else None

    def wait_alive(self, deadline_s: float = 60.0, more: int = 3) -> int:
        """Wait until `more` units of work are done from now on. Returns how many are done in all.

        Raises:
            WorkloadError: It has given its verdict unasked, or does nothing.
        """
        seen = [self.alive()]

        def advanced() -> bool:
            verdict = self.result()
            if verdict is not None:
                raise WorkloadError(f"{self.workload.name} ended by itself: {verdict.text}")
            count = self.alive()
            # The shell's zero between two numbers is no beginning to count from.
            seen[0] = seen[0] or count
            return seen[0] > 0 and count >= seen[0] + more

        if not wait_until(advanced, deadline_s):
            last_words = self._read("stderr")[-500:]
            raise WorkloadError(f"{self.workload.name} does not live: {self.alive()} units; {last_words}")
        return self.alive()

    def finish(self, deadline_s: float = 120.0) -> Result:
        """Ask it to stop and return its verdict; silence is a bad one."""
        (self.dir / "stop").touch()
        if wait_until(lambda: self.result() is not None, deadline_s):
            verdict = self.result()
            assert verdict is not None
            return verdict
        last_words = self._read("stderr")[-500:]
        return Result(ok=False, text=f"bad: no verdict in {deadline_s:g} s; stderr: {last_words}")

    def kill(self) -> None:
        """Kill whatever still works in the directory, whatever its session, and reap our own child."""
        for pid in processes_in(self.dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if isinstance(self.handle, subprocess.Popen):
            self.handle.wait()


def processes_in(directory: Path) -> list[int]:
    """Pids of all processes whose current directory it is, in this pid namespace and those below."""
    wanted, found = str(directory.resolve()), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(entry / "cwd") == wanted:
                    found.append(int(entry.name))
    return found
