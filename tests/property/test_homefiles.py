"""Whatever a host sends, home answers, or gives the link up; it never falls over."""

from __future__ import annotations

import errno
import os
import resource
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from godwit.linux import abi, fuse
from godwit.linux.peercred import PR_SET_DUMPABLE
from godwit.residual.homefiles.credentials import Credentials
from godwit.residual.homefiles.messages import ProtocolError, parse
from godwit.residual.homefiles.pump import messages_in
from godwit.residual.homefiles.server import HomeFiles

OPCODES = [value for name, value in vars(fuse).items() if name.startswith("FUSE_") and 0 < value < 52]
SILENT = {fuse.FUSE_FORGET, fuse.FUSE_BATCH_FORGET, fuse.FUSE_INTERRUPT, fuse.FUSE_NOTIFY_REPLY}
# A large number of any of these would be done, and take long, or take the disk.
small = st.integers(0, 3)
numbers = st.one_of(small, st.integers(0, 2**64 - 1), st.sampled_from([2**63, 2**63 - 1, 2**32, 2**64 - 1]))
words = st.lists(numbers, max_size=9).map(lambda them: struct.pack(f"={len(them)}Q", *them))
names = st.lists(st.sampled_from([b"a", b"d", b"..", b"", b"d/a", b"x" * 300, b"user.x"]), max_size=2)
bodies = st.one_of(
    st.binary(max_size=80),
    st.builds(lambda head, tail: head + b"".join(name + b"\0" for name in tail), words, names),
    st.builds(lambda n, tail: n + b"".join(name + b"\0" for name in tail), st.binary(max_size=16), names),
)
uids = st.sampled_from([os.geteuid(), 1, 2**32 - 1])
requests = st.tuples(st.one_of(st.sampled_from(OPCODES), st.integers(0, 2**32 - 1)), numbers, uids, bodies)


def message(opcode: int, nodeid: int, uid: int, body: bytes, unique: int = 7) -> bytes:
    length = fuse.fuse_in_header.size + len(body)
    return fuse.fuse_in_header.pack(length, opcode, unique, nodeid, uid, uid, 1, 0, 0) + body


def in_a_thread(call: Callable[[], None]) -> None:
    """Whoever serves goes on to act as its last caller: not the thread of the tests."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  # raised again
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.fixture(autouse=True, scope="module")
def dumpable() -> Iterator[None]:
    """A thread that acts as somebody else marks the whole process, for whoever is tested after us."""
    yield
    abi.syscall("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


@pytest.fixture
def small_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(requests, max_size=12))
def test_any_request_has_one_well_formed_answer(
    sent: list[tuple[int, int, int, bytes]], tmp_path: Path, small_files: None
) -> None:
    (tmp_path / "home/d").mkdir(parents=True, exist_ok=True)
    (tmp_path / "home/d/a").write_bytes(b"content")
    (tmp_path / "outside").write_bytes(b"untouched")
    answers: list[bytes] = []

    def reply(parts: Sequence[bytes]) -> None:
        answers.append(b"".join(parts))

    def serve() -> None:
        allowed = Credentials(frozenset({os.geteuid()}), frozenset({os.getegid()}))
        with HomeFiles(tmp_path / "home", reply, allowed=allowed) as home:
            home.handle(message(fuse.FUSE_LOOKUP, 1, os.geteuid(), b"d\0", 1))
            home.handle(message(fuse.FUSE_OPENDIR, 1, os.geteuid(), bytes(8), 2))
            home.handle(
                message(fuse.FUSE_CREATE, 1, os.geteuid(), struct.pack("=4I", 2, 0o644, 0, 0) + b"a\0", 3)
            )
            for unique, (opcode, nodeid, uid, body) in enumerate(sent, 4):
                try:
                    home.handle(message(opcode, nodeid, uid, body, unique))
                except ProtocolError:
                    assert opcode in SILENT
                    silent.add(unique)
                if opcode in SILENT:
                    silent.add(unique)

    silent: set[int] = set()
    in_a_thread(serve)
    uniques = []
    for answer in answers:
        for one in messages_in(answer):
            length, error, unique = fuse.fuse_out_header.unpack_from(one)
            assert length == len(one)
            if unique:
                assert -512 < error <= 0
                assert error == 0 or length == fuse.fuse_out_header.size
                uniques.append(unique)
    assert sorted(uniques) == sorted(set(range(1, len(sent) + 4)) - silent)
    assert (tmp_path / "outside").read_bytes() == b"untouched"


@given(st.binary(max_size=200))
def test_a_message_is_parsed_or_refused(raw: bytes) -> None:
    try:
        request = parse(raw)
    except ProtocolError:
        return
    assert len(raw) == fuse.fuse_in_header.unpack_from(raw)[0]
    assert len(request.body) <= len(raw) - fuse.fuse_in_header.size


@given(st.lists(st.binary(max_size=30), max_size=5), st.binary(max_size=20))
def test_answers_in_one_message_come_apart_again(bodies: list[bytes], rest: bytes) -> None:
    whole = [b"".join(fuse.reply(at, (body,))) for at, body in enumerate(bodies)]
    assert list(messages_in(b"".join(whole))) == whole
    if rest:
        claimed = int.from_bytes(rest[:4].ljust(4, b"\0"), "little")
        if not fuse.fuse_out_header.size <= claimed <= len(rest):
            with pytest.raises(ProtocolError):
                list(messages_in(b"".join(whole) + rest))


NAMED = {
    fuse.FUSE_LOOKUP: b"",
    fuse.FUSE_UNLINK: b"",
    fuse.FUSE_RMDIR: b"",
    fuse.FUSE_MKDIR: fuse.fuse_mkdir_in.pack(0o755, 0),
    fuse.FUSE_MKNOD: fuse.fuse_mknod_in.pack(0o100644, 0, 0, 0),
    fuse.FUSE_CREATE: fuse.fuse_create_in.pack(os.O_RDWR, 0o644, 0, 0),
    fuse.FUSE_LINK: fuse.fuse_link_in.pack(2),
    fuse.FUSE_SYMLINK: b"",
    fuse.FUSE_RENAME: fuse.fuse_rename_in.pack(1),
    fuse.FUSE_RENAME2: fuse.fuse_rename2_in.pack(1, 0, 0),
}


@pytest.mark.parametrize("opcode", NAMED)
@pytest.mark.parametrize(
    "name", [b"..", b".", b"", b"../outside", b"d/../../outside", b"ABSOLUTE", b"../new"]
)
def test_no_name_leads_out_of_its_directory(opcode: int, name: bytes, tmp_path: Path) -> None:
    (tmp_path / "home/d").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"untouched")
    # What a broken server then does it does as root: nothing it may hit lies outside of `tmp_path`.
    name = name.replace(b"ABSOLUTE", os.fsencode(tmp_path / "outside"))
    answers: list[bytes] = []

    def serve() -> None:
        allowed = Credentials(frozenset({os.geteuid()}), frozenset({os.getegid()}))
        with HomeFiles(
            tmp_path / "home", lambda parts: answers.append(b"".join(parts)), allowed=allowed
        ) as home:
            for names in (name + b"\0new\0", b"d\0" + name + b"\0"):
                body = NAMED[opcode] + names
                home.handle(message(opcode, 1, os.geteuid(), body))
                if opcode not in {fuse.FUSE_RENAME, fuse.FUSE_RENAME2}:
                    break

    in_a_thread(serve)
    assert {fuse.fuse_out_header.unpack(answer)[1] for answer in answers} == {-errno.EINVAL}
    assert sorted(os.listdir(tmp_path)) == ["home", "outside"]
