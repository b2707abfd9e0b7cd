"""Pairs of unix sockets move with what waits in them."""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import struct
from pathlib import Path

import pytest

from godwit.errors import ImageError, UnsupportedStateError
from godwit.linux import abi, ns, peercred, sockdiag
from godwit.resources import sockets, unixsocket
from godwit.resources.base import Disposition
from godwit.resources.sockets import SO_PEEK_OFF, SocketOption, SocketOptions
from godwit.resources.unixsocket import UnixEnd, UnixPairEntry
from godwit.types import FileId, OwnedFd
from tests.kernel.openfiles import Builder, Child, held, moved, readiness, restored, same

STREAM, DGRAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
KINDS = [STREAM, DGRAM, SEQPACKET]
MESSAGES = [b"one", b"", b"three", b"x" * 70_000, b""]


def pair(kind: int) -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, kind)


def as_socket(fd: OwnedFd) -> socket.socket:
    return socket.socket(fileno=os.dup(fd.number))


def received(fd: OwnedFd) -> list[bytes | str]:
    """Take all that waits: messages, or a stream's bytes at once, then how it ends."""
    seen: list[bytes | str] = []
    with as_socket(fd) as sock:
        while len(seen) < 50:
            try:
                seen.append(sock.recv(1 << 20, socket.MSG_DONTWAIT))
            except OSError as error:
                seen.append(type(error).__name__)
                if isinstance(error, BlockingIOError):
                    break
                continue
            if not seen[-1] and sock.type == STREAM:
                break
    return seen


def question(fd: OwnedFd) -> tuple[int, list[bytes | str], int]:
    return readiness(fd), received(fd), readiness(fd)


@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_in_both_directions_is_received_after_the_move(kind: int) -> None:
    left, right = pair(kind)
    for message in MESSAGES:
        left.send(message)
    right.send(b"back")
    ours = (left.detach(), right.detach())
    with held(*ours) as child, restored(unixsocket.KIND, child) as builder:
        for fd in ours:
            assert unixsocket.inspect(child.at(fd), child).disposition is Disposition.MOVE
        for fd in ours:
            with child.twin(fd) as twin:
                same(question, moved(child, builder, fd), twin)
        with as_socket(moved(child, builder, ours[0])) as mine_left:
            mine_left.send(b"later")
        assert b"later" in received(moved(child, builder, ours[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_keeps_its_peek_offset_and_its_content(kind: int) -> None:
    left, right = pair(kind)
    left.send(b"abc")
    right.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 2 if kind == STREAM else -1)
    before = right.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    fd = right.detach()
    with held(left.detach(), fd) as child, restored(unixsocket.KIND, child) as builder:
        with child.twin(fd) as twin, as_socket(twin) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == before
            assert sock.recv(9) == b"abc"
        with as_socket(moved(child, builder, fd)) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_a_half_shut_down_pair_stays_so(kind: int, how: int) -> None:
    left, right = pair(kind)
    left.send(b"last words")
    right.send(b"answer")
    left.shutdown(how)
    ours = (left.detach(), right.detach())
    with held(*ours) as child, restored(unixsocket.KIND, child) as builder:
        for fd in ours:
            with child.twin(fd) as twin:
                same(question, moved(child, builder, fd), twin)
                same(_send_result, moved(child, builder, fd), twin)


def _send_result(fd: OwnedFd) -> str:
    with as_socket(fd) as sock:
        try:
            return str(sock.send(b"x", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT))
        except OSError as error:
            return type(error).__name__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unread_by_the_closed_end", [False, True])
def test_an_end_whose_peer_is_closed_reads_the_rest_and_is_told(
    kind: int, unread_by_the_closed_end: bool
) -> None:
    left, right = pair(kind)
    left.send(b"last words")
    if unread_by_the_closed_end:
        right.send(b"never read")
    left.close()
    fd = right.detach()
    with held(fd) as child:
        if kind == SEQPACKET and unread_by_the_closed_end:
            # Looking at the messages would take the error away.
            with child.twin(fd) as twin:
                before = readiness(twin)
            with pytest.raises(UnsupportedStateError, match="before its messages"):
                unixsocket.collect(child.files, child)
            with child.twin(fd) as twin:
                assert readiness(twin) == before
            return
        with restored(unixsocket.KIND, child) as builder, child.twin(fd) as twin:
            mine = moved(child, builder, fd)
            same(question, mine, twin)
            same(_send_result, mine, twin)


def test_a_waiting_error_is_not_taken_away_by_the_look() -> None:
    left, right = pair(STREAM)
    right.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1000)
    left.send(b"last words")
    right.send(b"never read")
    left.close()
    fd = right.detach()
    with held(fd) as child, restored(unixsocket.KIND, child) as builder, child.twin(fd) as twin:
        assert readiness(twin) & select.POLLERR
        same(question, moved(child, builder, fd), twin)


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_that_was_never_connected_moves(kind: int) -> None:
    fd = socket.socket(socket.AF_UNIX, kind).detach()
    with held(fd) as child, restored(unixsocket.KIND, child) as builder, child.twin(fd) as twin:
        same(readiness, moved(child, builder, fd), twin)
        same(_send_result, moved(child, builder, fd), twin)


@pytest.mark.requires("root")
@pytest.mark.parametrize("kind", KINDS)
def test_the_peer_is_still_of_the_user_who_made_the_pair(kind: int) -> None:
    left, right = peercred.socketpair_as(1234, 2345, socket.SocketKind(kind))
    ours = (left.detach(), right.detach())
    with held(*ours) as child, restored(unixsocket.KIND, child) as builder:
        for fd in ours:
            with as_socket(moved(child, builder, fd)) as mine:
                assert peercred.peer_ids(mine) == (1234, 2345)
    assert (os.geteuid(), os.getegid()) == (0, 0)
    assert abi.syscall("prctl", peercred.PR_GET_DUMPABLE, 0, 0, 0, 0) == 1


def test_options_move_and_the_buffers_are_not_those_of_the_filling() -> None:
    left, right = pair(STREAM)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 3, 500_000))
    left.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 7)
    left.send(b"full " * 1000)
    ours = (left.detach(), right.detach())
    with held(*ours) as child, restored(unixsocket.KIND, child) as builder:
        for fd in ours:
            with child.twin(fd) as twin:
                same(_options, moved(child, builder, fd), twin)


