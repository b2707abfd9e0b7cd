"""What keepers tell each other, and what they are asked."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.errors import ImageError
from godwit.images import codec
from godwit.residual import control, keeping
from godwit.residual.control import Confirmed, Ended, Killed, Message, Over, Signalled
from godwit.types import OwnedFd

MESSAGES: list[Message] = [
    Signalled(inner=7, number=3, info=bytes(128)),
    Confirmed(inner=7, number=3),
    Killed(inner=7),
    Ended(inner=7, status=139),
    Over(),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_arrives_as_it_was(message: Message) -> None:
    assert control.unpack(control.pack(message)) == message


@given(st.binary())
def test_garbage_is_refused(raw: bytes) -> None:
    with pytest.raises(ImageError):
        control.unpack(raw)


def test_a_message_of_a_newer_godwit_is_passed_over() -> None:
    envelope = keeping.Envelope(kind="Sing", body=b"")
    assert control.unpack(codec.encode(envelope)) is None


def test_the_links_of_a_job_have_names_of_their_own() -> None:
    job = bytes(range(15)) + b"\0"
    names = {control.link_name(job, which) for which in (control.FILES_LINK, control.CONTROL_LINK)}
    assert len(names) == 2
    assert {name[: control.JOB_BYTES] for name in names} == {job[: control.JOB_BYTES]}


def test_a_question_brings_descriptors() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open("/dev/null", "rb") as null:
        keeping.send(ours, b"question", [null.fileno()])
        raw, fds = keeping.receive(theirs)
        assert raw == b"question"
        with fds[0] as fd:
            assert isinstance(fd, OwnedFd)


def test_more_descriptors_than_any_question_has_are_closed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open("/dev/null", "rb") as null:
        keeping.send(ours, b"question", [null.fileno()] * 9)
        with pytest.raises(ConnectionError):
            keeping.receive(theirs)


def test_an_ended_connection_is_no_question() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.close()
        with pytest.raises(ConnectionError):
            keeping.receive(theirs)
