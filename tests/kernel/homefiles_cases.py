"""What programs do with files. Each case works in the current directory and returns what it has seen.

A case is run in a plain directory and through a mount of home's; both must return the same and leave the
same behind. Whatever differs from run to run (times, inode numbers) a case keeps to itself.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Callable

Case = Callable[[], object]
CASES: dict[str, Case] = {}
USER = (12345, 12346, (12347, 12348))
_libc = ctypes.CDLL(None, use_errno=True)


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def seen(call: Callable[..., object], *args: object, **options: object) -> object:
    """Return what a call returns, or the name of its error."""
    try:
        return call(*args, **options)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def put(name: str | bytes, content: bytes = b"content\n", mode: int = 0o644) -> None:
    with open(name, "wb") as file:
        file.write(content)
    os.chmod(name, mode)


def got(name: str | bytes) -> bytes:
    with open(name, "rb") as file:
        return file.read()


def look(name: str | bytes | int) -> tuple[object, ...]:
    status = os.stat(name, follow_symlinks=False) if not isinstance(name, int) else os.fstat(name)
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    nlink = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
    return oct(status.st_mode), nlink, status.st_uid, status.st_gid, size, status.st_rdev


def forked(function: Case) -> object:
    """Return what a function returns in a child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = repr(function())
        except BaseException as error:  # noqa: BLE001  # told to the parent
            answer = repr(f"{type(error).__name__}: {error}")
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return ast.literal_eval(answer)


def as_user(function: Case, ids: tuple[int, int, tuple[int, ...]] = USER) -> object:
    def user() -> object:
        uid, gid, groups = ids
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        return function()

    return forked(user)


@case
def read_and_write() -> object:
    put("a", b"0123456789")
    fd = os.open("a", os.O_RDWR)
    result: list[object] = [os.pread(fd, 4, 3), os.pwrite(fd, b"xy", 5), os.read(fd, 100), os.read(fd, 10)]
    result += [os.lseek(fd, -3, os.SEEK_END), os.read(fd, 10), seen(os.lseek, fd, -1, os.SEEK_SET)]
    os.close(fd)
    return [*result, got("a"), look("a")]


@case
def open_flags() -> object:
    put("there")
    os.mkdir("dir")
    os.symlink("there", "link")
    os.symlink("nowhere", "broken")
    flags = [
        os.O_RDONLY,
        os.O_WRONLY,
        os.O_RDWR,
        os.O_RDONLY | os.O_CREAT,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_WRONLY | os.O_TRUNC,
        os.O_RDONLY | os.O_DIRECTORY,
        os.O_RDONLY | os.O_NOFOLLOW,
        os.O_WRONLY | os.O_APPEND,
        os.O_RDWR | os.O_SYNC,
        os.O_RDWR | os.O_NOATIME,
        os.O_PATH,
        os.O_PATH | os.O_NOFOLLOW,
    ]
    result: list[object] = []
    for name in ("there", "dir", "link", "broken", "missing", "there/x", "dir/x", "there/"):
        for flag in flags:
            fd = seen(os.open, name, flag, 0o600)
            if isinstance(fd, int):
                result.append((name, flag, look(fd), fcntl.fcntl(fd, fcntl.F_GETFL)))
                os.close(fd)
                for created in ("broken", "nowhere", "missing", "dir/x"):
                    if flag & os.O_CREAT and name in {"broken", "missing", "dir/x"}:
                        with contextlib.suppress(OSError):
                            os.unlink("nowhere" if name == "broken" and created == "broken" else created)
                if not os.path.lexists("broken"):
                    os.symlink("nowhere", "broken")
            else:
                result.append((name, flag, fd))
    return result


@case
def appending_by_two() -> object:
    first = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    second = os.open("log", os.O_WRONLY | os.O_APPEND)
    for at in range(20):
        os.write((first, second)[at % 2], b"line %d\n" % at)
    os.pwrite(first, b"positioned\n", 0)
    return got("log"), os.lseek(first, 0, os.SEEK_CUR), look("log")


