"""Pipes and sockets over a link: no byte lost or doubled, and every end seen, by real programs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from godwit.errors import UnsupportedStateError
from godwit.linux.pipe import pipe, unread_bytes
from godwit.types import OwnedFd
from godwit.wire import streamframes
from godwit.wire.streamframes import StreamWord
from tests.kernel.keepers import STREAMS, Keepers, wait_until

MIB = 1 << 20
BREAKS = 300_000  # bytes


@pytest.fixture(params=[0, BREAKS], ids=["steady", "breaking"])
def keepers(request: pytest.FixtureRequest) -> Iterator[Keepers]:
    with Keepers(request.param) as made:
        yield made


def program_writes(keepers: Keepers, stream_id: int = 1) -> tuple[OwnedFd, OwnedFd]:
    """Open a stream from the host; return the program's end, and the read end others have at home."""
    local_read, local_write = pipe()
    home_read, home_write = pipe()
    keepers.host.streams.open(stream_id, local_read, reads=True, writes=False)
    keepers.home.streams.open(stream_id, home_write, reads=False, writes=True)
    return local_write, home_read


def program_reads(keepers: Keepers, stream_id: int = 1) -> tuple[OwnedFd, OwnedFd]:
    """Open a stream to the host; return the program's end, and the write end others have at home."""
    local_read, local_write = pipe()
    home_read, home_write = pipe()
    keepers.host.streams.open(stream_id, local_write, reads=False, writes=True)
    keepers.home.streams.open(stream_id, home_read, reads=True, writes=False)
    return local_read, home_write


def socket_pairs(keepers: Keepers, stream_id: int = 1) -> tuple[socket.socket, socket.socket]:
    """Open a socket; return the program's end, and that of its peer at home."""
    program, local = socket.socketpair()
    kept, peer = socket.socketpair()
    for keeper, end in ((keepers.host, local), (keepers.home, kept)):
        keeper.streams.open(stream_id, OwnedFd(end.detach()), reads=True, writes=True)
    program.settimeout(30)
    peer.settimeout(30)
    return program, peer


@contextlib.contextmanager
def running(argv: list[str], **streams: int | None) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(argv, **streams)  # type: ignore[call-overload]
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_a_program_writes_to_a_pipe_at_home(keepers: Keepers) -> None:
    program_end, home_end = program_writes(keepers)
    keepers.start()
    with (
        running(["seq", "1", "400000"], stdout=program_end.number) as seq,
        running(["sha256sum"], stdin=home_end.number, stdout=subprocess.PIPE) as digest,
    ):
        program_end.close()
        home_end.close()
        out, _ = digest.communicate(timeout=60)
        assert seq.wait(10) == 0
    expected = hashlib.sha256(b"".join(b"%d\n" % number for number in range(1, 400_001)))
    assert out.split()[0].decode() == expected.hexdigest()
    wait_until(lambda: keepers.home.shut == keepers.host.shut == [1])


def test_a_program_reads_from_a_pipe_at_home(keepers: Keepers) -> None:
    program_end, home_end = program_reads(keepers)
    keepers.start()
    data = random.Random(1).randbytes(8 * MIB)
    with running(["sha256sum"], stdin=program_end.number, stdout=subprocess.PIPE) as digest:
        program_end.close()
        with os.fdopen(home_end.detach(), "wb") as file:
            file.write(data)
        out, _ = digest.communicate(timeout=60)
    assert out.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_the_writer_at_home_gets_sigpipe_when_the_program_reads_no_more(keepers: Keepers) -> None:
    program_end, home_end = program_reads(keepers)
    keepers.start()
    with (
        running(["yes"], stdout=home_end.number) as yes,
        running(["head", "-c", "1000"], stdin=program_end.number, stdout=subprocess.PIPE) as head,
    ):
        program_end.close()
        home_end.close()
        out, _ = head.communicate(timeout=30)
        assert len(out) == 1000
        assert yes.wait(30) == -signal.SIGPIPE
    # Both ends have said their last words: a stream that nobody forgets is a leak.
    wait_until(lambda: not keepers.home.streams.stream_ids and not keepers.host.streams.stream_ids)


