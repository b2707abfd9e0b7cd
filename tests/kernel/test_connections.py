"""A server with a client: moved only if it may lose him, and then it takes the next."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit import api
from godwit.errors import RefusedError
from godwit.lab import fabric
from godwit.lab.cluster import Lab, Node
from tests.conftest import requires
from tests.kernel import stateful as tools
from tests.kernel.counting import DEADLINE_S, ROOT, Pair, Server, serving, until
from tests.kernel.stateful import Stateful

pytestmark = requires("root", "command:cc")

WORDS = "--tcp-close"
LISTENING = ":1BBC 00000000:0000 0A"  # port 7100, in /proc/net/tcp


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.compiled(tmp_path_factory.mktemp("stateful"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.make(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def receiver(pair: Pair) -> Iterator[Server]:
    with serving(pair.destination) as found:
        yield found


@pytest.fixture
def as_source(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GODWIT_CERTS", "GODWIT_STATE_DIR"):
        monkeypatch.setenv(name, pair.source.environment()[name])


def connect(running: Stateful) -> socket.socket:
    """Become a client, and say a byte."""
    client = socket.create_connection(("127.0.0.1", int(running.wait_for("port"))), timeout=DEADLINE_S)
    client.sendall(b"x")
    return client


def heard(client: socket.socket) -> bytes:
    """Return all that comes until the other side ends it."""
    found = b""
    while data := client.recv(100):
        found += data
    return found


@pytest.mark.usefixtures("as_source")
@pytest.mark.parametrize("verb", ["check", "checkpoint", "migrate"])
def test_a_connection_is_refused_with_the_way_out(
    program: Path, tmp_path: Path, receiver: Server, verb: str
) -> None:
    verbs: dict[str, Callable[[int], object]] = {
        "check": lambda pid: api.inspect(pid).obey(),
        "checkpoint": lambda pid: api.checkpoint(pid, tmp_path / "image"),
        "migrate": lambda pid: api.migrate(pid, receiver.host),
    }
    with tools.stateful(program, tmp_path, "server", ready="port") as running, connect(running) as client:
        assert running.wait_for("ready")
        with pytest.raises(RefusedError, match=WORDS):
            verbs[verb](running.pid)
        assert not (tmp_path / "image").exists()
        (running.directory / "kept").touch()
        assert running.verdict() == "ok"
        assert heard(client) == b"here"


def test_who_may_lose_a_connection_is_told_and_takes_the_next(program: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with tools.stateful(program, tmp_path, "server", ready="port") as running:
        with connect(running):
            assert running.wait_for("ready")
            assert api.inspect(running.pid, tcp_close=True).movable
            api.checkpoint(running.pid, image, tcp_close=True)
            running.process.wait(timeout=DEADLINE_S)
        tools.restore(image, tmp_path)
        (running.directory / "go").touch()
        assert running.wait_for("accepting"), running.read("verdict")
        with connect(running) as another:
            assert heard(another) == b"here"
        assert running.verdict() == "ok"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    (tmp_path / "shared").mkdir()
    with Lab.up(["a", "b"], name=f"tcp-{uuid.uuid4().hex[:8]}", shared=tmp_path / "shared") as found:
        yield found


def knock(lab: Lab, node: Node, port: int) -> socket.socket:
    client = fabric.connect(lab.record.owner.pid, node.address, port, DEADLINE_S)
    client.sendall(b"x")
    return client


# Takes a client, is moved, loses him, and takes the next.
SERVER = """
import os, socket, sys
listener = socket.create_server(("0.0.0.0", 7100))
first, _ = listener.accept()
first.recv(1)
open("/shared/ready", "w").close()
try:
    told = repr(first.recv(9))
except ConnectionResetError:
    told = f"reset, then {first.recv(9)}"
second, _ = listener.accept()
second.recv(1)
second.sendall(told.encode())
second.close()
"""


def test_a_server_loses_its_client_by_migrating(lab: Lab) -> None:
    shared, (a, b) = lab.shared, lab.nodes
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with contextlib.closing(a.start([sys.executable, "-c", SERVER], env=env)) as server:
        until(lambda: a.run(["grep", "-q", LISTENING, "/proc/net/tcp"]).returncode == 0, "it listens")
        with knock(lab, a, 7100) as client:
            until((shared / "ready").exists, "the server has a client")
            words = [sys.executable, "-P", "-m", "godwit", "migrate", str(server.node_pid), "b"]
            refused = a.run(words, env=env)
            assert refused.returncode == RefusedError.exit_status
            assert WORDS.encode() in refused.stderr
            done = a.run([*words, "--tcp-close"], env=env)
            assert done.returncode == 0, done.stderr
            assert heard(client) == b""
        with knock(lab, b, 7100) as another:
            assert heard(another) == b"reset, then b''"
        until(lambda: not b.pids() and not a.pids(), "it ends")
