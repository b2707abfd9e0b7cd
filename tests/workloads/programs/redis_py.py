"""A redis-server and its only client, which writes all the time and has a model of what the server must hold.

Their connection goes through TCP. When it breaks, the client connects again and asks how far the server
came: a turn is one transaction, so it was made as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from life import BadError, Life, check, conclude

KEYS = 1000
TURNS_IN_A_UNIT = 20
CONNECT_S = 20.0
ANSWER_S = 60.0


def value_of(key: int, version: int) -> str:
    """The value a key has in a version: 128 to 384 bytes."""
    return hashlib.sha256(f"{key}:{version}".encode()).hexdigest() * (2 + key % 5)


class BrokenError(Exception):
    """The connection has ended."""


class Client:
    """Speaks RESP version 2."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S)
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()

    def send(self, *commands: tuple[str | int, ...]) -> None:
        """Send commands, without waiting for what the server says."""
        data = b""
        for words in commands:
            encoded = [str(word).encode() for word in words]
            data += b"*%d\r\n" % len(encoded) + b"".join(
                b"$%d\r\n%s\r\n" % (len(one), one) for one in encoded
            )
        try:
            self._socket.sendall(data)
        except (ConnectionError, BrokenPipeError) as error:
            raise BrokenError from error

    def receive(self) -> Any:  # what the server says
        """Return the next answer."""
        line = self._line()
        kind, rest = line[:1], line[1:-2].decode()
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == "-1" else self._exactly(int(rest) + 2)[:-2].decode()
        if kind == b"*":
            return [self.receive() for _ in range(int(rest))]
        raise BadError(f"the server said {line!r}")

    def _line(self) -> bytes:
        try:
            line = self._file.readline()
        except ConnectionError as error:
            raise BrokenError from error
        if not line.endswith(b"\n"):
            raise BrokenError
        return line

    def _exactly(self, length: int) -> bytes:
        try:
            data = self._file.read(length)
        except ConnectionError as error:
            raise BrokenError from error
        if len(data) < length:
            raise BrokenError
        return data

    def ask(self, *words: str | int) -> Any:
        """Send one command and return the answer."""
        self.send(words)
        return self.receive()


class Server:
    """A redis-server that is our child."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        words = ["redis-server", "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
        with open("server", "wb") as out:
            self.process = subprocess.Popen(
                [*words, "--port", str(self.port)], stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        Path("port").write_text(f"{self.port}\n")

    def connect(self) -> Client:
        """Connect, as soon as it lets us."""
        for _ in range(int(CONNECT_S * 100)):
            check(self.process.poll() is None, f"the server ended with {self.process.returncode}")
            with contextlib.suppress(ConnectionError):
                return Client(self.port)
            select.select([], [], [], 0.01)
        raise BadError("the server does not listen")


class Model:
    """What the server must hold."""

    def __init__(self) -> None:
        self.versions = [0] * KEYS
        self.turns = 0
        self.broken = 0

    def next(self) -> tuple[tuple[str | int, ...], ...]:
        """The commands of the next turn."""
        turn = self.turns + 1
        key = turn * 31 % KEYS
        version = self.versions[key] + 1
        return (
            ("MULTI",),
            ("INCR", "turns"),
            ("GETSET", f"key:{key}", value_of(key, version)),
            ("RPUSH", "history", key),
            ("HSET", "latest", key, version),
            ("EXEC",),
        )

    def expect(self, answers: list[Any]) -> None:
        """Raise unless these are the answers to the commands of the next turn."""
        turn = self.turns + 1
        key = turn * 31 % KEYS
        before = value_of(key, self.versions[key]) if self.versions[key] else None
        wanted: list[Any] = [turn, before, turn, int(not self.versions[key])]
        check(answers[:-1] == ["OK"] + ["QUEUED"] * 4, f"the server said {answers[:-1]}")
        check(answers[-1] == wanted, f"the server said {str(answers[-1])[:200]}, not {str(wanted)[:200]}")

    def done(self) -> None:
        """The next turn is over."""
        self.turns += 1
        self.versions[self.turns * 31 % KEYS] += 1

    def verify(self, client: Client) -> None:
        """Raise unless the server holds all of it and nothing else."""
        turns = client.ask("GET", "turns")
        check(turns == str(self.turns), f"the server counts {turns} turns, {self.turns} were made")
        used = [key for key in range(KEYS) if self.versions[key]]
        check(client.ask("DBSIZE") == len(used) + 3, "the server has more keys, or less")
        for key in used:
            check(client.ask("GET", f"key:{key}") == value_of(key, self.versions[key]), f"key {key} is wrong")
        history = [str(turn * 31 % KEYS) for turn in range(1, self.turns + 1)]
        check(client.ask("LRANGE", "history", 0, -1) == history, "the history is another")
        latest = [str(version) if version else None for version in self.versions]
        check(client.ask("HMGET", "latest", *range(KEYS)) == latest, "the latest versions are others")


def turn(client: Client, model: Model) -> None:
    """Do a turn whose answers are all known."""
    commands = model.next()
    client.send(*commands)
    model.expect([client.receive() for _ in commands])
    model.done()


def reconnect(server: Server, model: Model) -> Client:
    """Connect after the connection broke, and learn whether the last turn was made."""
    model.broken += 1
    while True:
        client = server.connect()
        try:
            turns = int(client.ask("GET", "turns") or 0)
        except BrokenError:
            client.close()
            continue
        check(turns in (model.turns, model.turns + 1), f"{turns} turns are done, {model.turns} were seen")
        if turns > model.turns:
            model.done()
        return client


def work(life: Life) -> str:
    """Write until told to stop, then compare everything."""
    server, model = Server(), Model()
    client = server.connect()
    while not life.stopping():
        for _ in range(TURNS_IN_A_UNIT):
            try:
                turn(client, model)
            except BrokenError:
                client.close()
                client = reconnect(server, model)
        life.alive()
    broken = model.broken
    try:
        client.close()
        client = reconnect(server, model)
        model.verify(client)
    finally:
        server.process.kill()
        server.process.wait()
    return f"{model.turns} turns, {broken} broken connections"


if __name__ == "__main__":
    conclude(Life(sys.argv[1]), work)
