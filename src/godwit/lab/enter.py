"""Starting programs in a node, from outside it.

A program started attached is our child, in our session: the terminal and its signals are the same
as for any command. One started detached belongs to the node: its session is its own, its parent is
the node's first process, and its standard input is the node's /dev/null.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Self

from godwit.errors import DestinationError, RequestError
from godwit.lab import machine
from godwit.lab.state import NodeRecord
from godwit.linux import abi, ns, pidfd
from godwit.types import OwnedFd, Pid

Stream = int | str | None
"""A descriptor of ours, a path in the node, or None for the node's /dev/null."""

_RESET = frozenset(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}
_INT = struct.Struct("=i")
CLOSE_RANGE_CLOEXEC = 4  # close_range(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A program to start in a node. Streams: see `Stream`."""

    argv: tuple[str, ...]
    cwd: str = "/"
    env: Mapping[str, str] | None = None  # None: ours
    stdin: Stream = None
    stdout: Stream = None
    stderr: Stream = None


@dataclass(slots=True, kw_only=True)
class NodeProcess:
    """A program that was started detached. Holds a pidfd: `with`, or `close`, lets it go."""

    host_pid: Pid  # as the host sees it
    node_pid: Pid  # as the node sees it
    pidfd: OwnedFd

    def alive(self) -> bool:
        """Tell whether it has not ended."""
        return not self.wait(0)

    def wait(self, timeout_s: float) -> bool:
        """Wait until it has ended, for `timeout_s` at most; return whether it has."""
        poller = select.poll()
        poller.register(self.pidfd.number, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal it. Raises ProcessLookupError when it has ended."""
        pidfd.send_signal(self.pidfd.number, number)

    def close(self) -> None:
        """Let go of the pidfd."""
        self.pidfd.close()


def start_attached(node: NodeRecord, command: Command) -> Pid:
    """Start a program in the node as a child of ours, and return its pid as we see it.

    Raises:
        FileNotFoundError, PermissionError, OSError: The program cannot be executed there.
        DestinationError: The node is down.
    """
    with _Trouble() as trouble, _held(node) as init:
        pid = ns.fork_with_pid_namespace(lambda: ns.setns(init.number, ns.CLONE_NEWPID))
        if pid == 0:
            trouble.end_with(lambda: _become(init, command))
        try:
            trouble.check()
        except (OSError, RequestError):
            os.waitpid(pid, 0)
            raise
        return Pid(pid)


def start_detached(node: NodeRecord, command: Command) -> NodeProcess:
    """Start a program that belongs to the node: in a session of its own, a child of the node's init.

    Raises:
        As `start_attached`.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, _Trouble() as trouble, _held(node) as init:
        pid = ns.fork_with_pid_namespace(lambda: ns.setns(init.number, ns.CLONE_NEWPID))
        if pid == 0:
            trouble.end_with(lambda: _start_grandchild(init, command, trouble, theirs))
        os.waitpid(pid, 0)
        trouble.check()
        answer, fds, _, _ = socket.recv_fds(ours, _INT.size, 1)
        held = OwnedFd(fds[0])
        (node_pid,) = _INT.unpack(answer)
        return NodeProcess(host_pid=_pid_of(held), node_pid=Pid(node_pid), pidfd=held)


def run(node: NodeRecord, command: Command, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    """Run a program in the node to its end; its output is collected, whatever `command` says of it.

    Raises:
        As `start_attached`, and subprocess.TimeoutExpired: it took longer and was killed.
    """
    deadline = time.monotonic() + timeout_s
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)
    collected = {out_read: bytearray(), err_read: bytearray()}
    try:
        try:
            pid = start_attached(node, replace(command, stdout=out_write, stderr=err_write))
        finally:
            os.close(out_write)
            os.close(err_write)
        finished = _collect(collected, deadline)
        if not finished:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(out_read)
        os.close(err_read)
    out, err = bytes(collected[out_read]), bytes(collected[err_read])
    if not finished:
        raise subprocess.TimeoutExpired(list(command.argv), timeout_s, out, err)
    return subprocess.CompletedProcess(list(command.argv), os.waitstatus_to_exitcode(status), out, err)


def _collect(pipes: dict[int, bytearray], deadline: float) -> bool:
    """Read all pipes to their ends; return False if the deadline came first."""
    poller = select.poll()
    for fd in pipes:
        poller.register(fd, select.POLLIN)
    left = len(pipes)
    while left:
        ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            return False
        for fd, _ in ready:
            data = os.read(fd, 1 << 16)
            pipes[fd] += data
            if not data:
                poller.unregister(fd)
                left -= 1
    return True


def wait_as_shell(pid: Pid) -> int:
    """Wait for a program started attached, passing signals on to it; return its status as a shell does.

    What the terminal sends it sends to the whole foreground group, of which the program is part, so
    only signals meant for us alone are passed on.
    """
    terminal = (signal.SIGINT, signal.SIGQUIT) if os.isatty(0) else ()
    passed = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}

    def pass_on(number: int, _: object) -> None:
        if number not in terminal:
            os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in passed}
    try:
        # Until this wait returns the number is the program's, even when it is a zombie.
        _, status = os.waitpid(pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _start_grandchild(init: OwnedFd, command: Command, trouble: _Trouble, answer: socket.socket) -> NoReturn:
    # Its parent, this process, ends at once, and the node's init adopts it.
    pid = os.fork()
    if pid == 0:
        os.setsid()
        trouble.end_with(lambda: _become(init, command))
    with OwnedFd(os.pidfd_open(pid)) as held:
        socket.send_fds(answer, [_INT.pack(pid)], [held.number])
    os._exit(0)


def _become(init: OwnedFd, command: Command) -> NoReturn:
    ns.setns(init.number, machine.NAMESPACES)
    try:
        os.chdir(command.cwd)
    except OSError as error:
        raise RequestError(f"no directory {command.cwd} in the node: {error.strerror}") from error
    _set_streams(command)
    for number in _RESET:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    env = dict(os.environ if command.env is None else command.env)
    # A program must not hold what its starter held. Marked, not closed: the trouble pipe is among them.
    abi.syscall("close_range", 3, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC)
    try:
        os.execvpe(command.argv[0], command.argv, env)
    except OSError as error:
        # Its own file name is the last place in PATH that was tried.
        raise OSError(error.errno, error.strerror, command.argv[0]) from None


def _set_streams(command: Command) -> None:
    """Put the three streams at 0, 1 and 2. Paths are opened here, in the node."""
    wanted = (command.stdin, command.stdout, command.stderr)
    opened: list[int] = []
    for number, stream in enumerate(wanted):
        if isinstance(stream, int):
            fd = stream
        elif number == 0:
            fd = os.open(stream or "/dev/null", os.O_RDONLY)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if stream else os.O_WRONLY
            fd = os.open(stream or "/dev/null", flags, 0o644)
        # Far above the standard numbers, so that no dup2 below covers one still needed.
        opened.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10))
    for number, fd in enumerate(opened):
        os.dup2(fd, number)


