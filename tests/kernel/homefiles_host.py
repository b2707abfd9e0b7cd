"""A host of its own: home's directory mounted in a private mount namespace, until standard input ends.

`python homefiles_host.py ROOT MOUNTPOINT {direct,socket} OPTIONS`, OPTIONS being a literal of keyword
arguments. With `socket` home is another process, at the other end of a socket pair.
"""

from __future__ import annotations

import ast
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from godwit.linux import fuse, mount, ns
from godwit.residual.homefiles.credentials import Credentials
from godwit.residual.homefiles.pump import Pump
from godwit.residual.homefiles.server import HomeFiles
from godwit.types import OwnedFd

HARD_END_S = 170  # a server that is stuck keeps its users in uninterruptible sleep
_ROOT_JOB = {"uids": (0,), "gids": (0,), "groups": ()}


requests = [0]  # of the host's kernel, so far


def home_files(root: str, options: dict[str, Any], reply: Callable[[Sequence[bytes]], None]) -> HomeFiles:
    rest = dict(options)
    who = {**_ROOT_JOB, **rest.pop("who", {})}
    uids, gids = frozenset(who["uids"]), frozenset(who["gids"])
    allowed = Credentials(uids, gids, tuple(who["groups"]), who.get("groups_of", {}))
    registered = rest.pop("registered", ())
    home = HomeFiles(root, reply, allowed=allowed, **rest)
    for path, flags in registered:
        fd = os.open(path, flags)
        os.unlink(path)
        home.register(OwnedFd(fd))
    return home


def receive(link: socket.socket, handle: Callable[[memoryview], None]) -> None:
    """Cut a stream into messages, each after its length in four bytes."""
    buffer = bytearray(4 * fuse.MAX_MESSAGE_BYTES)
    view, start, end = memoryview(buffer), 0, 0
    while count := link.recv_into(view[end:]):
        end += count
        while end - start >= 4:
            length = int.from_bytes(view[start : start + 4], sys.byteorder) + 4
            if end - start < length:
                break
            handle(view[start + 4 : start + length])
            start += length
        if start:
            buffer[: end - start] = buffer[start:end]
            start, end = 0, end - start


def serve_home(root: str, options: dict[str, Any], link: socket.socket) -> None:
    lock = threading.Lock()

    def reply(parts: Sequence[bytes]) -> None:
        with lock:
            send_all(link, parts)

    with home_files(root, options, reply) as home:
        receive(link, home.handle)


def send_all(link: socket.socket, parts: Sequence[bytes | memoryview]) -> None:
    total = sum(map(len, parts))
    parts = [total.to_bytes(4, sys.byteorder), *parts]
    total += 4
    sent = link.sendmsg(parts)
    if sent < total:
        link.sendall(b"".join(parts)[sent:])


def joined_by_socket(root: str, options: dict[str, Any], connection: fuse.Connection) -> None:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        connection.device.close()
        ours.close()
        serve_home(root, options, theirs)
        os._exit(0)
    theirs.close()
    pump = Pump(connection, lambda message: send_all(ours, [message]))
    reader = threading.Thread(target=receive, args=[ours, lambda message: pump.deliver([message])])
    reader.start()
    say_and_wait()
    end(pump)
    ours.shutdown(socket.SHUT_RDWR)
    reader.join()
    os.waitpid(pid, 0)


def joined_directly(root: str, options: dict[str, Any], connection: fuse.Connection) -> None:
    pumps: list[Pump] = []
    there = threading.Event()

    def reply(parts: Sequence[bytes]) -> None:
        pumps[0].deliver(parts)

    home = home_files(root, options, reply)

    def handle(message: memoryview) -> None:
        there.wait()
        requests[0] += 1
        home.handle(message)

    pumps.append(Pump(connection, handle))
    there.set()
    say_and_wait()
    end(pumps[0])
    home.close()


def say_and_wait() -> None:
    os.write(1, b"ready\n")
    while os.read(0, 1):
        os.write(1, b"%d\n" % requests[0])


def end(pump: Pump) -> None:
    pump.close()
    if pump.error is not None:
        raise pump.error


def main() -> None:
    root, mountpoint, how, literal = sys.argv[1:]
    signal.alarm(HARD_END_S)
    ns.unshare(ns.CLONE_NEWNS)
    mount.make_private()
    options = ast.literal_eval(literal)
    for fstype, directory, data in options.pop("mounts", ()):
        mount.mount("test", f"{root}/{directory}", fstype, mount.MS_RDONLY if data == "ro" else 0, data)
    connection = fuse.mount_new(mountpoint)
    {"direct": joined_directly, "socket": joined_by_socket}[how](root, options, connection)


if __name__ == "__main__":
    main()
