"""What every test shares: features a machine may lack, and proof that nothing is left behind."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import shutil
import sys
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}

# Every process that a test starts, however far away it ends, carries this in its environment. A program
# that was moved carries it too: the environment is part of its memory.
SESSION_VARIABLE = "GODWIT_TEST_SESSION"
SESSION = f"{SESSION_VARIABLE}={uuid.uuid4()}"

LEFTOVER_DEADLINE_MS = 10_000

requires = pytest.mark.requires
"""`@requires("userfaultfd")`, `@requires("command:node", "python:numpy", "root")`."""


def missing_feature(feature: str) -> str | None:
    """Say why a feature is missing here, or return None when it is there.

    Args:
        feature: `root`, `command:NAME`, `python:MODULE`, or a name that `godwit.linux.features` knows.
    """
    kind, _, name = feature.partition(":")
    if feature == "root":
        return None if os.geteuid() == 0 else "needs root"
    if kind == "command" and name:
        path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
        return None if shutil.which(name, path=path) else f"needs the command {name}"
    if kind == "python" and name:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            return None
        return f"needs the Python module {name}"
    features = importlib.import_module("godwit.linux.features")
    return None if features.has(feature) else f"this kernel lacks {feature}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that the machine cannot run, and say why; in CI that skip becomes a failure below."""
    for marker in item.iter_markers("requires"):
        for feature in marker.args:
            reason = missing_feature(feature)
            if reason is not None:
                pytest.skip(reason)


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


def no_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure: in CI it would be a lie. An expected failure stays one."""
    if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and CI does not skip: {reason_of(report)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what was skipped, in CI."""
    report = yield
    if IN_CI:
        no_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail what was skipped as a whole module, in CI."""
    report = yield
    if IN_CI:
        no_skip(report)
    return report


def read_bytes(path: Path) -> bytes:
    """Return a file of /proc, or nothing when its process has gone or is not ours to read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def children() -> Iterator[str]:
    """Name our own children, zombies too."""
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in read_bytes(path).split():
            yield f"process {describe(int(pid))}"


def relatives() -> Iterator[str]:
    """Name processes that any test of this session started, wherever they hang now."""
    marker = SESSION.encode()
    ours = os.getpid()
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        if pid != ours and marker in read_bytes(path).split(b"\0"):
            yield f"process {describe(pid)}"


def describe(pid: int) -> str:
    arguments = read_bytes(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode(errors="replace").strip()
    name = read_bytes(Path(f"/proc/{pid}/comm")).decode(errors="replace").strip()
    return f"{pid} ({arguments[:80] or f'{name}, a zombie'})"


def mounts() -> Iterator[str]:
    for line in read_bytes(Path("/proc/self/mountinfo")).decode(errors="replace").splitlines():
        if "godwit" in line:
            yield f"mount at {line.split()[4]}"


def entries(kind: str, pattern: str) -> Iterator[str]:
    """Name files of Godwit in /run."""
    for path in Path("/run").glob(pattern):
        yield f"{kind} {path.name}"


def possessions() -> frozenset[str]:
    """List everything a test could leave behind."""
    return frozenset(
        [
            *children(),
            *relatives(),
            *mounts(),
            *entries("network namespace", "netns/godwit*"),
            *entries("lab record", "godwit/labs/*"),
        ]
    )


def settled(allowed: frozenset[str], deadline_ms: int) -> frozenset[str]:
    """Return what is there beyond `allowed`, once nothing is or the deadline has passed."""
    waited_ms = 0
    while (extra := possessions() - allowed) and waited_ms < deadline_ms:
        pids = [int(word) for text in extra for word in text.split()[:3] if word.isdigit()]
        wait_for_exit(pids, step_ms := 100)
        waited_ms += step_ms
    return extra


def wait_for_exit(pids: list[int], timeout_ms: int) -> None:
    """Return when one of the processes has ended, or after the time."""
    with contextlib.ExitStack() as stack:
        poll = select.poll()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                stack.callback(os.close, fd)
                poll.register(fd, select.POLLIN)
        poll.poll(timeout_ms)


class Leftovers:
    """What was there before the first test, and which test first showed what came later."""

    def __init__(self) -> None:
        self.before = possessions()
        self.first_seen: dict[str, str] = {}

    def note(self, test: str) -> None:
        """Remember after which test a thing is there first; a wider fixture may still end it."""
        for thing in possessions() - self.before:
            self.first_seen.setdefault(thing, test)

    def complaint(self) -> str:
        """Say what is left and since which test, or nothing."""
        left = settled(self.before, LEFTOVER_DEADLINE_MS)
        lines = [f"  {thing}, since {self.first_seen.get(thing, 'the end')}" for thing in sorted(left)]
        return "\n".join(["the tests left behind:", *lines]) if lines else ""


@pytest.fixture(scope="session", autouse=True)
def leftovers() -> Iterator[Leftovers]:
    """Fail the session when a test leaves a process, a mount, a network namespace or a lab behind."""
    name, _, value = SESSION.partition("=")
    os.environ[name] = value
    kept = Leftovers()
    yield kept
    del os.environ[name]
    complaint = kept.complaint()
    if complaint:
        pytest.fail(complaint, pytrace=False)


@pytest.fixture(autouse=True)
def leftovers_by_test(leftovers: Leftovers, request: pytest.FixtureRequest) -> Iterator[None]:
    """Note after which test something stayed, so that the session's complaint can name it."""
    yield
    leftovers.note(request.node.nodeid)


def pytest_report_header() -> str:
    """Say on what the tests run."""
    kernel = os.uname()
    return f"kernel {kernel.release} {kernel.machine}, python {sys.version.split()[0]}, CI {IN_CI}"
