"""redis-server as a workload: a client with a model of what the server must hold.

The client connects only inside a call and has seen the server close the connection when the call returns,
so that between calls the server holds no connection of ours.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from tests.workloads.driver import (
    CACHE,
    WORKLOADS,
    Launcher,
    Result,
    Running,
    WorkloadError,
    launch_here,
    wait_until,
)

KEYS = 2000
PIPELINE = 200
TIMEOUT_S = 60.0

Connect = Callable[[int], socket.socket]
Reply: TypeAlias = "str | int | list[Reply] | None"


class RedisError(WorkloadError):
    """The server answered with an error, or not in its protocol, or not with what the model says."""


def connect_here(port: int) -> socket.socket:
    """Connect to a server in this network namespace."""
    return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)


class Client:
    """Speaks RESP version 2 over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def close(self) -> None:
        """Return only when the server has closed its end too."""
        try:
            self._connection.shutdown(socket.SHUT_WR)
            while self._file.read(4096):
                continue
        except OSError:
            pass  # The server is gone already.
        self._file.close()
        self._connection.close()

    def send(self, *words: str | int) -> None:
        """Send one command; `receive` has its answer."""
        encoded = [str(word).encode() for word in words]
        parts = [b"*%d\r\n" % len(encoded)] + [b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded]
        self._connection.sendall(b"".join(parts))

    def receive(self) -> Reply:
        """The next answer."""
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise RedisError("the server closed the connection")
        kind, rest = line[:1], line[1:-2].decode()
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == "-1" else self._file.read(int(rest) + 2)[:-2].decode()
        if kind == b"*":
            return [self.receive() for _ in range(int(rest))]
        raise RedisError(f"the server said {line!r}")

    def ask(self, *words: str | int) -> Reply:
        """Send one command and return the answer."""
        self.send(*words)
        return self.receive()


def value_of(key: int, version: int) -> str:
    """The value a key has in a version: 128 to 384 bytes."""
    return hashlib.sha256(f"{key}:{version}".encode()).hexdigest() * (2 + key % 5)


class RedisRunning(Running):
    """A redis-server and the model of its content."""

    port: int
    connect: Connect
    versions: list[int]
    turns: int

    def _client(self) -> closing[Client]:
        return closing(Client(self.connect(self.port)))

    def _answers(self) -> bool:
        try:
            with self._client() as client:
                return client.ask("PING") == "PONG"
        except ConnectionRefusedError:
            return False

    def load(self, port: int, connect: Connect) -> None:
        """Wait for the server and fill it."""
        self.port = port
        self.connect = connect
        self.versions = [0] * KEYS
        self.turns = 0
        if not wait_until(self._answers, TIMEOUT_S):
            raise RedisError(f"the server does not answer: {self._read('stdout')[-500:]}")
        with self._client() as client:
            for first in range(0, KEYS, PIPELINE):
                for key in range(first, first + PIPELINE):
                    client.send("SET", f"key:{key}", value_of(key, 0))
                    client.send("ZADD", "scores", key * 7 % KEYS, f"key:{key}")
                for _ in range(2 * PIPELINE):
                    client.receive()

    def _turn(self, client: Client) -> None:
        """One unit of work: each kind of value changes, and each answer is known."""
        self.turns += 1
        key = self.turns * 31 % KEYS
        before = value_of(key, self.versions[key])
        self.versions[key] += 1
        expect(client.ask("INCR", "turns"), self.turns)
        expect(client.ask("GETSET", f"key:{key}", value_of(key, self.versions[key])), before)
        expect(client.ask("RPUSH", "history", key), self.turns)
        expect(client.ask("HSET", "latest", key, self.versions[key]), int(self.versions[key] == 1))

    def alive(self) -> int:
        """How many units of work are done."""
        return self.turns

    def wait_alive(self, deadline_s: float = 60.0, more: int = 3) -> int:
        """Do `more` units of work on a new connection."""
        del deadline_s  # the socket has its own
        with self._client() as client:
            for _ in range(more):
                self._turn(client)
        return self.turns

    def _verify(self, client: Client) -> None:
        expect(client.ask("DBSIZE"), KEYS + 1 + (3 if self.turns else 0))
        expect(client.ask("GET", "turns"), str(self.turns) if self.turns else None)
        for first in range(0, KEYS, PIPELINE):
            keys = range(first, first + PIPELINE)
            wanted: list[Reply] = [value_of(key, self.versions[key]) for key in keys]
            expect(client.ask("MGET", *(f"key:{key}" for key in keys)), wanted)
        history: list[Reply] = [str(turn * 31 % KEYS) for turn in range(1, self.turns + 1)]
        expect(client.ask("LRANGE", "history", 0, -1), history)
        latest: list[Reply] = [str(version) if version else None for version in self.versions]
        expect(client.ask("HMGET", "latest", *range(KEYS)), latest)
        ranked: list[Reply] = [f"key:{key}" for key in sorted(range(KEYS), key=lambda key: key * 7 % KEYS)]
        expect(client.ask("ZRANGE", "scores", 0, -1), ranked)

    def finish(self, deadline_s: float = 120.0) -> Result:
        """Compare all the server holds with the model, then end it."""
        del deadline_s
        try:
            with self._client() as client:
                self._verify(client)
                client.send("SHUTDOWN", "NOSAVE")
        except (RedisError, OSError) as error:
            return Result(ok=False, text=f"bad: {error}")
        return Result(ok=True, text=f"ok {self.turns} turns")


def expect(found: Reply, wanted: Reply) -> None:
    """Raise unless the answer is the one the model gives."""
    if found != wanted:
        raise RedisError(f"the server said {str(found)[:200]}, not {str(wanted)[:200]}")


def free_port() -> int:
    """A port nobody listens on in this network namespace."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def start_redis(  # each is a choice of the caller
    directory: Path,
    launcher: Launcher = launch_here,
    options: Sequence[str] = (),
    *,
    port: int | None = None,
    bind: str = "127.0.0.1",
    connect: Connect = connect_here,
    cache_dir: Path = CACHE,
) -> RedisRunning:
    """Start a redis-server and fill it. `connect(port)` reaches it, wherever its network is."""
    chosen = free_port() if port is None else port
    words = ["--port", str(chosen), "--bind", bind, *options]
    running = RedisRunning.start(WORKLOADS["redis"], directory, launcher, words, cache_dir)
    running.load(chosen, connect)
    return running


def start(
    name: str,
    directory: Path,
    launcher: Launcher = launch_here,
    options: Sequence[str] = (),
    cache_dir: Path = CACHE,
) -> Running:
    """Start any workload by name, redis among them."""
    if name == "redis":
        return start_redis(directory, launcher, options, cache_dir=cache_dir)
    return Running.start(WORKLOADS[name], directory, launcher, options, cache_dir)