def test_the_program_gets_sigpipe_when_the_reader_at_home_is_gone(keepers: Keepers) -> None:
    program_end, home_end = program_writes(keepers)
    keepers.start()
    with running(["yes"], stdout=program_end.number) as yes:
        program_end.close()
        assert os.read(home_end.number, 100)
        home_end.close()
        assert yes.wait(30) == -signal.SIGPIPE


def test_a_silent_writer_sees_that_its_reader_is_gone(keepers: Keepers) -> None:
    program_end, home_end = program_writes(keepers)
    keepers.start()
    poll = select.poll()
    poll.register(program_end.number, select.POLLERR)
    home_end.close()
    assert poll.poll(30_000)
    with pytest.raises(BrokenPipeError):
        os.write(program_end.number, b"x")
    program_end.close()


def test_a_reader_that_does_not_read_stops_the_writer_and_holds_up_nobody_else(keepers: Keepers) -> None:
    stuck_end, stuck_home = program_writes(keepers, 1)
    free_end, free_home = program_writes(keepers, 2)
    keepers.start()
    os.set_blocking(stuck_end.number, False)
    written, quiet = 0, 0
    while quiet < 50:
        try:
            written += os.write(stuck_end.number, bytes(65536))
            quiet = 0
        except BlockingIOError:
            quiet += 1
            os.write(free_end.number, b"still")
            assert os.read(free_home.number, 5) == b"still"
    assert written <= 1 * MIB
    assert keepers.host.link.unconfirmed_bytes <= 1 * MIB
    got = 0
    stuck_end.close()
    while chunk := os.read(stuck_home.number, 65536):
        got += len(chunk)
    assert got == written
    for end in (stuck_home, free_end, free_home):
        end.close()


def test_each_direction_of_a_socket_ends_by_itself(keepers: Keepers) -> None:
    program, peer = socket_pairs(keepers)
    keepers.start()
    program.sendall(b"a question")
    program.shutdown(socket.SHUT_WR)
    received = b""
    while chunk := peer.recv(100):
        received += chunk
    assert received == b"a question"
    answer = random.Random(2).randbytes(3 * MIB)

    def reply() -> None:
        peer.sendall(answer)
        peer.close()

    thread = threading.Thread(target=reply)
    thread.start()
    received = b""
    while chunk := program.recv(65536):
        received += chunk
    assert received == answer
    thread.join()
    wait_until(lambda: keepers.home.shut == keepers.host.shut == [1])
    program.close()


