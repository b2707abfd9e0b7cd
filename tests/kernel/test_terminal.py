"""A terminal over a link: programs at the host, a user at home who types, resizes and stops them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.linux import tty
from godwit.linux.tty import Termios, WinSize
from godwit.residual import terminal
from godwit.residual.terminal import HomeTerminal, HostTerminal, TerminalLine, TerminalSettings
from godwit.types import OwnedFd, Pid
from tests.conftest import requires
from tests.kernel.keepers import Keepers, wait_until

CHANNEL = 3
STREAM = 1
SIZE = WinSize(ws_row=24, ws_col=80)

# The restore agent of the terminal's docstring: leads the session, and tells what becomes of the program.
AGENT = """
import fcntl, os, signal, sys, termios
report, argv = int(sys.argv[1]), sys.argv[2:]
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.close(report)
    os.execvp(argv[0], argv)
os.write(report, b"pid %d\\n" % child)
while True:
    _, status = os.waitpid(child, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        break
    os.write(report, b"stopped %d\\n" % os.WSTOPSIG(status))
os.write(report, b"ended %d\\n" % os.waitstatus_to_exitcode(status))
"""

# A process of the user's session, in the foreground: what the deputy is. At SIGUSR1 it puts another group
# there, as a shell does with a job, and at SIGUSR2 its own again.
DEPUTY = """
import fcntl, os, signal, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = 0
def give(*_):
    global job
    job = os.fork()
    if job == 0:
        os.execvp("sleep", ["sleep", "1000"])
    os.setpgid(job, job)
    os.tcsetpgrp(0, job)
def take(*_):
    os.tcsetpgrp(0, os.getpgrp())
    os.kill(job, signal.SIGKILL)
    os.waitpid(job, 0)
signal.signal(signal.SIGUSR1, give)
signal.signal(signal.SIGUSR2, take)
os.write(1, b"ready")
os.close(1)
while True:
    signal.pause()
"""


class Desk:
    """A user's terminal at home, and a program that runs on it at the host."""

    def __init__(self, tmp_path: Path, argv: list[str], environ: dict[str, str] | None = None) -> None:
        self.saved = tmp_path / "terminal"
        self.keepers = Keepers()
        self.user, slave = tty.open_pair()
        tty.set_size(slave.number, SIZE)
        self.before = tty.get_attributes(slave.number)
        self.slave = slave
        self.deputy = start([sys.executable, "-c", DEPUTY], slave)
        self.stops: list[int] = []
        settings: TerminalSettings = terminal.read_settings(slave.number)
        master, program_slave = terminal.open_terminal(settings)
        self.host = HostTerminal(self._line(self.keepers.host), master, self._continue)
        self.home = HomeTerminal(
            self._line(self.keepers.home),
            OwnedFd(os.dup(slave.number)),
            Pid(self.deputy.pid),
            self.saved,
            self.stops.append,
        )
        self.keepers.start({CHANNEL: self.home.handler}, {CHANNEL: self.host.handler})
        read, write = os.pipe()
        self.agent = subprocess.Popen(
            [sys.executable, "-c", AGENT, str(write), *argv],
            stdin=program_slave.number,
            stdout=program_slave.number,
            stderr=program_slave.number,
            pass_fds=[write],
            env={**os.environ, "TERM": "xterm", **(environ or {})},
        )
        os.close(write)
        program_slave.close()
        self.reports: list[str] = []
        self._reader = threading.Thread(target=self._read_reports, args=(read,), daemon=True)
        self._reader.start()
        self.screen = b""
        wait_until(lambda: bool(self.reports))
        self.program = int(self.reports[0].split()[1])

    def _line(self, keeper: object) -> TerminalLine:
        return TerminalLine(
            link=keeper.link,  # type: ignore[attr-defined]
            channel=CHANNEL,
            streams=keeper.streams,  # type: ignore[attr-defined]
            stream_id=STREAM,
        )

    def _read_reports(self, fd: int) -> None:
        with os.fdopen(fd) as file:
            for text in file:
                self.reports.append(text.strip())
                word, number = text.split()
                if word == "stopped":
                    self.host.stopped(int(number))

    def _continue(self) -> None:
        os.killpg(self.program, signal.SIGCONT)

    def type(self, data: bytes) -> None:
        os.write(self.user.number, data)

    def see(self, text: bytes, deadline_s: float = 20) -> bytes:
        """Wait until a text is on the screen; return what was there up to its end, and forget that."""
        end_s = time.monotonic() + deadline_s
        poll = select.poll()
        poll.register(self.user.number, select.POLLIN)
        while text not in self.screen:
            assert time.monotonic() < end_s, f"not seen: {text!r}; only {self.screen!r}"
            if poll.poll(100):
                self.screen += os.read(self.user.number, 65536)
        at = self.screen.index(text) + len(text)
        seen, self.screen = self.screen[:at], self.screen[at:]
        return seen

    def attributes(self) -> Termios:
        return tty.get_attributes(self.slave.number)

    def close(self) -> None:
        self.home.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.program, signal.SIGKILL)
        self.agent.kill()
        self.agent.wait()
        self._reader.join()
        self.deputy.kill()
        self.deputy.wait()
        self.host.close()
        self.keepers.__exit__()
        self.slave.close()
        self.user.close()


