"""The command as a user types it: lay a program down, wake it, send it by every kind of HOST."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import BusyError, NoProcessError, RequestError
from godwit.lab.cluster import Lab, Node
from godwit.procfs import stat, status
from godwit.types import Pid
from tests.conftest import requires
from tests.journey.transfer import (
    GODWIT,
    QUIET_TIMEOUT_S,
    SOURCE,
    Flown,
    Local,
    Program,
    Restored,
    complaint,
    environment,
    exists,
    run_godwit,
)
from tests.workloads.driver import processes_in, wait_until

pytestmark = requires("root")

PROGRAM = "static_c"
TREE = "tree_py"
REPORT_KEYS = {
    "strategy",
    "freeze_ms",
    "total_ms",
    "bytes_sent",
    "pages",
    "rounds",
    "source",
    "destination",
    "pid",
    "survivor",
}
SSH_PORT = 2222
SSHD = "/usr/sbin/sshd"  # which insists on being called by its whole path


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Restored]:
    transfer = Restored(tmp_path)
    yield transfer
    transfer.close()


def lay_down(local: Local, name: str, *options: str) -> tuple[Program, Path]:
    """Start a program and write it to an image."""
    program = local.start(name)
    image = local.base / "image"
    done = run_godwit("checkpoint", str(program.pid), "--output", image, *options)
    assert done.returncode == 0, complaint(done)
    return program, image


@contextmanager
def waking(image: Path, *options: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Restore, and stay for the length of the block as the program's parent."""
    words = [*GODWIT, "restore", str(image), *map(str, options)]
    with subprocess.Popen(words, env=environment(), stdin=subprocess.DEVNULL) as keeper:
        try:
            yield keeper
        finally:
            keeper.kill()


# --- checkpoint and restore ---------------------------------------------------------------------


def test_a_program_that_was_only_recorded_runs_on(local: Restored) -> None:
    program, image = lay_down(local, TREE, "--leave-running")
    assert [path.name for path in image.iterdir()] == ["stream.godwit"]
    program.running.wait_alive()
    local.finish(program)


def test_a_second_image_does_not_replace_the_first(local: Restored) -> None:
    program, image = lay_down(local, PROGRAM, "--leave-running")
    before = (image / "stream.godwit").read_bytes()
    done = run_godwit("checkpoint", str(program.pid), "--output", image)
    assert done.returncode == RequestError.exit_status, complaint(done)
    assert (image / "stream.godwit").read_bytes() == before
    local.finish(program)


def test_a_taken_pid_is_named_and_a_pod_offered(local: Restored) -> None:
    program, image = lay_down(local, PROGRAM, "--leave-running")
    pid_file = local.base / "pid"
    done = run_godwit("restore", image, "--detach", "--pid-file", pid_file)
    assert done.returncode == BusyError.exit_status, complaint(done)
    assert f"pid {program.pid} is taken" in done.stderr
    assert "--pod" in done.stderr
    assert not pid_file.exists()
    assert processes_in(program.running.dir) == [program.pid]
    local.finish(program)


def test_a_woken_program_that_is_let_go_belongs_to_nobody_here(local: Restored) -> None:
    program, image = lay_down(local, TREE)
    assert program.keeper is not None
    assert program.keeper.wait(QUIET_TIMEOUT_S) == -signal.SIGKILL
    pid_file = local.base / "pid"
    done = run_godwit("restore", image, "--detach", "--pid-file", pid_file, "--json")
    assert done.returncode == 0, complaint(done)
    told = json.loads(done.stdout)
    assert told["root_pid"] == int(pid_file.read_text()) == program.pid
    assert told["pod_init"] is None
    program.running.wait_alive()
    assert stat.read(Pid(program.pid)).ppid != os.getpid()
    verdict = program.running.finish()
    assert verdict.ok, verdict.text
    assert wait_until(lambda: not exists(program.pid), QUIET_TIMEOUT_S)


def test_whoever_woke_a_program_gets_its_exit_status(local: Restored) -> None:
    program, image = lay_down(local, PROGRAM)
    assert program.keeper is not None
    program.keeper.wait(QUIET_TIMEOUT_S)
    with waking(image) as keeper:
        program.running.wait_alive()
        # The program verifies its memory when it ends: a wrong byte makes its exit status 1.
        spoil(program.pid)
        assert not program.running.finish().ok
        assert keeper.wait(QUIET_TIMEOUT_S) == 1


