"""What the benchmark runs inside a laboratory's node: `python -m bench.inside WORD ...`.

Each word answers with one line of JSON; those that serve say `ready PORT` first.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.numbers import MIB
from godwit import api
from godwit.lab.plan import NODE_RUN
from godwit.migrate import transport
from godwit.migrate.channel import SocketPipe
from godwit.migrate.tlspipe import TlsPipe

CERTS = Path(NODE_RUN, "certs")
_STEP_BYTES = MIB


def move(pid: str, host: str, options: str) -> None:
    """Move a process from this node to another, with options of `api.migrate` in JSON; print the report."""
    print(msgspec.json.encode(api.migrate(int(pid), host, **json.loads(options))).decode())


def sink(security: str, length_bytes: str) -> None:
    """Take one connection, read so much from it into one buffer, and acknowledge."""
    with socket.create_server(("", 0)) as server:
        print(f"ready {server.getsockname()[1]}", flush=True)
        connection, _ = server.accept()
    pipe = transport.server_tls(connection, CERTS) if security == "tls" else SocketPipe(connection)
    buffer = _touched()
    with contextlib.closing(pipe):
        pipe.write(b"b")
        left = int(length_bytes)
        while left:
            left -= pipe.fill(buffer[: min(left, len(buffer))]) or sys.exit("the stream ended early")
        pipe.write(b"e")


def send(security: str, host: str, port: str, length_bytes: str) -> None:
    """Send so much from one touched buffer; print how long it took until it was acknowledged."""
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pipe = (
        TlsPipe(connection, _client_context(), server=False) if security == "tls" else SocketPipe(connection)
    )
    buffer, word = _touched(), memoryview(bytearray(1))
    with contextlib.closing(pipe):
        pipe.fill(word)
        started_ns = time.monotonic_ns()
        for _ in range(int(length_bytes) // len(buffer)):
            pipe.write(buffer)
        pipe.fill(word)
        print(json.dumps({"ms": (time.monotonic_ns() - started_ns) / 1e6}))


def echo() -> None:
    """Send every byte of one connection back."""
    with socket.create_server(("", 0)) as server:
        print(f"ready {server.getsockname()[1]}", flush=True)
        connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        while data := connection.recv(1):
            connection.sendall(data)


def ping(host: str, port: str, times: str) -> None:
    """Print how long one byte takes there and back, each time."""
    took = []
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(int(times)):
            started_ns = time.monotonic_ns()
            connection.sendall(b"x")
            connection.recv(1)
            took.append((time.monotonic_ns() - started_ns) / 1e3)
    print(json.dumps({"us": took}))


def _touched() -> memoryview:
    return memoryview(bytearray(b"\x5a" * _STEP_BYTES))


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.load_verify_locations(CERTS / "ca.pem")
    context.load_cert_chain(CERTS / "node.pem", CERTS / "node.key")
    return context


WORDS: dict[str, Callable[..., None]] = {each.__name__: each for each in (move, sink, send, echo, ping)}

if __name__ == "__main__":
    WORDS[sys.argv[1]](*sys.argv[2:])
