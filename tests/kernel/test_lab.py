from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.errors import BusyError, DestinationError, NoProcessError, RequestError
from godwit.lab import registry, state
from godwit.lab.cluster import Lab, Node
from godwit.lab.machine import NAMESPACES
from godwit.linux import ns
from godwit.migrate import certs
from godwit.types import Pid
from tests.conftest import requires

pytestmark = requires("root")

DEADLINE_S = 20
KINDS = ("mnt", "net", "pid", "uts", "ipc", "cgroup")

# What answers the migration port in these tests: it tells where it runs, then echoes.
SERVICE = """
import json, os, socket
def serve(connection, certs_dir):
    facts = {"hostname": socket.gethostname(), "pid": os.getpid(), "certs": sorted(os.listdir(certs_dir)),
             "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))}
    connection.sendall(json.dumps(facts).encode() + b"\\n")
    while data := connection.recv(65536):
        connection.sendall(data)
"""
# Connects to the migration port of a node, from inside another, and echoes a word.
CALLER = """
import sys
from godwit.lab import registry
with registry.connect(sys.argv[1], timeout_s=float(sys.argv[2])) as connection:
    stream = connection.makefile("rwb")
    stream.readline()
    stream.write(b"hello\\n")
    stream.flush()
    print(stream.readline().decode().strip())
"""
# Has a number of bytes echoed as fast as the link lets them pass, and prints the seconds.
SENDER = """
import socket, sys, threading, time
with socket.create_connection((sys.argv[1], 7487)) as connection:
    stream = connection.makefile("rb")
    stream.readline()
    began = time.monotonic()
    sender = threading.Thread(target=connection.sendall, args=[bytes(int(sys.argv[2]))])
    sender.start()
    assert len(stream.read(int(sys.argv[2]))) == int(sys.argv[2])
    print(time.monotonic() - began)
"""


def new_name() -> str:
    return f"t{uuid.uuid4().hex[:10]}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("service")
    name = f"service_{uuid.uuid4().hex[:8]}"
    (directory / f"{name}.py").write_text(SERVICE)
    with pytest.MonkeyPatch.context() as patch:
        source = Path(state.__file__).resolve().parents[2]
        patch.setenv("PYTHONPATH", f"{directory}{os.pathsep}{source}")
        yield f"{name}:serve"


@pytest.fixture(scope="module")
def lab(service: str) -> Iterator[Lab]:
    """A laboratory that tests share and leave whole."""
    with Lab.up(["a", "b", "c"], name=new_name(), service=service) as started:
        yield started


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition that nothing announces."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        select.poll().poll(10)