def _options(fd: OwnedFd) -> SocketOptions:
    with as_socket(fd) as sock:
        return sockets.collect(sock, ((socket.SOL_SOCKET, SO_PEEK_OFF),))


def refusal(child: Child, fd: int) -> str:
    finding = unixsocket.inspect(child.at(fd), child)
    assert finding.disposition is Disposition.REFUSE
    with pytest.raises(UnsupportedStateError) as caught:
        unixsocket.collect(child.files, child)
    assert caught.value.refusals[0] == finding.refusal()
    return finding.refusal().line()


def test_a_listening_socket_is_refused_by_its_name(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "server"))
        server.listen()
        fd = server.detach()
    with held(fd) as child:
        assert f"{tmp_path}/server: it listens" in refusal(child, fd)


def test_an_abstract_name_is_refused_by_its_name() -> None:
    with socket.socket(socket.AF_UNIX, DGRAM) as server:
        server.bind(b"\0godwit-test-name")
        fd = server.detach()
    with held(fd) as child:
        assert "@godwit-test-name" in refusal(child, fd)


def test_a_connection_to_a_named_server_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "server"))
        server.listen()
        client.connect(str(tmp_path / "server"))
        peer, _ = server.accept()
        ours = (client.detach(), peer.detach())
    with held(*ours) as child:
        assert str(tmp_path) in refusal(child, ours[0])


def test_a_pair_whose_other_end_stays_is_refused_by_pid() -> None:
    left, right = pair(STREAM)
    with left, held(right.fileno(), close=False) as child:
        fd = right.detach()
        os.close(fd)
        line = refusal(child, fd)
        assert f"pid {os.getpid()} (fd {left.fileno()})" in line


