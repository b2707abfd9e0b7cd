"""Internet sockets without a peer move; connections are refused by their addresses."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from godwit.errors import DestinationError, ImageError, UnsupportedStateError
from godwit.resources import inet, sockets
from godwit.resources.base import Disposition
from godwit.resources.inet import InetEntry
from godwit.types import FileId, OwnedFd
from tests.kernel.openfiles import Builder, Child, held, is_socket, over_the_wire, readiness

FAMILIES = [socket.AF_INET, socket.AF_INET6]
ADDRESS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def as_socket(fd: OwnedFd) -> socket.socket:
    return socket.socket(fileno=os.dup(fd.number))


def options(fd: OwnedFd) -> sockets.SocketOptions:
    with as_socket(fd) as sock:
        return sockets.collect(sock, inet._options(sock.family, sock.type))


def collected(child: Child) -> InetEntry:
    entry = inet.collect([file for file in child.files if is_socket(file)], child)[0]
    decoded: InetEntry = over_the_wire(inet.KIND, entry)
    return decoded


def refusal(child: Child) -> str:
    finding = inet.inspect(child.files[0], child)
    assert finding.disposition is Disposition.REFUSE
    with pytest.raises(UnsupportedStateError) as caught:
        inet.collect(child.files, child)
    assert caught.value.refusals[0] == finding.refusal()
    return finding.refusal().line()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_listening_server_takes_clients_after_the_move(family: socket.AddressFamily) -> None:
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        else:
            server.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)
        server.bind((ADDRESS[family], 0))
        server.listen(17)
        fd = server.detach()
    with held(fd) as child:
        assert inet.inspect(child.at(fd), child).disposition is Disposition.MOVE
        entry = collected(child)
        assert entry.backlog == 17
        with child.twin(fd) as twin:
            wanted, ready = options(twin), readiness(twin)
    # The port is free now, as it is at a destination.
    with inet.restore(entry, Builder())[FileId(1)] as mine:
        assert (options(mine), readiness(mine)) == (wanted, ready)
        with as_socket(mine) as server, socket.create_connection((entry.host, entry.port)) as client:
            assert inet._TcpInfo.of(server).backlog == 17
            client.send(b"hello")
            accepted, _ = server.accept()
            with accepted:
                assert accepted.recv(9) == b"hello"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_udp_server_receives_after_the_move(family: socket.AddressFamily) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        server.bind((ADDRESS[family], 0))
        fd = server.detach()
    with held(fd) as child:
        entry = collected(child)
        with child.twin(fd) as twin:
            wanted = options(twin)
    with (
        inet.restore(entry, Builder())[FileId(1)] as mine,
        as_socket(mine) as server,
        socket.socket(family, socket.SOCK_DGRAM) as client,
    ):
        assert options(mine) == wanted
        client.sendto(b"hello", (entry.host, entry.port))
        assert server.recv(9) == b"hello"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_socket_that_was_never_used_moves(family: int, kind: int) -> None:
    fd = socket.socket(family, kind).detach()
    with held(fd) as child:
        entry = collected(child)
        with inet.restore(entry, Builder())[FileId(1)] as mine, child.twin(fd) as twin:
            assert (options(mine), readiness(mine)) == (options(twin), readiness(twin))
            with as_socket(mine) as sock:
                assert sock.getsockname()[1] == 0


def test_a_connection_is_refused_with_both_addresses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        name, peer = client.getsockname(), client.getpeername()
        with held(client.detach()) as child:
            line = refusal(child)
            assert f"TCP socket 127.0.0.1:{name[1]} to 127.0.0.1:{peer[1]}" in line
            assert "connections are not carried yet; let the program close it" in line


def test_a_connection_that_ended_unseen_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        with held(client.detach()) as child:
            assert "its connection has ended" in refusal(child)


def test_connections_that_wait_to_be_accepted_are_refused_for_the_moment() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    address, fd = server.getsockname(), server.detach()
    with held(fd) as child, socket.create_connection(address):
        with pytest.raises(UnsupportedStateError, match="1 connections wait to be accepted"):
            inet.collect(child.files, child)
        assert inet.inspect(child.files[0], child).disposition is Disposition.REFUSE


def test_datagrams_that_wait_and_a_udp_peer_are_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(server.getsockname())
            client.send(b"x")
            connected = client.detach()
        waiting = server.detach()
    with held(connected) as child:
        assert "UDP socket 127.0.0.1" in refusal(child)
    with held(waiting) as child, pytest.raises(UnsupportedStateError, match="datagrams wait"):
        inet.collect(child.files, child)


@pytest.mark.requires("root")
def test_a_raw_socket_is_refused() -> None:
    with held(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).detach()) as child:
        assert "its protocol is not carried" in refusal(child)


def test_a_socket_shared_with_somebody_who_stays_is_refused_by_pid() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, held(server.fileno(), close=False) as child:
        assert f"pid {os.getpid()}" in refusal(child)


def test_a_taken_port_and_a_foreign_address_are_the_destinations_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with OwnedFd(os.dup(server.fileno())) as fd:
            wanted = options(fd)
        host, port = server.getsockname()
        for address in ((host, port), ("192.0.2.7", port)):
            entry = InetEntry(
                file_id=FileId(1),
                family=socket.AF_INET,
                kind=socket.SOCK_STREAM,
                host=address[0],
                port=address[1],
                backlog=1,
                options=wanted,
            )
            with pytest.raises(DestinationError, match=f"cannot bind {address[0]}"):
                inet.restore(entry, Builder())


@pytest.mark.parametrize(
    ("family", "kind", "port", "backlog"),
    [(socket.AF_UNIX, 1, 0, 0), (socket.AF_INET, 3, 0, 0), (socket.AF_INET, 1, 65536, 0), (2, 1, 1, -2)],
)
def test_an_impossible_socket_from_a_peer_is_refused(family: int, kind: int, port: int, backlog: int) -> None:
    plain = sockets.SocketOptions(
        plain=(), send_buffer_bytes=5000, receive_buffer_bytes=5000, buffer_locks=-1
    )
    entry = InetEntry(
        file_id=FileId(1), family=family, kind=kind, host="::", port=port, backlog=backlog, options=plain
    )
    with pytest.raises(ImageError):
        inet.restore(entry, Builder())