def spoil(pid: int) -> None:
    """Change a page of the largest private mapping."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in lines if " rw-p " in line]
    start, finish = max(spans, key=lambda span: span[1] - span[0])
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek((start + finish) // 2 & ~0xFFF)
        memory.write(b"\xa5" * 4096)


@pytest.mark.parametrize("options", [(), ("--pod",)], ids=["here", "pod"])
def test_a_signal_to_whoever_woke_it_reaches_the_program(local: Restored, options: tuple[str, ...]) -> None:
    program, image = lay_down(local, PROGRAM)
    assert program.keeper is not None
    program.keeper.wait(QUIET_TIMEOUT_S)
    with waking(image, *options) as keeper:
        program.running.wait_alive()
        keeper.terminate()
        assert keeper.wait(QUIET_TIMEOUT_S) == 128 + signal.SIGTERM
    assert wait_until(lambda: not processes_in(program.running.dir), QUIET_TIMEOUT_S)


def test_a_pid_that_is_gone_cannot_be_laid_down(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    done = run_godwit("checkpoint", str(gone.pid), "--output", tmp_path / "image")
    assert done.returncode == NoProcessError.exit_status, complaint(done)
    assert not (tmp_path / "image").exists()


# --- migrate ------------------------------------------------------------------------------------


def fly_with(flight: Flown, name: str, migrate: Callable[[Program], dict[str, Any]]) -> Program:
    """Start a program on node a; migrate it to b in some way; see that it is whole there."""
    program = flight.start(name)
    report = migrate(program)
    assert report.keys() >= REPORT_KEYS
    assert report["destination"] == "b"
    assert report["survivor"] == "destination"
    assert 0 < report["freeze_ms"] <= report["total_ms"]
    # Pages that are zero or equal to another cost next to nothing.
    assert 0 < report["bytes_sent"] < 2 * report["pages"] * os.sysconf("SC_PAGE_SIZE") + (1 << 20)
    program.node, program.pid = "b", report["pid"]
    assert wait_until(lambda: not flight.lab.node("a").pids(), QUIET_TIMEOUT_S)
    program.running.wait_alive()
    seen = status.read(Pid(program.pid), proc=str(flight.lab.node("b").path("proc")))
    assert (seen.nspid[-1], seen.tracer_pid) == (program.inner, 0)
    return program


def in_node(node: Node, *words: str, **more: str) -> dict[str, Any]:
    """Run the command in a node; return what it printed."""
    done = node.run([*GODWIT, *words, "--json"], env=environment(**more))
    assert done.returncode == 0, complaint(done)
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    return told


def test_from_the_host_a_program_in_a_node_has_the_pid_of_the_host(flight: Flown, lab: Lab) -> None:
    def migrate(program: Program) -> dict[str, Any]:
        done = run_godwit("migrate", str(host_pid(program.inner, lab.node("a"))), f"{lab.name}/b", "--json")
        assert done.returncode == 0, complaint(done) + flight.log()
        told = json.loads(done.stdout)
        assert isinstance(told, dict)
        return told

    flight.finish(fly_with(flight, TREE, migrate))


def host_pid(inner: int, node: Node) -> int:
    """Return this machine's pid of a process of a node."""
    wanted = os.readlink(f"/proc/{node.init_pid}/ns/pid")
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "ns/pid") == wanted and status.read(Pid(int(path.name))).nspid[-1] == inner:
                return int(path.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # It has ended, or is the machine's own.
    raise AssertionError(f"node {node.name} has no process {inner}")


def test_a_report_for_people_names_what_happened(flight: Flown, lab: Lab) -> None:
    program = flight.start(PROGRAM)
    done = lab.node("a").run([*GODWIT, "migrate", str(program.pid), "b"], env=environment())
    assert done.returncode == 0, complaint(done)
    words = done.stdout.decode().split()
    assert {"from", "to", "pid", "frozen", "total", "sent", "strategy", "precopy"} <= set(words)
    program.node = "b"
    flight.finish(program)


def test_a_listening_receiver_takes_a_program_over_tls(flight: Flown, lab: Lab, shared: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="tls-", dir=shared))
    done = run_godwit("certs", directory / "certs", "a", "b")
    assert done.returncode == 0, complaint(done)
    inside = f"/shared/{directory.name}"
    listen = ["receive", "--listen", f"{lab.node('b').address}:0", "--certs", f"{inside}/certs/b", "--once"]
    receiver = lab.node("b").start(
        [*GODWIT, *listen, "--json"], stdout=f"{inside}/out", stderr=f"{inside}/err", env=environment()
    )

    def migrate(program: Program) -> dict[str, Any]:
        out = directory / "out"
        assert wait_until(lambda: out.exists() and out.read_text().endswith("\n"), QUIET_TIMEOUT_S)
        url = f"tls://{json.loads(out.read_text())['listening']}"
        return in_node(lab.node("a"), "migrate", str(program.pid), url, GODWIT_CERTS=f"{inside}/certs/a")

    with closing(receiver):
        program = fly_with(flight, TREE, migrate)
        assert receiver.wait(QUIET_TIMEOUT_S), "--once is over, and it still listens"
    flight.finish(program)