def test_an_end_shared_with_somebody_who_stays_is_refused_by_pid() -> None:
    left, right = pair(STREAM)
    with left, held(left.fileno(), right.fileno(), close=False) as child:
        fd = left.fileno()
        right.close()
        assert f"pid {os.getpid()}" in refusal(child, fd)


@pytest.mark.parametrize("kind", KINDS)
def test_open_files_in_a_message_are_refused_and_stay_there(kind: int) -> None:
    left, right = pair(kind)
    with OwnedFd(os.eventfd(0)) as passenger:
        socket.send_fds(left, [b"with a file"], [passenger.number])
    fd = right.detach()
    with held(left.detach(), fd) as child, child.twin(fd) as twin:
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(UnsupportedStateError, match="open files wait"):
            unixsocket.collect(child.files, child)
        assert sorted(os.listdir("/proc/self/fd")) == before
        with as_socket(twin) as sock:
            data, fds, _, _ = socket.recv_fds(sock, 99, 1)
            assert (data, len(fds)) == (b"with a file", 1)
            os.close(fds[0])


@pytest.mark.parametrize("instructions", [1, 100])
def test_a_packet_filter_is_refused(instructions: int) -> None:
    left, right = pair(DGRAM)
    # BPF_RET of everything, as often as asked: struct sock_filter, struct sock_fprog.
    code = struct.pack("HBBI", 6, 0, 0, 0xFFFFFFFF) * instructions
    buffer = array.array("B", code)
    right.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", instructions, buffer.buffer_info()[0]))
    with (
        held(left.detach(), right.detach()) as child,
        pytest.raises(UnsupportedStateError, match="packet filter"),
    ):
        unixsocket.collect(child.files, child)


def test_messages_that_tell_their_sender_are_refused() -> None:
    left, right = pair(STREAM)
    right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    left.send(b"x")
    with (
        held(left.detach(), right.detach()) as child,
        pytest.raises(UnsupportedStateError, match="who sent them"),
    ):
        unixsocket.collect(child.files, child)


@pytest.mark.requires("root")
def test_sockets_of_another_network_namespace_move() -> None:
    with contextlib.ExitStack() as stack:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                ns.unshare(ns.CLONE_NEWNET)
                left, right = pair(STREAM)
                left.send(b"from afar")
                os.write(writer, bytes([left.fileno(), right.fileno()]))
                signal.pause()
            finally:
                os._exit(0)
        stack.callback(os.waitpid, pid, 0)
        stack.callback(os.kill, pid, 9)
        stack.callback(os.close, writer)
        fds = list(os.read(reader, 2))
        os.close(reader)
        child = Child(pid, fds)  # type: ignore[arg-type]
        builder = stack.enter_context(restored(unixsocket.KIND, child))
        assert received(moved(child, builder, fds[1])) == [b"from afar", "BlockingIOError"]


def test_an_unknown_option_from_a_peer_is_refused() -> None:
    odd = SocketOption(level=1, name=socket.SO_MARK + 1000, value=b"\1\0\0\0")
    options = SocketOptions(
        plain=(odd,), send_buffer_bytes=212_992, receive_buffer_bytes=212_992, buffer_locks=-1
    )
    end = UnixEnd(file_id=FileId(1), options=options, shutdown=0, unread=(), error=False)
    with pytest.raises(ImageError, match="not known here"):
        unixsocket.restore(UnixPairEntry(kind=STREAM, connected=False, ends=(end,), uid=0, gid=0), Builder())
    for kind, connected, ends in ((4, True, (end,)), (STREAM, False, (end, end)), (STREAM, True, ())):
        with pytest.raises(ImageError, match="no pair"):
            unixsocket.restore(
                UnixPairEntry(kind=kind, connected=connected, ends=ends, uid=0, gid=0), Builder()
            )


@pytest.mark.parametrize("reply", [b"", b"\0" * 15, b"\0" * 40])
def test_an_answer_of_netlink_that_is_none_is_refused(reply: bytes) -> None:
    with pytest.raises(ValueError, match="unix_diag"):
        sockdiag.parse_unix(reply)
