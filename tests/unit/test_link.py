"""Links: every message once and in order, whatever becomes of connections; and who may speak."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from godwit.linux.pause import pause
from godwit.migrate import certs
from godwit.migrate.channel import SocketPipe
from godwit.migrate.tlspipe import TlsPipe
from godwit.residual.line import Pipe, Silence, greet
from godwit.residual.link import FencedError, Link, LinkClosedError
from godwit.wire import linkframes
from godwit.wire.linkframes import Greeting, ProtocolError, Side

JOB = bytes(range(16))
DEADLINE_S = 60.0
MESSAGES = 10_000
CUTS = 200
MOVES = 20

Pair = Callable[[], tuple[Pipe, Pipe]]


def wait_until(true: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    end_s = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end_s, "it never came to be"
        pause(0.001)


def plain_pair() -> tuple[SocketPipe, SocketPipe]:
    ours, theirs = socket.socketpair()
    return SocketPipe(ours), SocketPipe(theirs)


class Fragile(SocketPipe):
    """A connection that breaks after so many bytes written, in the middle of a message if so it falls."""

    def __init__(self, connection: socket.socket, bytes_left: int) -> None:
        super().__init__(connection)
        self._bytes_left = bytes_left

    def writev(self, parts: Sequence[bytes]) -> None:
        """Write what may still be written."""
        data = b"".join(parts)
        allowed, self._bytes_left = data[: self._bytes_left], self._bytes_left - len(data)
        self.write(allowed)
        if self._bytes_left < 0:
            self.cut()
            raise ConnectionResetError("broken on purpose")


class End:
    """One end with what came out of it."""

    def __init__(self, side: Side, **options: object) -> None:
        self.side = side
        self.got: list[bytes] = []
        self.downs: list[BaseException] = []
        self.reasons: list[BaseException | None] = []
        self.link = Link(
            JOB,
            0,
            side,
            on_down=self.downs.append,
            on_end=self.reasons.append,
            **options,  # type: ignore[arg-type]
        )

    def has_something(self) -> bool:
        return bool(self.got)

    def start(self) -> None:
        self.link.start({1: lambda payload: self.got.append(bytes(payload))})


@pytest.fixture
def ends() -> Iterator[Callable[..., End]]:
    """Make ends that are closed afterwards."""
    made: list[End] = []

    def make(side: Side, **options: object) -> End:
        made.append(End(side, **options))
        return made[-1]

    yield make
    for end in made:
        end.link.close()


def join(one: End, other: End, pipes: tuple[Pipe, Pipe]) -> list[BaseException]:
    """Attach both; return what went wrong."""
    wrong: list[BaseException] = []

    def attach(end: End, pipe: Pipe) -> None:
        try:
            end.link.attach(pipe)
        except (OSError, ProtocolError, FencedError, LinkClosedError) as error:
            wrong.append(error)

    thread = threading.Thread(target=attach, args=(other, pipes[1]))
    thread.start()
    attach(one, pipes[0])
    thread.join()
    return wrong


def numbered(number: int, length: int = 8) -> bytes:
    return number.to_bytes(8, "little").ljust(length, b".")


def send_all(end: End, count: int, seed: int, longest: int = 3000) -> threading.Thread:
    lengths = random.Random(seed)

    def send() -> None:
        with contextlib.suppress(LinkClosedError):
            for number in range(count):
                payload = numbered(number, lengths.randrange(8, longest))
                end.link.send(1, payload[:5], payload[5:])

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_messages_arrive_in_order_both_ways(ends: Callable[..., End]) -> None:
    home, host = ends(Side.HOME), ends(Side.HOST)
    home.start()
    host.start()
    assert join(home, host, plain_pair()) == []
    senders = [send_all(home, 1000, 1), send_all(host, 1000, 2)]
    wait_until(lambda: len(home.got) == len(host.got) == 1000)
    assert [int.from_bytes(each[:8], "little") for each in host.got] == list(range(1000))
    for sender in senders:
        sender.join()
    wait_until(lambda: home.link.unconfirmed_bytes <= 512 << 10)


def test_everything_arrives_once_and_in_order_over_connections_that_break(ends: Callable[..., End]) -> None:
    home, host = ends(Side.HOME), ends(Side.HOST)
    home.start()
    host.start()
    senders = [send_all(home, MESSAGES, 1), send_all(host, MESSAGES, 2)]
    dice = random.Random(3)
    broken = 0
    end_s = time.monotonic() + DEADLINE_S
    while len(home.got) < MESSAGES or len(host.got) < MESSAGES:
        assert time.monotonic() < end_s
        if not (home.link.up and host.link.up):
            pair = socket.socketpair()
            pipes = tuple(
                Fragile(each, dice.randrange(140_000) if broken < CUTS else 1 << 62) for each in pair
            )
            join(home, host, (pipes[0], pipes[1]))
            broken += 1
        pause(0.0005)
    assert broken > CUTS
    expected = list(range(MESSAGES))
    for end in (home, host):
        assert [int.from_bytes(each[:8], "little") for each in end.got] == expected
    lengths = random.Random(1)
    assert all(len(each) == lengths.randrange(8, 3000) for each in host.got)
    for sender in senders:
        sender.join()


def test_the_host_moves_under_load_and_nothing_is_lost_or_doubled(ends: Callable[..., End]) -> None:
    home, host = ends(Side.HOME), ends(Side.HOST)
    home.start()
    host.start()
    assert join(home, host, plain_pair()) == []
    sent_by_host, sent_by_home, enough = 0, 0, threading.Event()

    def load() -> None:
        nonlocal sent_by_home
        while not enough.is_set():
            home.link.send(1, numbered(sent_by_home, 1000))
            sent_by_home += 1

    sender = threading.Thread(target=load, daemon=True)
    sender.start()
    got: list[bytes] = []
    for move in range(1, MOVES + 1):
        for _ in range(200):
            host.link.send(1, numbered(sent_by_host, 700))
            sent_by_host += 1
        wait_until(host.has_something)
        state = host.link.quiesce()
        got += host.got
        host.link.close()
        host = ends(Side.HOST)
        host.link.restore(state)
        host.start()
        assert join(home, host, plain_pair()) == []
        assert home.link.epoch == host.link.epoch == move
    enough.set()
    sender.join(DEADLINE_S)
    wait_until(lambda: len(got) + len(host.got) == sent_by_home and len(home.got) == sent_by_host)
    got += host.got
    assert [int.from_bytes(each[:8], "little") for each in got] == list(range(sent_by_home))
    assert [int.from_bytes(each[:8], "little") for each in home.got] == list(range(sent_by_host))


def test_a_quiesced_end_goes_on_when_the_move_fails(ends: Callable[..., End]) -> None:
    home, host = ends(Side.HOME), ends(Side.HOST)
    home.start()
    host.start()
    assert join(home, host, plain_pair()) == []
    home.link.send(1, b"before")
    wait_until(lambda: host.got == [b"before"])
    state = host.link.quiesce()
    assert (state.sent, state.received) == (0, 1)
    home.link.send(1, b"meanwhile")
    late = threading.Thread(target=host.link.send, args=(1, b"late"), daemon=True)
    late.start()
    pause(0.05)
    assert host.got == [b"before"]
    assert late.is_alive()
    assert home.got == []
    host.link.go_on()
    wait_until(lambda: host.got == [b"before", b"meanwhile"] and home.got == [b"late"])
    assert host.downs == []


def test_who_speaks_for_an_older_epoch_is_not_heard(ends: Callable[..., End]) -> None:
    home, old = ends(Side.HOME), ends(Side.HOST)
    home.start()
    old.start()
    assert join(home, old, plain_pair()) == []
    new = ends(Side.HOST)
    new.link.restore(old.link.quiesce())
    new.start()
    old.link.go_on()  # As a host does that believes the move failed.
    assert join(home, new, plain_pair()) == []
    wait_until(lambda: not old.link.up)
    old.link.send(1, b"from the past")
    wrong = join(home, old, plain_pair())
    assert any(isinstance(error, FencedError) for error in wrong), wrong
    wait_until(lambda: bool(old.reasons))
    assert isinstance(old.reasons[0], FencedError)
    with pytest.raises(LinkClosedError):
        old.link.send(1, b"more")
    assert home.got == []
    assert not home.link.ended
    assert join(home, new, plain_pair()) == []
    new.link.send(1, b"from the present")
    wait_until(lambda: home.got == [b"from the present"])


def test_home_can_fence_before_the_new_host_has_spoken(ends: Callable[..., End]) -> None:
    home, host = ends(Side.HOME), ends(Side.HOST)
    home.start()
    host.start()
    home.link.fence(1)
    assert any(isinstance(error, FencedError) for error in join(home, host, plain_pair()))


def test_a_host_that_does_not_notice_that_it_was_left_is_refused(ends: Callable[..., End]) -> None:
    home = ends(Side.HOME)
    home.start()
    home.link.fence(1)
    ours, theirs = socket.socketpair()
    theirs.sendall(linkframes.pack_greeting(Greeting(side=Side.HOST, job=JOB, epoch=0, received=0)))
    with pytest.raises(FencedError):
        home.link.attach(SocketPipe(ours))
    assert not home.link.ended
    theirs.close()


def test_quiesce_waits_for_the_handler_that_runs(ends: Callable[..., End]) -> None:
    home, host = ends(Side.HOME), ends(Side.HOST)
    entered, leave, quiesced = threading.Event(), threading.Event(), threading.Event()

    def slow(_: memoryview) -> None:
        entered.set()
        assert leave.wait(DEADLINE_S)

    def quiesce() -> None:
        host.link.quiesce()
        quiesced.set()

    home.start()
    host.link.start({1: slow})
    assert join(home, host, plain_pair()) == []
    home.link.send(1, b"slow")
    assert entered.wait(DEADLINE_S)
    thread = threading.Thread(target=quiesce)
    thread.start()
    assert not quiesced.wait(0.1)
    leave.set()
    assert quiesced.wait(DEADLINE_S)
    thread.join()


def test_send_waits_for_the_window_and_close_ends_the_wait(ends: Callable[..., End]) -> None:
    home = ends(Side.HOME, window_bytes=10_000)
    home.start()
    home.link.send(1, bytes(9000))  # No connection, and room: it returns.
    raised: list[BaseException] = []

    def send() -> None:
        try:
            home.link.send(1, bytes(9000))
        except LinkClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    pause(0.05)
    assert thread.is_alive()
    assert home.link.unconfirmed_bytes < 10_000
    home.link.close()
    thread.join(DEADLINE_S)
    assert len(raised) == 1


def test_memory_stays_bounded_when_one_side_only_talks(ends: Callable[..., End]) -> None:
    home, host = ends(Side.HOME, window_bytes=1 << 20), ends(Side.HOST)
    home.start()
    host.start()
    assert join(home, host, plain_pair()) == []
    most = 0
    for number in range(20_000):
        home.link.send(1, numbered(number, 1000))
        most = max(most, home.link.unconfirmed_bytes)
    wait_until(lambda: len(host.got) == 20_000)
    assert most <= 1 << 20
    wait_until(lambda: home.link.unconfirmed_bytes <= 320 << 10)


@pytest.mark.slow
def test_two_ends_that_answer_each_other_in_handlers_do_not_lock_up() -> None:
    """Both answer each message with a larger one, on a connection whose buffers hold few of them."""
    counts = {Side.HOME: 0, Side.HOST: 0}
    rounds = 200

    def answering(side: Side) -> Link:
        link = Link(JOB, 0, side)

        def answer(payload: memoryview) -> None:
            counts[side] += 1
            left = int.from_bytes(payload[:8], "little")
            if left:
                link.send(1, numbered(left - 1, 400_000))

        link.start({1: answer})
        return link

    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    home, host = answering(Side.HOME), answering(Side.HOST)
    other = threading.Thread(target=host.attach, args=(SocketPipe(theirs),))
    other.start()
    home.attach(SocketPipe(ours))
    other.join()
    try:
        home.send(1, numbered(rounds - 1))
        host.send(1, numbered(rounds - 1))
        wait_until(lambda: sum(counts.values()) == 2 * rounds)
    finally:
        home.close()
        host.close()


def test_a_silent_peer_is_noticed_and_one_that_pings_is_not(ends: Callable[..., End]) -> None:
    quick = Silence(ping_s=0.1, give_up_s=0.4)
    home, host = ends(Side.HOME, silence=quick), ends(Side.HOST, silence=quick)
    home.start()
    host.start()
    assert join(home, host, plain_pair()) == []
    pause(1.0)
    assert home.downs == host.downs == []

    ours, theirs = socket.socketpair()
    theirs.sendall(linkframes.pack_greeting(Greeting(side=Side.HOST, job=JOB, epoch=0, received=0)))
    home.link.attach(SocketPipe(ours))
    wait_until(lambda: any(isinstance(error, TimeoutError) for error in home.downs))
    assert not home.link.ended
    theirs.close()


def test_a_peer_that_never_greets_is_given_up() -> None:
    ours, theirs = plain_pair()
    with pytest.raises(ConnectionError):
        greet(ours, patience_s=0.1)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "said",
    [
        linkframes.pack_header(2 << 20, 1, 0),
        linkframes.pack_header(0, 9, 0),
        linkframes.pack_header(0, 1, 5),
        linkframes.pack_header(4, 0, 0),
    ],
    ids=[
        "a length beyond the limit",
        "a channel nobody serves",
        "a count beyond what was sent",
        "own channel",
    ],
)
def test_a_dishonest_peer_ends_the_link(ends: Callable[..., End], said: bytes) -> None:
    home = ends(Side.HOME)
    home.start()
    ours, theirs = socket.socketpair()
    theirs.sendall(linkframes.pack_greeting(Greeting(side=Side.HOST, job=JOB, epoch=0, received=0)) + said)
    home.link.attach(SocketPipe(ours))
    wait_until(lambda: bool(home.reasons))
    assert isinstance(home.reasons[0], ProtocolError)
    assert home.got == []
    theirs.close()


@pytest.mark.parametrize(
    "greeting",
    [
        Greeting(side=Side.HOST, job=bytes(16), epoch=0, received=0),
        Greeting(side=Side.HOME, job=JOB, epoch=0, received=0),
        Greeting(side=Side.HOST, job=JOB, epoch=0, received=1),
    ],
    ids=["another job", "the same side", "messages that were not sent"],
)
def test_a_wrong_greeting_is_refused_and_the_link_lives(ends: Callable[..., End], greeting: Greeting) -> None:
    home, host = ends(Side.HOME), ends(Side.HOST)
    home.start()
    host.start()
    ours, theirs = socket.socketpair()
    theirs.sendall(linkframes.pack_greeting(greeting))
    with pytest.raises(ProtocolError):
        home.link.attach(SocketPipe(ours))
    theirs.close()
    assert join(home, host, plain_pair()) == []
    home.link.send(1, b"still here")
    wait_until(lambda: host.got == [b"still here"])


def test_a_fresh_connection_takes_the_place_of_one_that_hangs(ends: Callable[..., End]) -> None:
    home, host = ends(Side.HOME), ends(Side.HOST)
    home.start()
    host.start()
    hanging = plain_pair()
    assert join(home, host, hanging) == []
    home.link.send(1, b"one")
    assert join(home, host, plain_pair()) == []
    home.link.send(1, b"two")
    wait_until(lambda: host.got == [b"one", b"two"])


def tls_pair(directory: Path) -> tuple[TlsPipe, TlsPipe]:
    """Return both ends of an encrypted connection."""
    ours, theirs = socket.socketpair()
    made: list[TlsPipe] = []

    def serve() -> None:
        made.append(TlsPipe(theirs, context(directory, server=True), server=True))

    thread = threading.Thread(target=serve)
    thread.start()
    client = TlsPipe(ours, context(directory, server=False), server=False)
    thread.join()
    return client, made[0]


def context(directory: Path, *, server: bool) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(directory / certs.CERT_FILE, directory / certs.KEY_FILE)
    made.load_verify_locations(directory / certs.CA_FILE)
    return made


def test_a_link_over_tls_reads_and_writes_at_once(ends: Callable[..., End], tmp_path: Path) -> None:
    certs.make_authority().issue("node", []).write(tmp_path)
    home, host = ends(Side.HOME), ends(Side.HOST)
    home.start()
    host.start()
    assert join(home, host, tls_pair(tmp_path)) == []
    senders = [send_all(end, 2000, 4, longest=40_000) for end in (home, host)]
    wait_until(lambda: len(home.got) == len(host.got) == 2000)
    for end in (home, host):
        assert [int.from_bytes(each[:8], "little") for each in end.got] == list(range(2000))
        assert end.downs == []
    for sender in senders:
        sender.join()
