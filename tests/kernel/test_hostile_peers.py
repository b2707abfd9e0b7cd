"""A peer that lies, stammers or falls silent: the source's program runs on, the destination keeps nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from godwit import api
from godwit.errors import GodwitError, ImageError, MigrationError, Refusal, RefusedError, Survivor
from godwit.images import codec
from godwit.migrate import entries, transport
from godwit.migrate.channel import Channel, Closed
from godwit.migrate.store import STREAM_NAME
from godwit.wire import frames
from godwit.wire.frames import FrameKind
from tests.conftest import requires
from tests.kernel import counting as tools
from tests.kernel import images
from tests.kernel.counting import Counting, Machine, Pair, Server

pytestmark = [requires("root", "command:cc")]

GARBAGE = b"\xc1garbage"
HELLO = codec.encode(entries.HelloEntry(version="1", architecture="x", hostname=b"fake"))
TAKEN = codec.encode(entries.VerdictEntry(refusals=()))
READY = codec.encode(entries.ReadyEntry(pid=1, steps=()))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.compiled(tmp_path_factory.mktemp("counter"))


@pytest.fixture
def counter(program: Path, tmp_path: Path) -> Iterator[Counting]:
    with tools.counting(program, tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.make(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def as_source(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GODWIT_CERTS", "GODWIT_STATE_DIR"):
        monkeypatch.setenv(name, pair.source.environment()[name])


# --- a destination that is none ----------------------------------------------------------------

Script = Callable[[Channel], None]


@contextlib.contextmanager
def false_destination(machine: Machine, *scripts: Script) -> Iterator[str]:
    """Answer one connection after the other by scripts; then refuse. Yields the HOST."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for script in scripts:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with contextlib.suppress(OSError, GodwitError):
                channel = Channel(transport.server_tls(connection, machine.directory / "certs"))
                with contextlib.closing(channel), contextlib.suppress(OSError, GodwitError):
                    script(channel)
        server.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"tls://127.0.0.1:{server.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(timeout=tools.DEADLINE_S)
        assert not thread.is_alive()


def saying(*answers: tuple[FrameKind, bytes], first: bytes = b"") -> Script:
    """Send a preamble (or `first`), then each answer when the source has said its part."""

    def script(channel: Channel) -> None:
        if first:
            channel._pipe.write(first)
        else:
            channel.open_stream()
        channel.accept_stream()
        channel.expect(FrameKind.HEADER)
        for kind, payload in answers:
            channel.send(kind, payload)
            if kind is FrameKind.HELLO:
                channel.expect(FrameKind.OUTLINE)
            elif kind is FrameKind.VERDICT:
                swallow(channel, FrameKind.END)
            elif kind is FrameKind.READY:
                channel.expect(FrameKind.GO)

    return script


def swallow(channel: Channel, last: FrameKind) -> None:
    while channel.receive()[0] is not last:
        pass


def told(message: str, **values: str) -> bytes:
    return codec.encode({"kind": "DestinationError", "message": message, **values})