def output(node: Node, *argv: str) -> str:
    done = node.run(argv)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def python(node: Node, program: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return node.run([sys.executable, "-c", program, *arguments])


def namespaces(pid: int | str) -> set[str]:
    found: set[str] = set()
    for kind in KINDS:
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
    return found


def namespaces_of_all() -> set[str]:
    return set[str]().union(*(namespaces(name) for name in os.listdir("/proc") if name.isdecimal()))


def test_a_node_has_every_namespace_of_its_own(lab: Lab) -> None:
    a, b = namespaces(lab.node("a").init_pid), namespaces(lab.node("b").init_pid)
    assert len(a) == len(b) == len(KINDS)
    assert not a & b
    assert not (a | b) & namespaces("self")


def test_a_node_has_its_host_name_and_its_own_pids(lab: Lab) -> None:
    assert output(lab.node("b"), "hostname") == "b\n"
    assert output(lab.node("b"), "cat", "/proc/1/comm") == "init\n"


def test_a_file_written_on_one_node_exists_only_there(lab: Lab) -> None:
    paths = ["/root/only", "/tmp/only", "/run/only", "/dev/shm/only", "/usr/only"]
    output(lab.node("a"), "touch", *paths)
    for path in paths:
        assert lab.node("a").path(path).exists()
        assert not lab.node("b").path(path).exists()
        assert not Path(path).exists()


def test_a_node_sees_the_files_of_the_host(lab: Lab) -> None:
    ours = Path(os.__file__)
    assert lab.node("a").path(ours).read_bytes() == ours.read_bytes()


def test_shared_is_the_same_directory_everywhere(lab: Lab) -> None:
    output(lab.node("a"), "sh", "-c", "echo from a > /shared/word")
    assert output(lab.node("b"), "cat", "/shared/word") == "from a\n"
    assert (lab.shared / "word").read_text() == "from a\n"


def test_a_directory_of_the_host_can_be_shared(tmp_path: Path) -> None:
    with Lab.up(["a"], name=new_name(), shared=tmp_path) as small:
        output(small.node("a"), "touch", "/shared/made")
        assert small.shared == tmp_path
    assert (tmp_path / "made").exists()


def test_a_node_has_the_devices_programs_expect(lab: Lab) -> None:
    program = """
import os, pty
assert os.stat("/dev/pts/ptmx").st_mode & 0o777 == 0o666
for name in ("null", "zero", "full", "random", "urandom", "tty", "ptmx"):
    assert os.path.exists("/dev/" + name), name
assert open("/dev/zero", "rb").read(3) == bytes(3)
leader, follower = pty.openpty()
print(os.ttyname(follower))
"""
    assert python(lab.node("a"), program).stdout == b"/dev/pts/0\n"


def test_names_of_nodes_resolve_and_answer(lab: Lab) -> None:
    program = "import socket; print(*map(socket.gethostbyname, 'abc'))"
    wanted = " ".join(node.address for node in lab.nodes)
    assert python(lab.node("a"), program).stdout.decode() == wanted + "\n"
    assert python(lab.node("a"), CALLER, "c", "5").stdout == b"hello\n"


def test_init_cannot_be_signalled_and_buries_orphans(lab: Lab) -> None:
    node = lab.node("c")
    output(node, "sh", "-c", "(sh -c 'exit 3' &); kill -TERM 1; kill -KILL 1; kill -HUP 1")
    until(lambda: node.pids() == [], "no zombie in the node")
    assert node.alive()


def test_run_returns_output_and_status(lab: Lab) -> None:
    done = lab.node("a").run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)
    assert lab.node("a").run(["sh", "-c", "kill -KILL $$"]).returncode == -signal.SIGKILL


def test_run_kills_what_takes_too_long(lab: Lab) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        lab.node("b").run(["tail", "-f", "/dev/null"], timeout_s=0.05)
    until(lambda: lab.node("b").pids() == [], "no process in the node")


def test_a_program_that_is_not_there_is_named(lab: Lab) -> None:
    for start in (lab.node("a").run, lab.node("a").start):
        with pytest.raises(FileNotFoundError, match=": 'no-such-program'"):
            start(["no-such-program"])
    with pytest.raises(PermissionError):
        lab.node("a").run(["/etc/hosts"])
    with pytest.raises(RequestError, match="no directory /nowhere"):
        lab.node("a").run(["true"], cwd="/nowhere")


def test_a_started_program_belongs_to_the_node(lab: Lab) -> None:
    node = lab.node("a")
    program = """
import os
print(os.getpid(), os.getsid(0), os.getpgrp(), os.getppid(), os.getcwd(), os.environ,
      os.readlink("/proc/self/fd/0"), sorted(map(int, os.listdir("/proc/self/fd")))[:-1], flush=True)
os.kill(os.getpid(), 19)
"""
    with (lab.shared / "facts").open("wb") as facts, Path(os.devnull).open("rb") as ours:
        os.set_inheritable(ours.fileno(), True)
        process = node.start([sys.executable, "-c", program], stdout=facts, cwd="/usr", env={"LC_ALL": "C"})
    with contextlib.closing(process):
        pid = process.node_pid
        wanted = f"{pid} {pid} {pid} 1 /usr environ({{'LC_ALL': 'C'}}) /dev/null [0, 1, 2]\n"
        until(lambda: (lab.shared / "facts").read_text().endswith("\n"), "the program has spoken")
        assert (lab.shared / "facts").read_text() == wanted
        status = Path(f"/proc/{process.host_pid}/status").read_text()
        assert f"NSpid:\t{process.host_pid}\t{pid}\n" in status
        assert node.pid_alive(pid)
        assert process.alive()
        process.kill()
        assert process.wait(DEADLINE_S)
        until(lambda: not node.pid_alive(pid), "the node's process is gone")


