"""What cannot be carried is refused by its name, with a remedy."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from godwit.errors import ImageError, UnsupportedStateError
from godwit.linux import abi
from godwit.resources import (
    device,
    epoll,
    eventfd,
    inet,
    memfd,
    pipe,
    refused,
    registry,
    signalfd,
    timerfd,
    unixsocket,
)
from godwit.resources.base import Disposition, FileKind
from godwit.resources.refused import RefusedEntry
from tests.kernel.openfiles import Builder, held

CARRIED: tuple[FileKind, ...] = (
    device.KIND,
    epoll.KIND,
    eventfd.KIND,
    inet.KIND,
    memfd.KIND,
    pipe.KIND,
    signalfd.KIND,
    timerfd.KIND,
    unixsocket.KIND,
)


def system(name: str, *args: int | bytes) -> Callable[[], int]:
    def make() -> int:
        try:
            return abi.syscall(name, *args)
        except (OSError, KeyError) as error:
            pytest.skip(f"no {name} here: {error}")

    return make


def opened(path: str, flags: int = os.O_RDONLY) -> Callable[[], int]:
    def make() -> int:
        try:
            return os.open(path, flags | os.O_NOCTTY)
        except OSError as error:
            pytest.skip(f"no {path} here: {error}")

    return make


def made_socket(family: int, kind: int) -> Callable[[], int]:
    def make() -> int:
        try:
            return socket.socket(family, kind).detach()
        except OSError as error:
            pytest.skip(f"no socket of family {family} here: {error}")

    return make


def terminal() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


SAMPLES: dict[str, Callable[[], int]] = {
    "terminal": terminal,
    "terminal /dev/ptmx": opened("/dev/ptmx", os.O_RDWR),
    "kernel log": opened("/dev/kmsg"),
    "FUSE": opened("/dev/fuse", os.O_RDWR),
    "network tunnel": opened("/dev/net/tun", os.O_RDWR),
    "descriptor opened with O_PATH": opened("/dev/null", os.O_PATH),
    "inotify": system("inotify_init1", 0),
    "fanotify": system("fanotify_init", 0, 0),
    "userfaultfd": system("userfaultfd", 1),
    "io_uring": system("io_uring_setup", 4, bytes(120)),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
    "namespace net:": opened("/proc/self/ns/net"),
    "netlink socket": made_socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "packet socket": made_socket(socket.AF_PACKET, socket.SOCK_RAW),
    "vsock": made_socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    "file of /proc": opened("/proc/self/maps"),
    "file of /sys": opened("/sys/kernel/mm/transparent_hugepage/enabled"),
}


@pytest.mark.parametrize("what", SAMPLES)
def test_it_is_refused_by_name_and_by_nobody_else_claimed(what: str) -> None:
    fd = SAMPLES[what]()
    with held(fd) as child:
        file = child.at(fd)
        assert [kind.name for kind in CARRIED if kind.claims(file)] == []
        assert refused.KIND.claims(file)
        finding = refused.inspect(file, child)
        assert finding.disposition is Disposition.REFUSE
        assert finding.what.startswith(what)
        assert finding.why
        assert finding.remedy
        with pytest.raises(UnsupportedStateError) as caught:
            refused.collect(child.files, child)
        assert caught.value.refusals[0] == finding.refusal()


def test_what_is_carried_is_not_in_the_table(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        fds = [
            *os.pipe(),
            os.eventfd(0),
            os.memfd_create("x"),
            left.detach(),
            right.detach(),
            os.open("/dev/null", os.O_RDWR),
            os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY),
            os.open(sys.executable, os.O_PATH),
            server.detach(),
        ]
    with held(*fds) as child:
        assert [file.link for file in child.files if refused.claims(file)] == []


def test_what_nobody_knows_is_refused_last() -> None:
    fd = os.open(".", os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    with held(fd) as child:
        assert refused.UNKNOWN.claims(child.at(fd))
        assert refused.UNKNOWN.inspect(child.at(fd), child).disposition is Disposition.REFUSE


def test_an_image_that_holds_such_a_file_is_damaged() -> None:
    with pytest.raises(ImageError, match="never carried"):
        refused.restore(RefusedEntry(), Builder())


def test_the_registry_asks_the_narrow_kinds_before_those_that_take_any_path(tmp_path: Path) -> None:
    expected = {
        os.memfd_create("x"): "memfd",
        os.open("/proc/self/maps", os.O_RDONLY): "refused",
        os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY): "refused",
        os.open("/dev/null", os.O_RDONLY): "device",
        os.open(tmp_path, os.O_RDONLY): "file",
        os.pidfd_open(os.getpid()): "refused",
        os.eventfd(0): "eventfd",
    }
    with held(*expected) as child:
        assert {fd: registry.kind_of(child.at(fd)).name for fd in expected} == expected
    tags = [kind.tag for kind in registry.KINDS]
    assert len(set(tags)) == len(tags)