def test_a_socket_carries_both_directions_at_once(keepers: Keepers) -> None:
    program, peer = socket_pairs(keepers)
    keepers.start()
    sent = {end: random.Random(seed).randbytes(4 * MIB) for seed, end in enumerate((program, peer))}
    got: dict[socket.socket, bytes] = {}

    def send(end: socket.socket) -> None:
        end.sendall(sent[end])
        end.shutdown(socket.SHUT_WR)

    def take(end: socket.socket) -> None:
        pieces: list[bytes] = []
        while chunk := end.recv(65536):
            pieces.append(chunk)
        got[end] = b"".join(pieces)

    threads = [threading.Thread(target=do, args=(end,)) for do in (send, take) for end in (program, peer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[program] == sent[peer]
    assert got[peer] == sent[program]
    program.close()
    peer.close()


def test_a_closed_socket_breaks_its_peer(keepers: Keepers) -> None:
    program, peer = socket_pairs(keepers)
    keepers.start()
    program.close()
    assert peer.recv(1) == b""

    def breaks() -> bool:
        try:
            peer.send(b"to nobody")
        except BrokenPipeError:
            return True
        return False

    wait_until(breaks)
    peer.close()


def test_streams_go_on_over_twenty_moves_of_the_host(keepers: Keepers) -> None:
    """The local pipes stay, as those of a program that is moved would: they are handed to the next keeper."""
    out_end, home_in = program_writes(keepers, 1)
    in_end, home_out = program_reads(keepers, 2)
    # The keeper's own ends, for the keepers that follow.
    again = {
        1: os.open(f"/proc/self/fd/{out_end.number}", os.O_RDONLY),
        2: os.open(f"/proc/self/fd/{in_end.number}", os.O_WRONLY),
    }
    keepers.start()
    data = random.Random(3).randbytes(16 * MIB)
    got: dict[int, str] = {}

    def write(end: OwnedFd) -> None:
        with os.fdopen(end.detach(), "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view[:50_000]) or 0 :]

    def take(end: OwnedFd, name: int) -> None:
        digest = hashlib.sha256()
        while chunk := os.read(end.number, 65536):
            digest.update(chunk)
        got[name] = digest.hexdigest()
        end.close()

    threads = [
        threading.Thread(target=write, args=(out_end,), daemon=True),
        threading.Thread(target=write, args=(home_out,), daemon=True),
        threading.Thread(target=take, args=(home_in, 1), daemon=True),
        threading.Thread(target=take, args=(in_end, 2), daemon=True),
    ]
    for thread in threads:
        thread.start()
    for _ in range(20):
        keepers.move(lambda stream_id: OwnedFd(os.dup(again[stream_id])))
        wait_until(keepers.connected_again)
    for fd in again.values():
        os.close(fd)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert got == dict.fromkeys((1, 2), hashlib.sha256(data).hexdigest())
    assert keepers.home.link.epoch == 20


def test_a_named_pipe_works_like_any_other(keepers: Keepers, tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "fifo")
    os.mkfifo(path)
    home_read = OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    os.set_blocking(home_read.number, True)
    home_write = OwnedFd(os.open(path, os.O_WRONLY))
    local_read, local_write = pipe()
    keepers.host.streams.open(1, local_read, reads=True, writes=False)
    keepers.home.streams.open(1, home_write.release(), reads=False, writes=True)
    keepers.start()
    os.write(local_write.number, b"hello")
    assert os.read(home_read.number, 100) == b"hello"
    local_write.close()
    assert os.read(home_read.number, 100) == b""
    home_read.close()


def test_the_flags_of_a_shared_description_are_left_alone(keepers: Keepers) -> None:
    program_end, home_end = program_reads(keepers)
    shared_read, shared_write = pipe()
    keepers.home.streams.open(7, OwnedFd(os.dup(shared_read.number)), reads=True, writes=False)
    local_read, local_write = pipe()
    keepers.host.streams.open(7, local_write, reads=False, writes=True)
    keepers.start()
    os.write(shared_write.number, b"x")
    assert os.read(local_read.number, 1) == b"x"
    assert os.get_blocking(shared_read.number)
    assert unread_bytes(shared_read.number) == 0
    for end in (program_end, home_end, shared_read, shared_write, local_read):
        end.close()


def test_what_is_no_stream_is_refused(keepers: Keepers) -> None:
    datagrams, other = socket.socketpair(type=socket.SOCK_DGRAM)
    for fd in (OwnedFd(datagrams.detach()), OwnedFd(os.open("/dev/null", os.O_RDONLY))):
        with pytest.raises(UnsupportedStateError):
            keepers.home.streams.open(1, fd, reads=True, writes=False)
        fd.close()
    other.close()


@pytest.mark.parametrize(
    "said",
    [
        b"short",
        streamframes.pack(StreamWord.DATA, 99),
        streamframes.pack(StreamWord.DATA, 1) + bytes(257 << 10),
        streamframes.pack_credit(1, 1),
        streamframes.pack(StreamWord.EOF, 1) + b"?",
        bytes([77]) + streamframes.pack(StreamWord.EOF, 1)[1:],
        streamframes.pack(StreamWord.CLOSED, 1),
    ],
    ids=[
        "short",
        "no such stream",
        "beyond the window",
        "credit",
        "surplus",
        "unknown word",
        "not its to close",
    ],
)
def test_a_dishonest_peer_ends_the_link(said: bytes) -> None:
    keepers = Keepers()
    program_end, home_end = program_writes(keepers)
    keepers.home.start({})
    keepers.host.link.start({STREAMS: lambda _: None})
    keepers.host.link.send(STREAMS, said)
    keepers._connect()
    wait_until(lambda: bool(keepers.home.ended))
    assert type(keepers.home.ended[0]).__name__ == "ProtocolError"
    keepers.home.close()
    keepers.host.close()
    program_end.close()
    home_end.close()
