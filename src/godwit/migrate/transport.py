"""How to reach another machine: `tls://host:port`, `user@host` over ssh, or a node's own connection."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from godwit.errors import AccessError, DestinationError, RequestError
from godwit.migrate.channel import Channel, FdPipe, SocketPipe
from godwit.residual.line import Pipe

if TYPE_CHECKING:
    import ssl

    from godwit.migrate.tlspipe import TlsPipe

_CONNECT_TIMEOUT_S: Final = 10.0
_HANDSHAKE_TIMEOUT_S: Final = 20.0
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 4 << 20
DEFAULT_PORT: Final = 7487
_RECEIVE: Final = "godwit receive --stdio"
LINK_WORD: Final = b"GODWLINK"  # in front of a link's TLS; no record of TLS begins so


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine whose connection somebody else knows how to make: a laboratory's node."""

    connect: Callable[[], socket.socket]
    certs: Path


def certs_directory() -> Path:
    """Return where our own identity lies: $GODWIT_CERTS, a node's, the system's, or the user's."""
    named = os.environ.get("GODWIT_CERTS")
    places = [Path(named)] if named else []
    places += [
        Path("/run/godwit/certs"),
        Path("/etc/godwit/certs"),
        Path("~/.config/godwit/certs").expanduser(),
    ]
    for place in places:
        if (place / "node.key").exists():
            return place
    raise RequestError(
        "no certificates to prove ourselves with",
        remedy="make some with `godwit certs`, and name their directory in GODWIT_CERTS",
    )


def connect(host: str, node: Node | None) -> Channel:
    """Open a channel to a receiving Godwit.

    Raises:
        RequestError: The name makes no sense.
        DestinationError: It does not answer, or its Godwit does not.
        AccessError: It does not prove itself, or does not believe us.
    """
    if node is not None:
        return Channel(_client_tls(node.connect(), node.certs))
    if host.startswith("tls://"):
        return _connect_tls(host)
    if "@" in host:
        return Channel(_connect_ssh(host))
    raise RequestError(
        f"do not know the machine {host!r}",
        remedy="name a lab node, user@host (ssh), or tls://host:port",
    )


def connect_link(host: str, node: Node | None) -> Pipe:
    """Open a connection for a link to the keeper of a machine that receives.

    Raises:
        As `connect`.
    """
    if node is not None:
        return _announce_link(node.connect(), node.certs)
    if host.startswith("tls://"):
        certs = certs_directory()
        return _announce_link(_connect_tcp(host), certs)
    return _connect_ssh(host, " --link")


def _announce_link(plain: socket.socket, certs: Path) -> TlsPipe:
    plain.sendall(LINK_WORD)
    return _client_tls(plain, certs)


def announces_link(plain: socket.socket) -> bool:
    """Tell, by its first bytes, whether a connection is to become a link; these are taken then."""
    plain.settimeout(_HANDSHAKE_TIMEOUT_S)
    try:
        if plain.recv(1, socket.MSG_PEEK) != LINK_WORD[:1]:
            return False
        return plain.recv(len(LINK_WORD), socket.MSG_WAITALL) == LINK_WORD
    except OSError:
        return False
    finally:
        plain.settimeout(None)


def link_over(connection: socket.socket, certs: Path | None) -> Pipe:
    """Make a pipe of a connection that announced a link; without certificates it has proved itself.

    Raises:
        AccessError: It does not prove itself.
    """
    return SocketPipe(connection) if certs is None else server_tls(connection, certs)


def _connect_tls(url: str) -> Channel:
    return Channel(_client_tls(_connect_tcp(url), certs_directory()))


def _connect_tcp(url: str) -> socket.socket:
    name, _, port = url.removeprefix("tls://").rstrip("/").rpartition(":")
    if not port.isdigit():
        name, port = url.removeprefix("tls://").rstrip("/"), str(DEFAULT_PORT)
    try:
        plain = socket.create_connection((name.strip("[]"), int(port)), _CONNECT_TIMEOUT_S)
    except OSError as error:
        raise DestinationError(
            f"{url} does not answer: {error.strerror or error}",
            remedy="start `godwit receive --listen` there",
        ) from error
    plain.settimeout(None)
    return plain


def _context(certs: Path, *, server: bool) -> ssl.SSLContext:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The authority signs nobody but our machines; their names change with every laboratory.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(certs / "ca.pem")
        context.load_cert_chain(certs / "node.pem", certs / "node.key")
    except OSError as error:
        raise RequestError(
            f"cannot read the certificates in {certs}: {error}", remedy="make them with `godwit certs`"
        ) from error
    return context


def _watch_over(connection: socket.socket) -> None:
    """Have the kernel notice a peer that is gone without a word, in about ten seconds."""
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 3),
        (socket.TCP_KEEPINTVL, 2),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, 9000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # A move is over before the kernel has found out how large the buffers should be.
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        with contextlib.suppress(PermissionError):
            connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


def _client_tls(plain: socket.socket, certs: Path) -> TlsPipe:
    return _wrap(plain, certs, server=False)


def server_tls(plain: socket.socket, certs: Path) -> TlsPipe:
    """Prove ourselves to who connected, and have them prove themselves. Raises AccessError."""
    return _wrap(plain, certs, server=True)


def _wrap(plain: socket.socket, certs: Path, *, server: bool) -> TlsPipe:
    import ssl

    from godwit.migrate.tlspipe import TlsPipe

    _watch_over(plain)
    plain.settimeout(_HANDSHAKE_TIMEOUT_S)
    try:
        return TlsPipe(plain, _context(certs, server=server), server=server)
    except (ssl.SSLError, ConnectionError, TimeoutError) as error:
        plain.close()
        reason = getattr(error, "reason", None) or error
        raise AccessError(
            f"the other machine did not prove itself, or does not trust us ({reason})",
            remedy="use certificates of one authority on both machines (`godwit certs`)",
        ) from error


def _connect_ssh(host: str, option: str = "") -> FdPipe:
    command = os.environ.get("GODWIT_SSH", "ssh")
    remote = os.environ.get("GODWIT_REMOTE_COMMAND", _RECEIVE)
    words = [*shlex.split(command), "-o", "BatchMode=yes", "--", host, remote + option]
    try:
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    except FileNotFoundError as error:
        raise DestinationError(f"no program {words[0]!r}", remedy="install openssh-client") from error
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    def close() -> None:
        for stream in (stdin, stdout):
            with contextlib.suppress(OSError):
                stream.close()
        child.wait()

    return FdPipe(stdout.fileno(), stdin.fileno(), close, child.kill)