BEFORE_GO: dict[str, Script] = {
    "closes_at_once": Channel.touch_buffer,
    "garbage_for_a_preamble": saying(first=b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "verdict_for_hello": saying((FrameKind.VERDICT, TAKEN)),
    "malformed_hello": saying((FrameKind.HELLO, GARBAGE)),
    "malformed_verdict": saying((FrameKind.HELLO, HELLO), (FrameKind.VERDICT, GARBAGE)),
    "malformed_abort": saying((FrameKind.ABORT, GARBAGE)),
    "abort_that_names_itself": saying(
        (FrameKind.HELLO, HELLO), (FrameKind.ABORT, told("ha", kind="MigrationError", survivor="destination"))
    ),
    "abort_of_nonsense": saying((FrameKind.ABORT, told("ha", kind="SystemExit"))),
    "abort_without_survivor": saying((FrameKind.ABORT, told("ha", kind="MigrationError"))),
    "running_for_ready": saying(
        (FrameKind.HELLO, HELLO), (FrameKind.VERDICT, TAKEN), (FrameKind.RUNNING, READY)
    ),
    "malformed_ready": saying(
        (FrameKind.HELLO, HELLO), (FrameKind.VERDICT, TAKEN), (FrameKind.READY, GARBAGE)
    ),
    "full_disk_at_the_end": saying(
        (FrameKind.HELLO, HELLO), (FrameKind.VERDICT, TAKEN), (FrameKind.ABORT, told("no room"))
    ),
    "gone_when_all_was_sent": saying((FrameKind.HELLO, HELLO), (FrameKind.VERDICT, TAKEN)),
}


def runs_at_home(counter: Counting, pair: Pair) -> None:
    assert counter.only_copy() == counter.pid
    assert "TracerPid:\t0\n" in Path(f"/proc/{counter.pid}/status").read_text()
    assert pair.source.records() == []


@pytest.mark.parametrize("name", BEFORE_GO)
def test_whatever_a_destination_says_before_go_the_program_runs_on(
    name: str, counter: Counting, pair: Pair
) -> None:
    with (
        false_destination(pair.destination, BEFORE_GO[name]) as host,
        pytest.raises(GodwitError) as caught,
    ):
        api.migrate(counter.pid, host)
    error = caught.value
    assert error.exit_status != 70, error.message
    assert "\n" not in error.line()
    if isinstance(error, MigrationError):
        assert error.survivor is Survivor.SOURCE
    runs_at_home(counter, pair)


def test_refusals_of_a_destination_are_passed_on(counter: Counting, pair: Pair) -> None:
    refusal = Refusal(what="everything", where="destination", why="it is a test", remedy="none")
    verdict = codec.encode(entries.VerdictEntry(refusals=(refusal,)))
    script = saying((FrameKind.HELLO, HELLO), (FrameKind.VERDICT, verdict))
    with false_destination(pair.destination, script) as host, pytest.raises(RefusedError) as caught:
        api.migrate(counter.pid, host)
    assert caught.value.refusals == (refusal,)
    runs_at_home(counter, pair)


def silent_after(*answers: tuple[FrameKind, bytes]) -> Script:
    """Say so much, and then nothing until the source goes away."""

    def script(channel: Channel) -> None:
        saying(*answers)(channel)
        with contextlib.suppress(Closed, ImageError):
            swallow(channel, FrameKind.QUERY)

    return script


@pytest.mark.parametrize(
    "answers",
    [[], [(FrameKind.HELLO, HELLO)], [(FrameKind.HELLO, HELLO), (FrameKind.VERDICT, TAKEN)]],
    ids=["nothing", "hello", "verdict"],
)
def test_a_destination_that_falls_silent_is_left_when_the_time_is_over(
    answers: list[tuple[FrameKind, bytes]], counter: Counting, pair: Pair
) -> None:
    with false_destination(pair.destination, silent_after(*answers)) as host:
        with pytest.raises(MigrationError) as caught:
            api.migrate(counter.pid, host, timeout_s=1)
        assert caught.value.survivor is Survivor.SOURCE
        runs_at_home(counter, pair)


def answering(state: str) -> Script:
    def script(channel: Channel) -> None:
        channel.open_stream()
        channel.accept_stream()
        channel.expect(FrameKind.QUERY)
        channel.send(FrameKind.ANSWER, codec.encode({"state": state}))

    return script


def to_go(*answers: tuple[FrameKind, bytes]) -> Script:
    return saying((FrameKind.HELLO, HELLO), (FrameKind.VERDICT, TAKEN), (FrameKind.READY, READY), *answers)


def test_a_destination_that_turns_the_commit_down_gives_the_program_back(
    counter: Counting, pair: Pair
) -> None:
    with (
        false_destination(pair.destination, to_go((FrameKind.ABORT, told("the lock is taken")))) as host,
        pytest.raises(GodwitError, match="the lock is taken"),
    ):
        api.migrate(counter.pid, host)
    runs_at_home(counter, pair)


def test_a_line_that_ends_after_go_is_settled_by_asking(counter: Counting, pair: Pair) -> None:
    with (
        false_destination(pair.destination, to_go(), answering("aborted")) as host,
        pytest.raises(MigrationError) as caught,
    ):
        api.migrate(counter.pid, host)
    assert caught.value.survivor is Survivor.SOURCE
    runs_at_home(counter, pair)


@pytest.mark.parametrize(
    "first",
    [to_go(), to_go((FrameKind.RUNNING, GARBAGE)), to_go((FrameKind.ANSWER, GARBAGE))],
    ids=["nothing", "garbled", "another"],
)
def test_after_go_the_word_of_a_destination_that_owns_the_program_counts(
    first: Script, counter: Counting, pair: Pair
) -> None:
    """However garbled its report: it says that it runs there, so it may not run here."""
    with (
        false_destination(pair.destination, first, answering("running")) as host,
        pytest.raises(MigrationError) as caught,
    ):
        api.migrate(counter.pid, host)
    assert caught.value.survivor is Survivor.DESTINATION
    tools.until(lambda: counter.copies() == [], "the copy here is gone")
    assert pair.source.records() == []


@pytest.mark.parametrize("state", ["nonsense", "committed", ""])
def test_an_answer_that_means_nothing_leaves_it_undecided(
    state: str, counter: Counting, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy here stays stopped, since the other may run; `recover` settles it later."""
    monkeypatch.setattr("godwit.migrate.commit._ASK_AGAIN_S", 0.5)
    with false_destination(pair.destination, to_go(), *[answering(state)] * 20) as host:
        with pytest.raises(MigrationError) as caught:
            api.migrate(counter.pid, host)
        assert caught.value.survivor is Survivor.UNDECIDED
        assert "godwit recover" in caught.value.remedy
        tools.until(lambda: tools.state_of(counter.pid) == "T", "the copy here stays stopped")
    forget(pair.source)


def forget(machine: Machine) -> None:
    for record in machine.journal.glob("*"):
        record.unlink()


# --- a source that is none ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[Server]:
    """One server for all of them: what one did must not spoil it for the next."""
    with tools.serving(pair.destination) as found:
        yield found


@pytest.fixture(scope="module")
def stream(program: Path, tmp_path_factory: pytest.TempPathFactory) -> list[images.Frame]:
    """A program's frames, as a checkpoint has them."""
    directory = tmp_path_factory.mktemp("image")
    with tools.counting(program, directory) as counter:
        api.checkpoint(counter.pid, directory / "image")
        tools.until(lambda: not counter.copies(), "the program ends")
    return images.split((directory / "image" / STREAM_NAME).read_bytes())


def new_move(stream: list[images.Frame]) -> list[images.Frame]:
    """The same frames under another name."""
    header = codec.decode(stream[0].payload, entries.HeaderEntry)
    renamed = codec.encode(replace(header, migration=secrets.token_hex(16)))
    return [replace(stream[0], payload=renamed), *stream[1:]]


def converse(host: str, parts: list[images.Frame]) -> None:
    """Be a source: send frames, wait for each answer that is due, and go away at the end or at any error."""
    with contextlib.closing(transport.connect(host, None)) as channel, lost_lines():
        channel.open_stream()
        channel.accept_stream()
        for part in parts:
            channel.send(part.kind, part.payload)
            if part.kind in ANSWERS:
                channel.expect(ANSWERS[part.kind])


ANSWERS = {
    FrameKind.HEADER: FrameKind.HELLO,
    FrameKind.OUTLINE: FrameKind.VERDICT,
    FrameKind.END: FrameKind.READY,
    FrameKind.QUERY: FrameKind.ANSWER,
}


def lost_lines() -> contextlib.AbstractContextManager[None]:
    """Take the end of a line, and words other than those waited for, as what they are here: expected."""
    return contextlib.suppress(ImageError, Closed, OSError)


def nothing_is_left(server: Server, pods: set[int]) -> None:
    server.wait_until_idle()
    tools.until(lambda: set(tools.pods()) <= pods, "no pod is left")
    tools.until(lambda: not strays(server), f"no process is left: {strays(server)}", 5)


def strays(server: Server) -> dict[int, str]:
    return tools.session_strays({server.process.pid})


def raw_bytes(server: Server, data: bytes) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.0\r\n\r\n", frames.preamble(), os.urandom(2000)])
def test_who_does_not_speak_tls_gets_nothing(data: bytes, server: Server) -> None:
    before = set(tools.pods())
    raw_bytes(server, data)
    nothing_is_left(server, before)


def first_words(stream: list[images.Frame]) -> dict[str, list[images.Frame]]:
    whole = new_move(stream)
    garbled = [replace(part, payload=GARBAGE) for part in whole]
    return {
        "only_header": whole[:1],
        "header_of_garbage": garbled[:1],
        "outline_of_garbage": [whole[0], garbled[1]],
        "tree_of_garbage": [*whole[:2], garbled[2]],
        "files_of_garbage": [*whole[:3], garbled[3]],
        "pages_of_garbage": [*whole[:4], garbled[4]],
        "outline_first": whole[1:],
        "header_twice": [whole[0], whole[0]],
        "pages_before_the_tree": [*whole[:2], whole[4]],
        "no_pages": [*whole[:4], whole[-1]],
        "go_before_the_tree": [*whole[:2], images.Frame(FrameKind.GO, b"", 0)],
        "all_and_no_go": whole,
        "all_and_abort": [*whole, images.Frame(FrameKind.ABORT, b"", 0)],
        "all_and_nonsense_for_go": [*whole, whole[0]],
        "query_of_a_path": [
            images.Frame(FrameKind.QUERY, codec.encode(entries.QueryEntry(migration="../../../tmp/x")), 0)
        ],
        "query_of_garbage": [images.Frame(FrameKind.QUERY, GARBAGE, 0)],
    }


NAMES = [
    "only_header",
    "header_of_garbage",
    "outline_of_garbage",
    "tree_of_garbage",
    "files_of_garbage",
    "pages_of_garbage",
    "outline_first",
    "header_twice",
    "pages_before_the_tree",
    "no_pages",
    "go_before_the_tree",
    "all_and_no_go",
    "all_and_abort",
    "all_and_nonsense_for_go",
    "query_of_a_path",
    "query_of_garbage",
]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_source_sends_without_go_nothing_runs_and_nothing_is_left(
    name: str, server: Server, stream: list[images.Frame]
) -> None:
    before = set(tools.pods())
    converse(server.host, first_words(stream)[name])
    nothing_is_left(server, before)


def test_after_all_that_the_server_still_serves(server: Server, counter: Counting, pair: Pair) -> None:
    outcome = tools.move(counter.pid, server.host, pair.source)
    assert outcome.survivor == "destination"
    assert counter.only_copy() != counter.pid