def start(argv: list[str], slave: OwnedFd) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(argv, stdin=slave.number, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.read(5) == b"ready"
    child.stdout.close()
    return child


@contextlib.contextmanager
def desk(tmp_path: Path, *argv: str, **environ: str) -> Iterator[Desk]:
    made = Desk(tmp_path, list(argv), environ)
    try:
        yield made
    finally:
        made.close()


def bash(tmp_path: Path) -> contextlib.AbstractContextManager[Desk]:
    plain = tmp_path / "inputrc"
    plain.write_text("set enable-bracketed-paste off\n")
    environ = {"PS1": "ready> ", "HISTFILE": "/dev/null", "INPUTRC": str(plain)}
    return desk(tmp_path, "bash", "--norc", "--noprofile", "-i", **environ)


def test_a_shell_echoes_edits_and_ends_at_control_d(tmp_path: Path) -> None:
    with bash(tmp_path) as user:
        user.see(b"ready> ")
        user.type(b"echo $((6*7))\r")
        user.see(b"\r\n42\r\n")
        user.type(b"ehco\x1b[D\x1b[D\x7fc\x7f\x1b[3~hc\x01\x0becho done\r")
        user.see(b"\r\ndone\r\n")
        user.type(b"\x04")
        wait_until(lambda: user.reports[-1] == "ended 0")
    assert user.reports[-1] == "ended 0"


def test_control_c_interrupts_what_runs_there(tmp_path: Path) -> None:
    with bash(tmp_path) as user:
        user.see(b"ready> ")
        user.type(b"sleep 1000\r")
        user.see(b"sleep 1000\r\n")
        wait_until(lambda: b"sleep" in Path(f"/proc/{foreground(user)}/comm").read_bytes())
        user.type(b"\x03")
        user.see(b"ready> ")
        user.type(b"echo $?\r")
        user.see(b"\r\n130\r\n")


def foreground(user: Desk) -> int:
    return int(Path(f"/proc/{user.program}/stat").read_text().rpartition(") ")[2].split()[5])


def test_the_terminal_is_raw_only_while_the_deputy_is_in_the_foreground(tmp_path: Path) -> None:
    with desk(tmp_path, "cat") as user:
        assert not user.attributes().c_lflag & termios.ICANON
        assert user.saved.exists()
        assert os.get_blocking(user.slave.number)
        os.kill(user.deputy.pid, signal.SIGUSR1)
        wait_until(lambda: bool(user.attributes().c_lflag & termios.ICANON))
        assert user.attributes() == user.before
        assert not user.saved.exists()
        os.kill(user.deputy.pid, signal.SIGUSR2)
        wait_until(lambda: not user.attributes().c_lflag & termios.ICANON)


def test_control_z_stops_the_program_and_it_can_be_continued(tmp_path: Path) -> None:
    with desk(tmp_path, "cat") as user:
        user.type(b"one\r")
        user.see(b"one\r\none\r\n")
        user.type(b"\x1a")
        wait_until(lambda: user.stops == [signal.SIGTSTP])
        assert user.attributes() == user.before
        assert not user.saved.exists()
        user.home.continued()
        assert not user.attributes().c_lflag & termios.ICANON
        user.type(b"two\r")
        user.see(b"two\r\ntwo\r\n")
        user.type(b"\x04")
        wait_until(lambda: user.reports[-1] == "ended 0")


def test_what_is_typed_while_the_program_is_stopped_is_left_to_others(tmp_path: Path) -> None:
    with desk(tmp_path, "cat") as user:
        user.type(b"\x1a")
        wait_until(lambda: bool(user.stops))
        user.type(b"for the shell\r")
        poll = select.poll()
        poll.register(user.slave.number, select.POLLIN)
        assert poll.poll(5000)
        assert os.read(user.slave.number, 100) == b"for the shell\n"


def test_the_window_size_and_the_settings_are_those_of_the_user(tmp_path: Path) -> None:
    with bash(tmp_path) as user:
        user.see(b"ready> ")
        user.type(b"stty size\r")
        user.see(b"\r\n24 80\r\n")
        user.see(b"ready> ")
        user.type(b"trap 'echo changed $(stty size)' WINCH; while :; do read -t 0.1 x; done\r")
        tty.set_size(user.user.number, WinSize(ws_row=50, ws_col=132))
        user.see(b"changed 50 132")
        user.type(b"\x03")


@requires("command:vim")
def test_a_file_is_edited_in_vim(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("first\n")
    with desk(tmp_path, "vim", "-u", "NONE", "-n", "--cmd", "set shortmess+=F", str(file)) as user:
        user.see(b"first")
        user.type(b"Gosecond\x1b")
        user.type(b":wq\r")
        wait_until(lambda: user.reports[-1] == "ended 0")
    assert file.read_text() == "first\nsecond\n"


@requires("command:less")
def test_less_shows_a_page_as_long_as_the_window(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("".join(f"line-{number}.\n" for number in range(1000)))
    with desk(tmp_path, "less", str(file)) as user:
        user.see(b"line-22.")
        user.type(b" ")
        user.see(b"line-45.")
        user.type(b"q")
        wait_until(lambda: user.reports[-1] == "ended 0")


def test_readline_of_python_completes(tmp_path: Path) -> None:
    with desk(tmp_path, sys.executable, "-i", "-q", "-S") as user:
        user.see(b">>> ")
        user.type(b"print(6 *\x1b[D\x1b[C 7)\r")
        user.see(b"\r\n42\r\n")
        user.type(b"\x04")
        wait_until(lambda: user.reports[-1] == "ended 0")


def test_much_output_arrives_whole_over_connections_that_break(tmp_path: Path) -> None:
    with desk(tmp_path, "seq", "1", "60000") as user:
        user.keepers._break_after_bytes = 20_000
        seen = user.see(b"\r\n60000\r\n", 60)
    assert seen == b"".join(b"%d\r\n" % number for number in range(1, 60001))


def test_a_terminal_left_raw_by_a_keeper_that_died_is_repaired(tmp_path: Path) -> None:
    user, slave = tty.open_pair()
    before = tty.get_attributes(slave.number)
    deputy = start([sys.executable, "-c", DEPUTY], slave)
    saved = tmp_path / "terminal"
    keepers = Keepers()
    line = TerminalLine(
        link=keepers.home.link, channel=CHANNEL, streams=keepers.home.streams, stream_id=STREAM
    )
    home = HomeTerminal(line, OwnedFd(os.dup(slave.number)), Pid(deputy.pid), saved, lambda _: None)
    assert tty.get_attributes(slave.number) == tty.raw(before)
    note = saved.read_bytes()
    home.close()
    tty.set_attributes(slave.number, tty.raw(before))
    saved.write_bytes(note)
    terminal.repair(saved)
    assert tty.get_attributes(slave.number) == before
    assert not saved.exists()
    terminal.repair(saved)
    deputy.kill()
    deputy.wait()
    keepers.home.close()
    keepers.host.close()
    slave.close()
    user.close()


@pytest.mark.parametrize("said", [b"", b"\x02\x00", b"\x02\x7f", b"\x01" + bytes(8), b"\x03"])
def test_a_message_that_home_must_not_get_is_refused(tmp_path: Path, said: bytes) -> None:
    with desk(tmp_path, "cat") as user, pytest.raises(Exception, match="about a terminal"):
        user.home.handler(memoryview(said))