@case
def rename_over_an_open_file() -> object:
    put("old", b"old")
    put("new", b"new")
    fd = os.open("old", os.O_RDWR)
    other = os.open("new", os.O_RDONLY)
    os.rename("new", "old")
    os.write(fd, b"OLD!")
    return os.pread(fd, 10, 0), os.read(other, 10), look(fd), got("old"), look("old"), sorted(os.listdir())


@case
def unlinked_but_open() -> object:
    put("a", b"before")
    fd = os.open("a", os.O_RDWR)
    os.unlink("a")
    put("a", b"another")
    os.pwrite(fd, b" after", 6)
    os.ftruncate(fd, 9)
    os.fchmod(fd, 0o600)
    return os.pread(fd, 100, 0), look(fd), got("a")


@case
def removed_but_current_directory() -> object:
    os.mkdir("d")
    os.chdir("d")
    os.rmdir("../d")
    result: list[object] = [seen(os.listdir, "."), seen(put, "x"), look(".")[0], seen(os.getcwd)]
    os.chdir("/")
    return result


@case
def links() -> object:
    put("a")
    os.mkdir("d")
    os.symlink("a", "s")
    os.link("a", "d/b")
    os.link("s", "s2", follow_symlinks=False)
    os.link("s", "s3", follow_symlinks=True)
    put("d/b", b"changed by the other name")
    same = os.path.samefile("a", "d/b"), os.lstat("s").st_ino == os.lstat("s2").st_ino
    errors = [seen(os.link, "d", "e"), seen(os.link, "a", "d/b"), seen(os.link, "zz", "e")]
    return got("a"), look("a"), look("s"), look("s2"), look("s3"), same, errors, os.readlink("s")


@case
def symbolic_links() -> object:
    os.symlink("x" * 4000, "long")
    os.symlink("loop2", "loop1")
    os.symlink("loop1", "loop2")
    os.symlink("/etc/passwd", "absolute")
    result: list[object] = [os.readlink("long") == "x" * 4000, seen(open, "loop1"), seen(os.stat, "long")]
    result += [seen(os.symlink, "", "empty"), seen(os.symlink, "x", "long"), seen(os.readlink, ".")]
    return [*result, got("absolute") == got("/etc/passwd"), look("loop1")]


@case
def special_nodes() -> object:
    os.umask(0o027)
    os.mkfifo("fifo", 0o666)
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod("block", stat.S_IFBLK | 0o600, os.makedev(259, 0x12345))
    os.mknod("regular", stat.S_IFREG | 0o777)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.connect("socket")
        peer, _ = server.accept()
        client.sendall(b"over")
        told = peer.recv(10)
        peer.close()
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open("fifo", os.O_WRONLY)
    os.write(writer, b"through")
    written = os.open("null", os.O_WRONLY)
    result: list[object] = [os.read(reader, 10), os.write(written, b"x"), told]
    return result, [look(name) for name in sorted(os.listdir())]


@case
def truncating() -> object:
    put("a", b"0123456789")
    os.truncate("a", 4)
    first = got("a")
    os.truncate("a", 8)
    second = got("a")
    fd = os.open("a", os.O_RDWR)
    os.ftruncate(fd, 2)
    reading = os.open("a", os.O_RDONLY)
    errors = [seen(os.ftruncate, reading, 1), seen(os.truncate, ".", 1), seen(os.ftruncate, fd, -1)]
    os.close(os.open("a", os.O_WRONLY | os.O_TRUNC))
    return first, second, look(fd), errors, got("a")


