"""Waiting for processes to come: on standard input, on a TLS port, or on a connection handed over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from godwit.errors import AccessError, GodwitError, RequestError
from godwit.log import log
from godwit.migrate import destination, transport
from godwit.migrate.channel import Channel, FdPipe, cut
from godwit.residual import keeping
from godwit.residual.keeping import Welcome

_STEP_BYTES: Final = 256 << 10


def serve_stdio() -> None:
    """Receive one move over standard input and output: what runs at the far end of ssh.

    Raises:
        GodwitError: The move failed; the source was told why.
    """
    require_root()
    inward, outward = os.dup(0), os.dup(1)
    # Whatever the restored program or a library prints must not get into the stream.
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    destination.serve(Channel(FdPipe(inward, outward)))


def serve_link_stdio() -> None:
    """Pass a link on between standard input and output and our keeper, until either ends.

    Raises:
        GodwitError: The keeper does not take it.
    """
    require_root()
    ours, theirs = socket.socketpair()
    with theirs:
        keeping.ask(Welcome(certs=""), [theirs.fileno()])
    with ours:
        inward = threading.Thread(target=_copy, args=(0, ours.fileno(), lambda: cut(ours)), daemon=True)
        inward.start()
        _copy(ours.fileno(), 1, lambda: cut(ours))


def _copy(source: int, target: int, at_end: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(source, _STEP_BYTES):
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(target, rest) :]
    at_end()


def serve_connection(connection: socket.socket, certs: Path) -> None:
    """Serve a fresh connection: a move, or a link for our keeper. Failures are logged here."""
    try:
        if transport.announces_link(connection):
            with connection:
                keeping.ask(Welcome(certs=str(certs)), [connection.fileno()])
            return
        channel = Channel(transport.server_tls(connection, certs))
        with contextlib.closing(channel):
            destination.serve(channel)
    except (GodwitError, OSError) as error:
        log.warning("move not received: %s", error.line() if isinstance(error, GodwitError) else error)


def serve_tls(
    listen: str, certs: Path, *, once: bool = False, ready: Callable[[str], None] = lambda _: None
) -> None:
    """Receive moves on a TLS port, each in a process of its own.

    Args:
        listen: host:port; port 0 lets the kernel choose.
        certs: Directory of our identity; only machines of the same authority are served.
        once: Return after the first move.
        ready: Called with the address once it listens.
    """
    require_root()
    if not once:
        signal.signal(signal.SIGCHLD, _reap)
    host, _, port = listen.rpartition(":")
    if not port.isdigit():
        raise RequestError(f"not an address to listen on: {listen!r}", remedy="say host:port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host.strip("[]"), int(port)), family=family) as server:
        bound = server.getsockname()
        ready(f"{bound[0]}:{bound[1]}")
        while True:
            connection, _ = server.accept()
            child = os.fork()
            if child == 0:
                server.close()
                _serve_in_child(connection, certs)
            connection.close()
            if once:
                os.waitpid(child, 0)
                return


def _serve_in_child(connection: socket.socket, certs: Path) -> None:
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        serve_connection(connection, certs)
    finally:
        os._exit(0)


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def require_root() -> None:
    """Raise AccessError unless we may build processes with chosen pids."""
    if os.geteuid() != 0:
        raise AccessError("receiving a process takes root", remedy="run godwit receive as root")