def test_output_of_a_started_program_can_go_to_a_file_of_the_node(lab: Lab) -> None:
    process = lab.node("b").start(
        ["sh", "-c", "read word; echo $word; ls /nowhere"],
        stdin="/etc/hostname",
        stdout="/tmp/out",
        stderr="/tmp/err",
    )
    with contextlib.closing(process):
        assert process.wait(DEADLINE_S)
    assert lab.node("b").path("/tmp/out").read_text() == "b\n"
    assert "nowhere" in lab.node("b").path("/tmp/err").read_text()


def test_the_service_runs_inside_the_node(lab: Lab) -> None:
    with registry.connect(f"{lab.name}/b") as connection, connection.makefile("rb") as stream:
        facts = json.loads(stream.readline())
    assert facts["hostname"] == "b"
    assert facts["pid"] < 1000
    assert facts["certs"] == ["ca.pem", "node.key", "node.pem"]
    assert len(facts["fds"]) == 5  # three streams, the connection, the directory being listed
    until(lambda: lab.node("b").pids() == [], "the served child has ended")


def test_lookup_finds_a_node_on_the_host_and_in_a_node(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    found = registry.lookup(f"{lab.name}/a")
    assert found is not None
    assert (found.address, found.certs_dir) == (lab.node("a").address, lab.certs)
    assert registry.lookup(f"{lab.name}/nobody") is None
    monkeypatch.setenv("GODWIT_LAB", lab.name)
    assert registry.lookup("a") == found
    program = "from godwit.lab import registry; print(registry.own_name(), registry.lookup('b').address)"
    assert python(lab.node("a"), program).stdout.decode() == f"a {lab.node('b').address}\n"


def test_a_name_in_two_labs_is_ambiguous_until_the_lab_is_said(lab: Lab) -> None:
    with Lab.up(["a"], name=new_name()) as other:
        with pytest.raises(RequestError, match="several labs"):
            registry.lookup("a")
        found = registry.lookup(f"{other.name}/a")
        assert found is not None
        assert found.lab == other.name
        # Both have the same addresses and do not meet.
        assert other.node("a").address == lab.node("a").address
        output(other.node("a"), "touch", "/shared/of-the-other")
        assert not (lab.shared / "of-the-other").exists()


def test_a_partitioned_node_is_cut_off_until_healed(lab: Lab) -> None:
    lab.partition("b")
    try:
        assert [node.connected for node in lab.status().nodes] == [True, False, True]
        assert python(lab.node("a"), CALLER, "b", "0.2").returncode != 0
        with pytest.raises(DestinationError, match="does not answer"):
            registry.connect(f"{lab.name}/b", timeout_s=0.2)
        assert python(lab.node("a"), CALLER, "c", "5").stdout == b"hello\n"
    finally:
        lab.heal("b")
    assert python(lab.node("a"), CALLER, "b", "10").stdout == b"hello\n"


def test_bandwidth_limits_the_link(service: str) -> None:
    seconds = {}
    for rate in ("20mbit", "400mbit"):
        with Lab.up(["a", "b"], name=new_name(), service=service, bandwidth=rate) as shaped:
            done = python(shaped.node("a"), SENDER, shaped.node("b").address, "4000000")
            seconds[rate] = float(done.stdout)
    assert seconds["20mbit"] > 3 * seconds["400mbit"]


def test_delay_holds_every_frame_back(service: str) -> None:
    # An echo goes there and back: twice the delay, whatever else the machine does.
    program = CALLER.replace(
        "    stream.write", "    import time; began = time.monotonic()\n    stream.write"
    )
    program += "    print(time.monotonic() - began)\n"
    with Lab.up(["a", "b"], name=new_name(), service=service, delay="60ms", bandwidth="1gbit") as slow:
        word, seconds = python(slow.node("a"), program, "b", "5").stdout.split()
        assert word == b"hello"
        assert float(seconds) >= 0.12
        assert python(slow.node("a"), SENDER, slow.node("b").address, "4000000").returncode == 0
        registry.connect(f"{slow.name}/b").close()
        slow.partition("b")
        assert python(slow.node("a"), CALLER, "b", "0.5").returncode != 0
        slow.heal("b")
        assert python(slow.node("a"), CALLER, "b", "10").stdout == b"hello\n"


def exchange(server: certs.Identity, client: certs.Identity, tmp_path: Path) -> bytes:
    """Say a word over mutual TLS; raises ssl.SSLError in whoever does not trust the other."""
    contexts: list[ssl.SSLContext] = []
    for number, (identity, purpose) in enumerate(
        [(server, ssl.Purpose.CLIENT_AUTH), (client, ssl.Purpose.SERVER_AUTH)]
    ):
        directory = tmp_path / f"{number}-{uuid.uuid4().hex}"
        identity.write(directory)
        assert (directory / certs.KEY_FILE).stat().st_mode & 0o777 == 0o600
        context = ssl.create_default_context(purpose, cafile=directory / certs.CA_FILE)
        context.load_cert_chain(directory / certs.CERT_FILE, directory / certs.KEY_FILE)
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with contextlib.suppress(OSError), contexts[0].wrap_socket(theirs, server_side=True) as stream:
            stream.sendall(b"hello")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with contexts[1].wrap_socket(ours, server_hostname="10.87.0.1") as stream:
            return stream.recv(5)
    finally:
        ours.close()
        thread.join()
        theirs.close()


def test_certificates_prove_both_ends_and_only_them(tmp_path: Path) -> None:
    authority, stranger = certs.make_authority(), certs.make_authority()
    node, host = authority.issue("a", ["10.87.0.1"]), authority.issue("host", [])
    assert exchange(node, host, tmp_path) == b"hello"
    with pytest.raises(ssl.SSLError):
        exchange(authority.issue("b", ["10.87.0.2"]), host, tmp_path)
    with pytest.raises(ssl.SSLError):
        exchange(stranger.issue("a", ["10.87.0.1"]), host, tmp_path)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        exchange(node, stranger.issue("host", []), tmp_path)


def test_every_node_of_a_lab_has_a_key_of_its_own(lab: Lab) -> None:
    directories = [lab.certs, *(node.path("/run/godwit/certs") for node in lab.nodes)]
    assert len({(directory / certs.KEY_FILE).read_bytes() for directory in directories}) == 4
    assert len({(directory / certs.CA_FILE).read_bytes() for directory in directories}) == 1


def test_a_crashed_node_is_down_and_the_others_go_on(service: str) -> None:
    with Lab.up(["a", "b"], name=new_name(), service=service) as small:
        process = small.node("a").start(["tail", "-f", "/dev/null"])
        with contextlib.closing(process):
            small.node("a").crash()
            assert process.wait(DEADLINE_S)
        assert [node.alive for node in small.status().nodes] == [False, True]
        until(lambda: not small.status().nodes[0].connected, "its network is gone")
        with pytest.raises(DestinationError, match="node a is down"):
            small.node("a").run(["true"])
        assert output(small.node("b"), "hostname") == "b\n"


def held_by(lab: Lab) -> tuple[set[str], list[int]]:
    """Return the namespaces and the processes of a laboratory."""
    spaces = namespaces(lab.record.owner.pid).union(*(namespaces(node.init_pid) for node in lab.nodes))
    spaces -= namespaces("self")
    names = [name for name in os.listdir("/proc") if name.isdecimal()]
    return spaces, [int(name) for name in names if namespaces(name) & spaces]


def end_by_down(lab: Lab) -> None:
    lab.down()
    lab.down()


def end_by_killing_the_supervisor(lab: Lab) -> None:
    os.kill(lab.record.owner.pid, signal.SIGKILL)


@pytest.mark.parametrize("end", [end_by_down, end_by_killing_the_supervisor])
def test_nothing_is_left_behind(end: Callable[[Lab], None], service: str) -> None:
    with Lab.up(["a", "b"], name=new_name(), service=service) as started:
        process = started.node("a").start(["tail", "-f", "/dev/null"])
        with contextlib.closing(process), registry.connect(f"{started.name}/b") as connection:
            connection.recv(1)
            # A reset at the end: a polite farewell would keep the bridge's namespace until it is answered.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            spaces, pids = held_by(started)
            assert len(spaces) == 2 * len(KINDS) + 2
            assert len(pids) == 5  # the supervisor, two inits, the program, the served child
            end(started)
            assert process.wait(DEADLINE_S)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "all processes are gone")
        until(lambda: not spaces & namespaces_of_all(), "all namespaces are gone")
        assert started.name not in Path("/proc/self/mountinfo").read_text()
        assert not {"lab0", "port0", "port1"} & set(os.listdir("/sys/class/net"))
        with pytest.raises(NoProcessError):
            Lab.find(started.name)
        assert not started.record.directory.exists()