@case
def allocating_space() -> object:
    fd = os.open("a", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(fd, b"x" * 65536)

    def fallocate(mode: int, start: int, length: int) -> object:
        failed = _libc.fallocate(fd, mode, ctypes.c_long(start), ctypes.c_long(length))
        return errno.errorcode[ctypes.get_errno()] if failed else os.fstat(fd).st_size

    result: list[object] = [fallocate(0, 0, 100000), fallocate(1, 0, 200000), fallocate(3, 4096, 8192)]
    result += [fallocate(0x10, 20000, 1000), fallocate(0, 0, 0), fallocate(0, -1, 5)]
    return result, os.pread(fd, 30000, 0), os.fstat(fd).st_size


@case
def holes() -> object:
    fd = os.open("a", os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(fd, b"x" * 4096, 1 << 20)
    os.ftruncate(fd, 4 << 20)
    result: list[object] = [
        seen(os.lseek, fd, at, os.SEEK_DATA) for at in (0, 1 << 20, (1 << 20) + 4096, 5 << 20)
    ]
    result += [seen(os.lseek, fd, at, os.SEEK_HOLE) for at in (0, 1 << 20, 4 << 20)]
    return result, os.lseek(fd, 7, os.SEEK_SET)


@case
def large_and_sparse() -> object:
    fd = os.open("a", os.O_RDWR | os.O_CREAT, 0o644)
    at = (5 << 30) + 12345
    os.pwrite(fd, b"far away", at)
    return os.pread(fd, 100, at), os.pread(fd, 4, at - 2), look(fd), os.fstat(fd).st_blocks < 100


@case
def shared_mapping() -> object:
    put("a", bytes(10000))
    fd = os.open("a", os.O_RDWR)
    with mmap.mmap(fd, 10000) as memory:
        memory[5000:5005] = b"hello"
        memory.flush()
        read = os.pread(fd, 5, 5000)
        os.pwrite(fd, b"HELLO", 9000)
        back = memory[9000:9005]
        memory[0:3] = b"end"
    return read, back, got("a")[:3]


@case
def private_mapping() -> object:
    put("a", b"x" * 5000)
    fd = os.open("a", os.O_RDONLY)
    with mmap.mmap(fd, 5000, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        memory[0:2] = b"yy"
        return memory[0:4], got("a")[:4]


@case
def executing() -> object:
    shutil.copy("/bin/true", "true")
    put("script", b"#!/bin/sh\necho $0 $1\n", 0o755)
    ran = subprocess.run(["./script", "x"], capture_output=True, check=True).stdout
    codes: list[object] = [subprocess.run(["./true"], check=False).returncode]
    fd = os.open("true", os.O_RDWR)
    codes.append(seen(subprocess.run, ["./true"], check=False))
    os.close(fd)
    os.chmod("true", 0o644)
    codes.append(seen(subprocess.run, ["./true"], check=False))
    return ran, codes


@case
def written_while_it_runs() -> object:
    shutil.copy("/bin/cat", "cat")
    with subprocess.Popen(["./cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x\n")
        process.stdin.flush()
        process.stdout.readline()
        result = seen(os.open, "cat", os.O_WRONLY), seen(os.truncate, "cat", 0)
        process.stdin.close()
    return result


@case
def nameless_files() -> object:
    os.umask(0o022)
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o666)
    os.write(fd, b"no name yet")
    before = look(fd), os.listdir()
    # With a directory given Python calls linkat(2), which can follow the link in /proc.
    numbers = os.open("/proc/self/fd", os.O_PATH)
    os.link(str(fd), "named", src_dir_fd=numbers, follow_symlinks=True)
    bare = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    refused = seen(os.link, str(bare), "never", src_dir_fd=numbers, follow_symlinks=True)
    return before, got("named"), look("named"), refused


@case
def extended_attributes() -> object:
    put("a")
    os.symlink("a", "s")
    result: list[object] = [seen(os.listxattr, "a")]
    os.setxattr("a", "user.one", b"1")
    os.setxattr("a", "user.two", b"2" * 1000)
    os.setxattr("a", "trusted.three", b"")
    result += [sorted(os.listxattr("a")), os.getxattr("a", "user.two"), os.getxattr("a", "trusted.three")]
    result += [seen(os.setxattr, "a", "user.one", b"x", os.XATTR_CREATE)]
    result += [seen(os.setxattr, "a", "user.new", b"x", os.XATTR_REPLACE), seen(os.getxattr, "a", "user.no")]
    result += [
        seen(os.setxattr, "s", "user.x", b"x", follow_symlinks=False),
        seen(os.removexattr, "a", "user.z"),
    ]
    result += [seen(os.setxattr, "a", "odd.name", b"x"), seen(os.setxattr, "a", "user." + "n" * 300, b"x")]
    os.removexattr("a", "user.one")
    result += [as_user(lambda: [seen(os.listxattr, "a"), seen(os.getxattr, "a", "trusted.three")])]
    result += [as_user(lambda: seen(os.setxattr, "a", "user.mine", b"x"))]
    return [*result, sorted(os.listxattr("a"))]


def acl(*entries: tuple[int, int, int]) -> bytes:
    """tag, permissions, id: <linux/posix_acl_xattr.h>."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF


@case
def access_lists() -> object:
    put("a", mode=0o640)
    put("b", mode=0o660)
    uid = USER[0]
    allows = acl((1, 6, NOBODY), (2, 6, uid), (4, 0, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY))
    denies = acl((1, 6, NOBODY), (2, 0, uid), (4, 6, NOBODY), (16, 6, NOBODY), (32, 6, NOBODY))
    os.setxattr("a", "system.posix_acl_access", allows)
    os.setxattr("b", "system.posix_acl_access", denies)
    result: list[object] = [as_user(lambda: [seen(got, "a"), seen(put, "a", b"x"), seen(got, "b")])]
    os.chmod("a", 0o600)
    result += [as_user(lambda: seen(got, "a")), os.getxattr("a", "system.posix_acl_access"), look("a")]
    os.mkdir("d")
    default = acl((1, 7, NOBODY), (2, 7, uid), (4, 5, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY))
    os.setxattr("d", "system.posix_acl_default", default)
    os.umask(0o077)
    with open("d/made", "w", encoding="ascii"):
        os.mkdir("d/sub")
    result += [look("d/made"), look("d/sub"), os.getxattr("d/made", "system.posix_acl_access")]
    result += [
        os.getxattr("d/sub", "system.posix_acl_default"),
        seen(os.getxattr, "d", "system.posix_acl_access"),
    ]
    return [*result, seen(os.setxattr, "a", "system.posix_acl_access", b"rubbish")]


@case
def masks() -> object:
    result: list[object] = []
    for mask in (0, 0o022, 0o077, 0o777):
        os.umask(mask)
        os.close(os.open(f"f{mask}", os.O_CREAT | os.O_WRONLY, 0o6777))
        os.mkdir(f"d{mask}", 0o1777)
        os.mknod(f"n{mask}", 0o666)
        result.append([look(f"{kind}{mask}") for kind in "fdn"])
    return result


@case
def permissions_of_a_user() -> object:
    os.chmod(".", 0o777)
    put("private", mode=0o600)
    put("readable", mode=0o644)
    put("of_group", mode=0o640)
    os.chown("of_group", 0, USER[2][0])
    put("of_gid", mode=0o060)
    os.chown("of_gid", 0, USER[1])
    os.mkdir("closed", 0o700)
    put("closed/x")
    os.mkdir("listed", 0o744)
    put("listed/x")
    os.mkdir("passed", 0o711)
    put("passed/x")

    def user() -> object:
        result: list[object] = [
            seen(got, name) for name in ("private", "readable", "of_group", "of_gid", "closed/x")
        ]
        result += [seen(os.listdir, "listed"), seen(os.stat, "listed/x"), seen(os.listdir, "passed")]
        result += [seen(got, "passed/x"), seen(put, "readable"), seen(os.mkdir, "passed/d")]
        result += [seen(os.chmod, "readable", 0o777), seen(os.chown, "readable", *USER[:2])]
        result += [seen(os.utime, "readable"), seen(os.utime, "of_gid"), seen(os.truncate, "readable", 0)]
        put("mine")
        os.mkdir("my")
        os.symlink("x", "my/link")
        os.mkfifo("my/fifo")
        result += [look(name) for name in ("mine", "my", "my/link", "my/fifo")]
        result += [seen(os.chown, "mine", 0, -1), seen(os.chown, "mine", -1, USER[2][1]), look("mine")]
        result += [
            seen(os.chown, "mine", -1, 999),
            seen(os.mknod, "dev", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
        ]
        result += [
            seen(os.unlink, "readable"),
            seen(os.access, "of_gid", os.R_OK),
            seen(os.open, "private", os.O_PATH) != 0,
        ]
        return [
            *result,
            seen(os.link, "private", "stolen"),
            seen(os.open, "of_group", os.O_RDONLY | os.O_NOATIME),
        ]

    return as_user(user), as_user(lambda: [seen(got, "of_group"), seen(got, "of_gid")], (USER[0], 7, ()))


@case
def inherited_groups() -> object:
    os.mkdir("shared")
    os.chown("shared", 0, USER[2][0])
    os.chmod("shared", 0o2777)

    def user() -> object:
        put("shared/file")
        os.mkdir("shared/dir")
        os.close(os.open("shared/sgid", os.O_CREAT | os.O_WRONLY, 0o2775))
        return [look(f"shared/{name}") for name in ("file", "dir", "sgid")]

    return as_user(user), as_user(user_in_other_group)


def user_in_other_group() -> object:
    os.mkdir("shared/dir2")
    return look("shared/dir2")


@case
def sticky_directories() -> object:
    os.mkdir("tmp")
    os.chmod("tmp", 0o1777)
    put("tmp/roots", mode=0o666)

    def user() -> object:
        put("tmp/mine")
        result: list[object] = [seen(os.unlink, "tmp/roots"), seen(os.rename, "tmp/roots", "tmp/x")]
        return [*result, seen(os.rename, "tmp/mine", "tmp/roots"), seen(put, "tmp/roots", b"y")]

    other = as_user(lambda: seen(os.unlink, "tmp/mine"), (USER[0] + 1, USER[1], ()))
    return as_user(user), other, as_user(lambda: seen(os.unlink, "tmp/mine"))


@case
def privileged_bits() -> object:
    os.chmod(".", 0o777)
    result: list[object] = []
    put("by_root", mode=0o6777)
    with open("by_root", "r+b") as file:
        file.write(b"x")
    result.append(look("by_root"))
    os.truncate("by_root", 3)
    result.append(look("by_root"))
    os.chown("by_root", 5, 5)
    result.append(look("by_root"))
    for name in ("written", "truncated", "opened", "chowned", "mapped"):
        put(name, b"x" * 100)
        os.chown(name, *USER[:2])
        os.chmod(name, 0o6777)

    def user() -> object:
        with open("written", "r+b") as file:
            file.write(b"y")
        os.truncate("truncated", 3)
        os.close(os.open("opened", os.O_WRONLY | os.O_TRUNC))
        os.chown("chowned", -1, USER[2][0])
        seen(os.chmod, "mapped", 0o2755)
        return [look(name) for name in ("written", "truncated", "opened", "chowned", "mapped")]

    return result, as_user(user)


@case
def renaming() -> object:
    def rename2(old: str, new: str, flags: int) -> object:
        failed = _libc.renameat2(-100, old.encode(), -100, new.encode(), flags)
        return errno.errorcode[ctypes.get_errno()] if failed else "done"

    put("a", b"a")
    put("b", b"b")
    os.makedirs("d/e/f")
    os.mkdir("full")
    put("full/x")
    result: list[object] = [
        rename2("a", "b", 1),
        rename2("a", "b", 2),
        got("a"),
        got("b"),
        rename2("a", "c", 1),
    ]
    result += [rename2("c", "d", 2), sorted(os.listdir()), rename2("d", "c", 2), rename2("zz", "a", 2)]
    result += [seen(os.rename, "d", "d/e/g"), seen(os.rename, "d", "full"), seen(os.rename, "c", "d")]
    result += [seen(os.rename, "d", "c"), seen(os.rename, "d/e", "full/x"), seen(os.rename, "b", "b")]
    fd = os.open("d/e/f", os.O_RDONLY)
    os.rename("d", "moved")
    put("moved/e/f/deep")
    return result, os.listdir(fd), sorted(os.listdir()), rename2("b", "x", 3)


@case
def directories() -> object:
    os.mkdir("d", 0o750)
    put("d/x")
    result: list[object] = [
        seen(os.rmdir, "d"),
        seen(os.mkdir, "d"),
        seen(os.rmdir, "d/x"),
        seen(os.unlink, "d"),
    ]
    result += [seen(os.rmdir, "."), seen(os.rmdir, "d/.."), seen(os.mkdir, "zz/y"), seen(os.mkdir, "d/x/y")]
    os.unlink("d/x")
    os.rmdir("d")
    return [*result, sorted(os.listdir()), seen(open, "d")]


@case
def long_names() -> object:
    result: list[object] = [
        seen(put, "n" * 255),
        seen(put, "n" * 256),
        seen(os.stat, "m" * 300),
        seen(os.mkdir, "é" * 128),
    ]
    deep = "/".join(["p" * 200] * 25)
    return [*result, seen(os.stat, deep), seen(os.symlink, "x" * 5000, "s"), len(os.listdir())]


@case
def names_of_any_bytes() -> object:
    names = [bytes([byte]) for byte in range(1, 256) if bytes([byte]) not in b"/."]
    names += [b"..x", b"...", b"\xff\xfe", "日本".encode(), b" ", b"a\nb"]
    for name in names:
        put(name, name)
    return sorted(os.listdir(b".")) == sorted(names), [got(name) == name for name in names]


@case
def many_entries() -> object:
    os.mkdir("many")
    for number in range(3000):
        os.close(os.open(f"many/{number:05}", os.O_CREAT | os.O_WRONLY, 0o600))
    listed = []
    with os.scandir("many") as entries:
        for at, entry in enumerate(entries):
            listed.append(entry.name)
            if at % 2:
                os.unlink(f"many/{entry.name}")
    kinds = {entry.is_file() for entry in os.scandir("many")}
    return len(listed), len(set(listed)), len(os.listdir("many")), kinds, seen(os.rmdir, "many")


@case
def directory_offsets() -> object:
    for number in range(500):
        put(f"f{number}", b"")
    opendir, readdir = _libc.opendir, _libc.readdir
    opendir.restype = readdir.restype = ctypes.c_void_p
    _libc.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(opendir(b"."))

    def name() -> bytes:
        entry = readdir(stream)
        return ctypes.string_at(entry + 19) if entry else b""

    first = [name() for _ in range(100)]
    at = _libc.telldir(stream)
    rest = []
    while found := name():
        rest.append(found)
    _libc.seekdir(stream, ctypes.c_long(at))
    again = name()
    _libc.rewinddir(stream)
    start = name()
    _libc.closedir(stream)
    return again == rest[0], start == first[0], len(first) + len(rest)


@case
def times() -> object:
    put("a")
    os.symlink("a", "s")
    os.utime("a", ns=(1_000_000_001, 2_000_000_002))
    os.utime("s", ns=(3, 4), follow_symlinks=False)
    os.utime(".", ns=(5 * 10**9, 6 * 10**9))
    result: list[object] = [
        (os.lstat(name).st_atime_ns, os.lstat(name).st_mtime_ns) for name in ("a", "s", ".")
    ]
    os.utime("a", ns=(-5, -(10**9) - 1))
    result.append((os.stat("a").st_atime_ns, os.stat("a").st_mtime_ns))
    subprocess.run(["touch", "-m", "-d", "@1234", "a"], check=True)
    result.append((os.stat("a").st_atime_ns, os.stat("a").st_mtime_ns))
    subprocess.run(["touch", "-a", "-d", "@777", "a"], check=True)
    result.append((os.stat("a").st_atime_ns, os.stat("a").st_mtime_ns))
    before = os.stat("a").st_mtime_ns
    with open("a", "r+b") as file:
        file.write(b"z")
    after = os.stat("a").st_mtime_ns
    put("new")
    os.utime("a")
    return result, after > before, os.stat("a").st_mtime_ns >= os.stat("new").st_mtime_ns


@case
def file_system() -> object:
    status = os.statvfs(".")
    return status.f_bsize, status.f_frsize, status.f_blocks, status.f_files, status.f_namemax


@case
def copying_ranges() -> object:
    put("a", bytes(range(256)) * 1000)
    source, target = os.open("a", os.O_RDONLY), os.open("b", os.O_RDWR | os.O_CREAT, 0o644)
    done = os.copy_file_range(source, target, 100000, 1000, 50)
    result: list[object] = [done, os.pread(target, 200000, 0) == bytes(50) + got("a")[1000:101000]]
    result += [seen(os.copy_file_range, target, source, 10), os.copy_file_range(source, target, 10, 10**6, 0)]
    return [*result, os.sendfile(target, source, 0, 100), shutil.copyfile("a", "c") and got("c") == got("a")]


@case
def wrong_descriptors() -> object:
    put("a")
    reading, writing = os.open("a", os.O_RDONLY), os.open("a", os.O_WRONLY)
    result: list[object] = [
        seen(os.write, reading, b"x"),
        seen(os.read, writing, 1),
        seen(os.read, os.open(".", 0), 1),
    ]
    return [
        *result,
        seen(os.pwrite, writing, b"x", -1),
        seen(fcntl.ioctl, reading, 0x5401, bytes(60)),
        os.isatty(reading),
    ]


@case
def synchronising() -> object:
    fd = os.open("a", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(fd, b"x")
    directory = os.open(".", os.O_RDONLY)
    return [seen(os.fsync, fd), seen(os.fdatasync, fd), seen(os.fsync, directory), got("a")]


@case
def record_locks() -> object:
    put("a", b"x" * 100)
    fd = os.open("a", os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 20)
    second = os.open("a", os.O_RDWR)
    fcntl.lockf(second, fcntl.LOCK_EX, 5, 22)  # of the same process: no conflict
    holder = os.getpid()

    def other() -> object:
        mine = os.open("a", os.O_RDWR)
        query = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        kind, _, start, length, pid = struct.unpack("hhqqi4x", fcntl.fcntl(mine, fcntl.F_GETLK, query))
        result: list[object] = [kind, start, length, pid == holder]
        result += [seen(fcntl.lockf, mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 25)]
        return [*result, seen(fcntl.lockf, mine, fcntl.LOCK_SH | fcntl.LOCK_NB, 5, 0)]

    result: list[object] = [forked(other)]
    reading = os.open("a", os.O_RDONLY)
    result += [seen(fcntl.lockf, reading, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 90)]
    fcntl.lockf(fd, fcntl.LOCK_UN, 3, 22)
    result.append(forked(other))
    os.close(second)  # a process loses its locks when it closes any descriptor
    result.append(forked(other))
    return result


@case
def open_file_locks() -> object:
    put("a", b"x" * 100)
    first, second = os.open("a", os.O_RDWR), os.open("a", os.O_RDWR)

    def lock(fd: int, kind: int, start: int, length: int) -> object:
        return seen(
            fcntl.fcntl, fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, 0, start, length, 0)
        ) in {
            "EAGAIN",
            "EACCES",
        }

    result: list[object] = [
        lock(first, fcntl.F_WRLCK, 0, 10),
        lock(second, fcntl.F_WRLCK, 5, 1),
        lock(second, fcntl.F_RDLCK, 10, 0),
    ]
    os.close(first)
    return [*result, until(lambda: not lock(second, fcntl.F_WRLCK, 5, 1))]


def until(condition: Callable[[], bool]) -> bool:
    """Wait a little: a FUSE file is released after close(2) has returned."""
    from godwit.linux.pause import pause

    for _ in range(200):
        if condition():
            return True
        pause(0.01)
    return False


@case
def whole_file_locks() -> object:
    put("a")
    first, second = os.open("a", os.O_RDONLY), os.open("a", os.O_RDWR)
    fcntl.flock(first, fcntl.LOCK_SH)
    result: list[object] = [
        seen(fcntl.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB),
        seen(fcntl.flock, second, fcntl.LOCK_SH),
    ]
    fcntl.flock(second, fcntl.LOCK_UN)
    fcntl.flock(first, fcntl.LOCK_EX)
    result += [seen(fcntl.flock, second, fcntl.LOCK_SH | fcntl.LOCK_NB)]
    os.close(first)
    return [*result, until(lambda: seen(fcntl.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB) is None)]


@case
def direct_and_synchronous_writing() -> object:
    fd = os.open("a", os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_SYNC, 0o644)
    with mmap.mmap(-1, 8192) as memory:
        memory[:] = b"d" * 8192
        written = os.pwritev(fd, [memory], 4096)
        read = os.preadv(fd, [memory], 0)
        return written, read, memory[:4096] == bytes(4096), look("a")
