"""A client that writes to a redis-server and notes how long each answer took: `python -m bench.redisload`.

usage: fill ADDRESS PORT MIB         fill the server; print how many keys it has
       write PORT KEYS PER_S FILE ADDRESS...   write until standard input ends; the answers' times go to FILE
       verify ADDRESS PORT KEYS      expect every key, and of many a value of its own

The server has one of the addresses, and moves from one to the other. Its connections break when it does. An
answer that is late makes the client ask at the other addresses as well, once more each millisecond, and take
whichever comes first: a write may then happen twice, which changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

VALUE_BYTES = 1024
LATE_MS = 2
_AGAIN_MS = 1
_PATIENCE_S = 20.0
_PIPELINE = 512
_NOISE = os.urandom(1 << 20)
_SEED = 0x9E3779B97F4A7C15


def command(*words: bytes) -> bytes:
    """Return a command in RESP, the protocol of redis."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def assignment(key: int, version: int) -> bytes:
    """Return the command that gives a key a value: its own number, then bytes that do not pack."""
    name = b"key:%d" % key
    start = (key * 4099 + version * 127) % (len(_NOISE) - VALUE_BYTES)
    return command(b"SET", name, (name + b" " + _NOISE[start : start + VALUE_BYTES])[:VALUE_BYTES])


def fill(address: str, port: str, mib: str) -> None:
    """Give the server so much."""
    keys = (int(mib) << 20) // VALUE_BYTES
    with socket.create_connection((address, int(port))) as connection:
        for first in range(0, keys, _PIPELINE):
            some = range(first, min(first + _PIPELINE, keys))
            connection.sendall(b"".join(assignment(key, 0) for key in some))
            _read_exactly(connection, b"+OK\r\n" * len(some))
    print(json.dumps({"keys": keys}))


def verify(address: str, port: str, keys: str) -> None:
    """Look at a part of what the server has."""
    with socket.create_connection((address, int(port))) as connection:
        connection.sendall(command(b"DBSIZE"))
        _read_exactly(connection, b":%d\r\n" % int(keys))
        for key in range(0, int(keys), max(int(keys) // 5000, 1)):
            name = b"key:%d" % key
            connection.sendall(command(b"GETRANGE", name, b"0", b"%d" % len(name)))
            _read_exactly(connection, b"$%d\r\n%s \r\n" % (len(name) + 1, name))
    print(json.dumps({"verified": True}))


def write(port: str, keys: str, per_s: str, output: str, *addresses: str) -> None:
    """Write at a steady rate, one command at a time, to random keys."""
    server = Server(addresses, int(port))
    answers: list[tuple[int, float, float]] = []
    print("ready", flush=True)
    state, due_ns, step_ns = 1, time.time_ns(), 1_000_000_000 // int(per_s)
    while _more(max(due_ns - time.time_ns(), 0)):
        if due_ns > time.time_ns():
            continue
        state = (state * 6364136223846793005 + _SEED) & (1 << 64) - 1
        sent_ns = time.time_ns()
        server.ask(assignment((state >> 32) % int(keys), len(answers)))
        now_ns = time.time_ns()
        answers.append((due_ns, (now_ns - due_ns) / 1e6, (now_ns - sent_ns) / 1e6))
        due_ns += step_ns
    Path(output).write_text(json.dumps(answers), encoding="ascii")


def _more(wait_ns: int) -> bool:
    """Wait so long; tell whether standard input is still open."""
    ready, _, _ = select.select([0], [], [], wait_ns / 1e9)
    return not ready


class Server:
    """A server at one of several addresses."""

    def __init__(self, addresses: Sequence[str], port: int) -> None:
        self._addresses = addresses
        self._port = port
        self._lines: dict[str, socket.socket] = {}  # those on which the request is under way

    def ask(self, request: bytes) -> None:
        """Have a write done. Raises TimeoutError."""
        deadline = time.monotonic() + _PATIENCE_S
        self._send(list(self._lines) or self._addresses, request)
        wait_ms = LATE_MS
        while time.monotonic() < deadline:
            for address in self._answering(wait_ms):
                if self._answered(address):
                    self._keep_only(address)
                    return
            self._send([each for each in self._addresses if each not in self._lines], request)
            wait_ms = _AGAIN_MS
        raise TimeoutError("the server does not answer")

    def _answering(self, wait_ms: int) -> Iterator[str]:
        """Wait for an answer; yield the addresses that have said something, or hung up."""
        poller = select.poll()
        named = {line.fileno(): address for address, line in self._lines.items()}
        for number in named:
            poller.register(number, select.POLLIN)
        for number, _ in poller.poll(wait_ms):
            yield named[number]

    def _answered(self, address: str) -> bool:
        try:
            answer = self._lines[address].recv(64)
        except OSError:
            answer = b""
        if answer not in (b"", b"+OK\r\n"):
            raise RuntimeError(f"the server said {answer!r}")
        if not answer:
            self._lines.pop(address).close()
        return bool(answer)

    def _send(self, addresses: Sequence[str], request: bytes) -> None:
        for address in addresses:
            # Nobody listens there, or it has just moved away.
            with contextlib.suppress(OSError):
                if address not in self._lines:
                    line = socket.create_connection((address, self._port), timeout=1)
                    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._lines[address] = line
                self._lines[address].sendall(request)

    def _keep_only(self, address: str) -> None:
        for other in [each for each in self._lines if each != address]:
            self._lines.pop(other).close()


def _read_exactly(connection: socket.socket, wanted: bytes) -> None:
    found = b""
    while len(found) < len(wanted):
        found += connection.recv(len(wanted) - len(found)) or sys.exit("the server hung up")
    if found != wanted:
        sys.exit(f"the server said {found[:100]!r}, not {wanted[:100]!r}")


WORDS = {each.__name__: each for each in (fill, write, verify)}

if __name__ == "__main__":
    WORDS[sys.argv[1]](*sys.argv[2:])
