"""Files of home, reached from a host: `python -m bench.homefiles`, as root.

The host's programs, home, and the line between them, which is a socket pair or a veth between two network
namespaces. The round trip of that very line is measured in the same run.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from godwit.linux import fuse, mount, ns, rtnetlink
from godwit.residual.homefiles.credentials import Credentials
from godwit.residual.homefiles.pump import Pump
from godwit.residual.homefiles.server import HomeFiles
from godwit.types import OwnedFd

_FILES = 500
_STREAM_BYTES = 128 << 20
_PORT = 7000
_LENGTH_BYTES = 4


def _send(link: socket.socket, parts: Sequence[bytes | memoryview]) -> None:
    total = sum(map(len, parts))
    sent = link.sendmsg([total.to_bytes(_LENGTH_BYTES, sys.byteorder), *parts])
    if sent < total + _LENGTH_BYTES:
        link.sendall((total.to_bytes(_LENGTH_BYTES, sys.byteorder) + b"".join(parts))[sent:])


def _receive(link: socket.socket, take: Callable[[memoryview], None]) -> None:
    buffer = bytearray(4 * fuse.MAX_MESSAGE_BYTES)
    view, start, end = memoryview(buffer), 0, 0
    while count := link.recv_into(view[end:]):
        end += count
        while end - start >= _LENGTH_BYTES:
            length = int.from_bytes(view[start : start + 4], sys.byteorder) + _LENGTH_BYTES
            if end - start < length:
                break
            take(view[start + _LENGTH_BYTES : start + length])
            start += length
        buffer[: end - start] = buffer[start:end]
        start, end = 0, end - start


def _home(link: socket.socket, root: str) -> None:
    """Answer 300 pings, take a stream, then serve files until the line ends."""
    for _ in range(300):
        link.sendall(link.recv(64, socket.MSG_WAITALL))
    left = _STREAM_BYTES
    buffer = bytearray(1 << 20)
    while left:
        left -= link.recv_into(buffer, min(left, len(buffer)))
    link.sendall(b"k")
    lock = threading.Lock()

    def reply(parts: Sequence[bytes]) -> None:
        with lock:
            _send(link, parts)

    root_only = Credentials(frozenset({0}), frozenset({0}))
    with HomeFiles(root, reply, allowed=root_only, watched_ttl_ns=600 * 10**9) as home:
        _receive(link, home.handle)


def _veth() -> tuple[socket.socket, socket.socket]:
    """Join this process, in a network namespace of its own, to another one by a veth and by TCP."""
    ns.unshare(ns.CLONE_NEWNET)
    with rtnetlink.Route() as route, OwnedFd(os.open("/proc/self/ns/net", os.O_RDONLY)) as here:
        ns.unshare(ns.CLONE_NEWNET)
        with rtnetlink.Route() as other:
            index = other.add_veth("far", "near", here.number)
            other.add_address(index, "10.9.0.2", 24)
            other.set_up(index, up=True)
        listener = socket.create_server(("10.9.0.2", _PORT))
        ns.setns(here.number, ns.CLONE_NEWNET)
        near = socket.if_nametoindex("near")
        route.add_address(near, "10.9.0.1", 24)
        route.set_up(near, up=True)
    host = socket.create_connection(("10.9.0.2", _PORT))
    home, _ = listener.accept()
    for end in (host, home):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return host, home


def _each(count: int, call: Callable[[int], object]) -> float:
    """Return the median microseconds of a call."""
    taken = []
    for number in range(count):
        started = time.perf_counter_ns()
        call(number)
        taken.append(time.perf_counter_ns() - started)
    return statistics.median(taken) / 1000


def _rate(call: Callable[[], object]) -> float:
    """Return MB/s of a call that moves the stream once."""
    started = time.perf_counter()
    call()
    return _STREAM_BYTES / 1e6 / (time.perf_counter() - started)


def _line(link: socket.socket) -> tuple[float, float]:
    def ping(_: int) -> None:
        link.sendall(bytes(64))
        link.recv(64, socket.MSG_WAITALL)

    round_trip = _each(300, ping)
    piece = bytes(1 << 20)

    def stream() -> None:
        for _ in range(_STREAM_BYTES >> 20):
            link.sendall(piece)
        link.recv(1)

    return round_trip, _rate(stream)


def _write_all(path: str) -> None:
    with open(path, "wb", buffering=0) as file:
        piece = bytes(1 << 20)
        file.writelines(piece for _ in range(_STREAM_BYTES >> 20))


def _read_all(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass


def _open_close(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _program(at: str, report: int) -> None:
    """Do what programs do, and write what it took."""
    rows = [("stat cold, us", _each(_FILES, lambda n: os.stat(f"{at}/f{n}")))]
    rows.append(("stat known, us", _each(_FILES, lambda n: os.stat(f"{at}/f{n}"))))
    rows.append(("no such name, us", _each(_FILES, lambda n: os.path.exists(f"{at}/none{n}"))))
    rows.append(("open and close, us", _each(_FILES, lambda n: _open_close(f"{at}/f{n}"))))
    fd = os.open(f"{at}/block", os.O_RDWR)
    rows.append(("read 4 KiB cold, us", _each(200, lambda n: os.pread(fd, 4096, (n * 977 % 1024) << 18))))
    rows.append(("read 4 KiB known, us", _each(2000, lambda _: os.pread(fd, 4096, 0))))
    rows.append(("write 4 KiB, us", _each(_FILES, lambda n: os.pwrite(fd, bytes(4096), n << 12))))
    os.close(fd)
    rows.append(
        (
            "create and close, us",
            _each(_FILES, lambda n: os.close(os.open(f"{at}/new{n}", os.O_CREAT | os.O_RDWR))),
        )
    )
    rows.append(("list 10000, ms", _each(3, lambda _: sum(1 for _ in os.scandir(f"{at}/many"))) / 1000))
    rows.append(("write, MB/s", _rate(lambda: _write_all(f"{at}/large"))))
    rows.append(("read cold, MB/s", _rate(lambda: _read_all(f"{at}/stream"))))
    rows.append(("read known, MB/s", _rate(lambda: _read_all(f"{at}/stream"))))
    os.write(report, "".join(f"{name}\t{value:.1f}\n" for name, value in rows).encode())


def _prepare(root: Path) -> None:
    (root / "many").mkdir(parents=True)
    for number in range(10000):
        (root / f"many/{number}").touch()
    for number in range(_FILES):
        (root / f"f{number}").write_bytes(b"x")
    with open(root / "block", "wb") as file:
        file.truncate(256 << 20)
    _write_all(str(root / "stream"))


def _forked(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        body()
        os._exit(0)
    return pid


def _host(line: str, root: str, mountpoint: str) -> None:
    host, home = socket.socketpair() if line == "socket pair" else _veth()
    serving = _forked(lambda: (host.close(), _home(home, root))[1])
    home.close()
    round_trip, rate = _line(host)
    ns.unshare(ns.CLONE_NEWNS)
    mount.make_private()
    connection = fuse.mount_new(mountpoint)
    report_read, report = os.pipe()
    program = _forked(lambda: (os.close(connection.device.number), _program(mountpoint, report))[1])
    os.close(report)
    pump = Pump(connection, lambda message: _send(host, [message]))
    threading.Thread(target=_receive, args=[host, lambda m: pump.deliver([m])], daemon=True).start()
    print(f"{line}: round trip {round_trip:.1f} us, {rate:.0f} MB/s", flush=True)
    with open(report_read, encoding="ascii") as lines:
        print(lines.read(), flush=True)
    os.waitpid(program, 0)
    pump.close()
    host.shutdown(socket.SHUT_RDWR)
    os.waitpid(serving, 0)


def main() -> None:
    """Measure over either line, and the same without one."""
    with tempfile.TemporaryDirectory(prefix="godwit-bench-") as base:
        for at, line in enumerate(("no line", "socket pair", "veth")):
            root, mountpoint = Path(base) / f"home{at}", Path(base) / f"mnt{at}"
            mountpoint.mkdir()
            _prepare(root)
            if line == "no line":
                print("the directory itself", flush=True)
                os.waitpid(_forked(partial(_program, str(root), 1)), 0)
            else:
                os.waitpid(_forked(partial(_host, line, str(root), str(mountpoint))), 0)


if __name__ == "__main__":
    main()