def test_a_stranger_is_turned_away_and_the_program_runs_on(flight: Flown, lab: Lab, shared: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="stranger-", dir=shared))
    done = run_godwit("certs", directory / "certs", "a")
    assert done.returncode == 0, complaint(done)
    program = flight.start(PROGRAM)
    node = lab.node("b").record
    refused = lab.node("a").run(
        [*GODWIT, "migrate", str(program.pid), f"tls://{node.address}:{node.port}"],
        env=environment(GODWIT_CERTS=f"/shared/{directory.name}/certs/a"),
    )
    assert refused.returncode not in (0, 1, 70), complaint(refused)
    assert lab.node("b").pids() == []
    program.running.wait_alive()
    flight.finish(program)


@contextmanager
def ssh_server(node: Node, directory: Path) -> Iterator[None]:
    """Run an sshd in a node, with keys made for this test alone."""
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(words, check=True)
    shutil.copy(directory / "user.pub", directory / "authorized")
    public = (directory / "host.pub").read_text().split()[:2]
    (directory / "known").write_text(f"[{node.name}]:{SSH_PORT} {' '.join(public)}\n")
    inside = f"/shared/{directory.name}"
    config = {
        "Port": SSH_PORT,
        "HostKey": f"{inside}/host",
        "AuthorizedKeysFile": f"{inside}/authorized",
        "PidFile": f"{inside}/pid",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "UsePAM": "yes",  # without it an account that has no password is locked
    }
    (directory / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in config.items()))
    node.path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    server = node.start([SSHD, "-D", "-e", "-f", f"{inside}/sshd_config"], stderr=f"{inside}/sshd.log")
    with closing(server):
        try:
            assert wait_until((directory / "pid").exists, QUIET_TIMEOUT_S), (
                directory / "sshd.log"
            ).read_text()
            yield
        finally:
            server.kill(signal.SIGTERM)
            server.wait(QUIET_TIMEOUT_S)


@requires(f"command:{SSHD}", "command:ssh")
def test_a_program_goes_over_ssh_and_outlives_the_session(flight: Flown, lab: Lab, shared: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="ssh-", dir=shared))
    inside = f"/shared/{directory.name}"
    words = ["ssh", "-F", "none", "-p", str(SSH_PORT), "-i", f"{inside}/user"]
    words += ["-o", f"UserKnownHostsFile={inside}/known", "-o", "StrictHostKeyChecking=yes"]
    remote = [
        "env",
        f"PYTHONPATH={SOURCE}",
        sys.executable,
        "-P",
        "-m",
        "godwit.cli.main",
        "receive",
        "--stdio",
    ]
    with ssh_server(lab.node("b"), directory):
        program = fly_with(
            flight,
            TREE,
            lambda program: in_node(
                lab.node("a"),
                "migrate",
                str(program.pid),
                "root@b",
                GODWIT_SSH=shlex.join(words),
                GODWIT_REMOTE_COMMAND=shlex.join(remote),
            ),
        )
    program.running.wait_alive()
    flight.finish(program)