def _held(node: NodeRecord) -> OwnedFd:
    held = node.init.hold()
    if held is None:
        raise DestinationError(f"node {node.name} is down", remedy="godwit lab status")
    return held


def _pid_of(held: OwnedFd) -> Pid:
    for line in Path(f"/proc/self/fdinfo/{held.number}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Pid":
            return Pid(int(value))
    raise AssertionError("a pidfd's fdinfo has no Pid")


class _Trouble:
    """A pipe on which a child says why it could not become the program. Exec closes it: no news is good."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._read)
        if self._write >= 0:
            os.close(self._write)

    def end_with(self, work: Callable[[], NoReturn]) -> NoReturn:
        """In the child: do `work`, which does not return, and report what it raised."""
        status = 127
        try:
            work()
        except RequestError as error:
            self._say(0, error.message)
        except OSError as error:
            self._say(error.errno or errno.EIO, str(error.filename or error.strerror))
            status = 127 if error.errno == errno.ENOENT else 126
        finally:
            os._exit(status)

    def _say(self, number: int, text: str) -> None:
        os.write(self._write, _INT.pack(number) + text.encode(errors="replace")[:4000])

    def check(self) -> None:
        """In the parent: wait until every child has executed or given up, and raise what was said."""
        os.close(self._write)
        self._write = -1
        said = os.read(self._read, 4096)
        if not said:
            return
        (number,) = _INT.unpack_from(said)
        text = said[_INT.size :].decode()
        if number == 0:
            raise RequestError(text)
        raise OSError(number, os.strerror(number), text)
