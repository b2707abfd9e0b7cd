"""fdinfo, mountinfo and timers: text of the kernel, and what the test itself holds."""

from __future__ import annotations

import fcntl
import os
import select
import socket
from pathlib import Path

import pytest

from godwit.procfs import fdinfo, mountinfo, timers
from godwit.types import Fd, OwnedFd, Pid

ME = Pid(os.getpid())
HEAD = "pos:\t100\nflags:\t02100002\nmnt_id:\t27\nino:\t2146513\n"


def test_what_every_file_has_is_numbers() -> None:
    found = fdinfo.parse(HEAD + "eventfd-count:               1f\neventfd-semaphore: 0\n")
    assert (found.pos, found.flags, found.mnt_id, found.ino) == (100, 0o2100002, 27, 2146513)
    assert found.fields == {"eventfd-count": "1f", "eventfd-semaphore": "0"}
    assert fdinfo.parse("pos:\t0\nflags:\t02\nmnt_id:\t1\n").ino is None


def test_keys_with_spaces_and_pairs_are_kept() -> None:
    text = "clockid: 1\nticks: 0\nsettime flags: 01\nit_value: (0, 49)\nit_interval: (1, 0)\n"
    fields = fdinfo.parse(HEAD + text).fields
    assert fields["settime flags"] == "01"
    assert fields["it_value"] == "(0, 49)"


def test_locks_are_told_apart() -> None:
    text = (
        "lock:\t1: FLOCK  ADVISORY  READ 4390 fe:0a:2146513 0 EOF\n"
        "lock:\t2: POSIX  ADVISORY  WRITE 4390 fe:0a:2146513 5 14\n"
        "lock:\t3: OFDLCK ADVISORY  READ -1 fe:0a:2146513 0 0\n"
        "lock:\t4: LEASE  ACTIVE    WRITE 4390 fe:0a:2146513 0 EOF\n"
    )
    flock, posix, ofd, lease = fdinfo.parse(HEAD + text).locks
    assert (flock.kind, flock.mode, flock.pid, flock.start, flock.end) == ("FLOCK", "READ", 4390, 0, None)
    assert (flock.dev, flock.inode) == (os.makedev(0xFE, 0x0A), 2146513)
    assert (posix.kind, posix.mode, posix.start, posix.end) == ("POSIX", "WRITE", 5, 14)
    assert (ofd.kind, ofd.pid, ofd.end) == ("OFDLCK", -1, 0)
    assert (lease.kind, lease.status, lease.mode) == ("LEASE", "ACTIVE", "WRITE")


@pytest.mark.parametrize(
    "line", ["lock:\t1: FLOCK", "tfd: x", "inotify wd:1 ino:zz", "lock:\t1: POSIX ADVISORY READ 1 a:b 0 1"]
)
def test_a_damaged_line_of_fdinfo_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="fdinfo"):
        fdinfo.parse(f"{HEAD}{line}\n")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="no mnt_id"):
        fdinfo.parse("pos:\t0\nflags:\t02\n")


def test_an_inotify_watch_keeps_its_handle() -> None:
    text = (
        "inotify wd:1 ino:3f7e8 sdev:fe00003 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 "
        "f_handle:e8f7030000000000\ninotify wd:2 ino:1 sdev:2 mask:2 ignored_mask:0\n"
    )
    first, second = fdinfo.parse(HEAD + text).inotify
    assert (first.wd, first.ino, first.mask) == (1, 0x3F7E8, 0xFFF)
    assert first.sdev == os.makedev(0xFE, 3)
    assert (first.handle_type, first.handle) == (1, bytes.fromhex("e8f7030000000000"))
    assert second.handle == b""


def test_own_epoll_set_tells_its_interests() -> None:
    left, right = socket.socketpair()
    with left, right, select.epoll() as epoll:
        epoll.register(left, select.EPOLLIN | select.EPOLLET)
        (interest,) = fdinfo.read(ME, Fd(epoll.fileno())).epoll
        place = os.fstat(left.fileno())
        # Python fills the lower half of epoll_data and leaves the rest as it was.
        assert (interest.tfd, interest.data & 0xFFFFFFFF) == (left.fileno(), left.fileno())
        assert interest.events & select.EPOLLET
        assert (interest.ino, interest.sdev) == (place.st_ino, place.st_dev)


def test_own_file_tells_its_offset_flags_and_locks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    with OwnedFd(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)) as file:
        os.lseek(file.number, 42, os.SEEK_SET)
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 5)
        found = fdinfo.read(ME, file.number)
        place = os.fstat(file.number)
        assert (found.pos, found.ino) == (42, place.st_ino)
        assert found.flags & os.O_APPEND
        assert found.flags & os.O_CLOEXEC
        (lock,) = found.locks
        assert (lock.dev, lock.inode, lock.start, lock.end) == (place.st_dev, place.st_ino, 5, 14)
        number = file.number
    with pytest.raises(FileNotFoundError):
        fdinfo.read(ME, number)


def test_a_mount_with_every_oddity_is_read() -> None:
    text = (
        "36 35 98:10 /mnt1 /mnt\\0402\\012\\134\\303\\251 rw,sync shared:1 master:2 - ext3 /dev/x rw,e=c\n"
        "37 35 0:5 / /- rw - tmpfs  rw\n"
    )
    first, second = mountinfo.parse(text)
    assert (first.mount_id, first.parent_id, first.dev_major, first.dev_minor) == (36, 35, 98, 10)
    assert (first.root, first.mount_point) == ("/mnt1", "/mnt 2\n\\\u00e9")
    assert (first.options, first.propagation) == ("rw,sync", ("shared:1", "master:2"))
    assert (first.fs_type, first.source, first.super_options) == ("ext3", "/dev/x", "rw,e=c")
    assert (second.mount_point, second.propagation, second.source) == ("/-", (), "")
    with pytest.raises(ValueError, match="mountinfo: no mount: '36 35'"):
        mountinfo.parse("36 35\n")


def test_own_root_is_mounted() -> None:
    root = [mount for mount in mountinfo.read(ME) if mount.mount_point == "/"][-1]
    assert os.makedev(root.dev_major, root.dev_minor) == Path("/").stat().st_dev


def test_timers_of_both_targets_are_read() -> None:
    text = (
        "ID: 0\nsignal: 14/0000000000000000\nnotify: signal/pid.4390\nClockID: 1\n"
        "ID: 4242\nsignal: 34/00007f00deadbeef\nnotify: signal/tid.4391\nClockID: -6\n"
        "ID: 5\nsignal: 0/0000000000000000\nnotify: none/pid.0\nClockID: 0\n"
    )
    first, second, third = timers.parse(text)
    assert (first.timer_id, first.signal, first.notify, first.to_thread) == (0, 14, "signal", False)
    assert (second.timer_id, second.value, second.target, second.clock_id) == (4242, 0x7F00DEADBEEF, 4391, -6)
    assert second.to_thread
    assert third.notify == "none"
    assert timers.parse("") == ()
    with pytest.raises(ValueError, match="timers: no timer"):
        timers.parse(text + "ID: 1\n")


def test_a_program_without_timers_has_none() -> None:
    assert timers.read(ME) == ()