def test_a_killed_lab_does_not_hold_its_name() -> None:
    name = new_name()
    with Lab.up(["a"], name=name) as first:
        os.kill(first.record.owner.pid, signal.SIGKILL)
        until(lambda: not first.record.owner.alive(), "the supervisor is gone")
        with Lab.up(["a"], name=name) as second:
            first.down()
            assert output(second.node("a"), "hostname") == "a\n"


def test_a_name_is_taken_once(lab: Lab) -> None:
    with pytest.raises(BusyError, match="is up already"):
        Lab.up(["x"], name=lab.name)
    assert output(lab.node("a"), "hostname") == "a\n"


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["a", "a"], {}, "given twice"),
        (["../a"], {}, "not a host name"),
        (["a"], {"name": "../x"}, "not a host name"),
        (["a"], {"bandwidth": "fast"}, "not a bandwidth"),
        (["a"], {"delay": "5"}, "not a delay"),
        (["a"], {"shared": "/no/such/directory"}, "no directory"),
        ([], {}, "1 to"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_made(
    names: list[str], options: dict[str, str], words: str
) -> None:
    before = os.listdir(state.LABS) if state.LABS.exists() else []
    with pytest.raises(RequestError, match=words):
        Lab.up(names, **{"name": new_name(), **options})
    assert (os.listdir(state.LABS) if state.LABS.exists() else []) == before


def test_a_lab_that_cannot_be_built_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    name = new_name()
    with pytest.raises(DestinationError, match="supervisor"):
        Lab.up(["a"], name=name)
    assert not (state.LABS / name).exists()


def test_fork_into_a_pid_namespace_leaves_the_caller_where_it_was(lab: Lab) -> None:
    before = os.readlink("/proc/thread-self/ns/pid_for_children")
    with contextlib.ExitStack() as stack:
        held = os.pidfd_open(lab.node("a").init_pid)
        stack.callback(os.close, held)
        pid = ns.fork_with_pid_namespace(lambda: ns.setns(held, ns.CLONE_NEWPID))
        if pid == 0:
            with contextlib.suppress(OSError):
                ns.setns(held, NAMESPACES)
            os._exit(7 if os.getppid() == 0 and Path("/proc/self").readlink().name == str(os.getpid()) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert os.readlink("/proc/thread-self/ns/pid_for_children") == before
    assert ns.call_in_netns(Pid(os.getpid()), lambda: 5) == 5


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from godwit.cli.lab import lab; lab(prog_name='godwit lab')"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_commands(service: str) -> None:
    name = new_name()
    up = cli("up", "x", "y", "--name", name, "--json")
    assert up.returncode == 0, up.stderr
    try:
        assert [node["name"] for node in json.loads(up.stdout)["labs"][0]["nodes"]] == ["x", "y"]
        shell = cli("exec", "x", "--name", name, "--cwd", "/usr", "--", "sh", "-c", "hostname; pwd; exit 5")
        assert (shell.stdout, shell.returncode) == ("x\n/usr\n", 5)
        assert cli("exec", "x", "--name", name, "--", "no-such-program").returncode == 127
        detached = cli(
            "exec", "y", "--name", name, "--detach", "--json", "--output", "/shared/log", "--", "hostname"
        )
        assert set(json.loads(detached.stdout)) == {"node_pid", "host_pid"}
        log = Lab.find(name).shared / "log"
        until(lambda: log.exists() and log.read_text() == "y\n", "the detached program has written")
        assert "cut off" in cli("partition", "y", "--name", name).stdout
        assert "cut off" in cli("status", "--name", name).stdout
        assert json.loads(cli("heal", "y", "--name", name, "--json").stdout)["connected"]
    finally:
        assert cli("down", "--name", name).returncode == 0
    assert name not in cli("status").stdout
