"""Programs turned into deputies without a move, and a keeper in a process of its own, which may be killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

from godwit.engine import freeze
from godwit.residual import deputy
from godwit.residual.deputy import Deputy
from godwit.residual.signals import Event, Keeper, Signal
from godwit.types import Pid

DEADLINE_S = 20.0
Told = dict[str, Any]
T = TypeVar("T")


class Program:
    """A running child of the test, and the line it said first."""

    def __init__(self, process: subprocess.Popen[bytes], first: bytes) -> None:
        self.process = process
        self.pid = Pid(process.pid)
        self.first = first.decode()


def until(condition: Callable[[], T | None], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Return what the condition returns, once that is true."""
    deadline = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {deadline_s} s: {what}"
        select.select([], [], [], 0.001)
    return found


def state(pid: int) -> str:
    """Return the letter of a process's state."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(") ")[2][0]


@contextlib.contextmanager
def program(text: str, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Program]:
    """Run a Python program, leader of its own group, until it has printed a line; it is killed at the end."""
    with running([sys.executable, "-c", text, *arguments], env=env) as child:
        yield child


@contextlib.contextmanager
def running(argv: Sequence[str], *, env: dict[str, str] | None = None) -> Iterator[Program]:
    """Do the same for any program."""
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, bufsize=0, env=env, process_group=0)
    try:
        assert child.stdout is not None
        assert select.select([child.stdout], [], [], DEADLINE_S)[0], "it said nothing"
        yield Program(child, child.stdout.readline())
    finally:
        child.kill()
        with contextlib.suppress(ChildProcessError):
            child.wait(DEADLINE_S)
        if child.stdout is not None:
            child.stdout.close()


def packed(known: Deputy) -> Told:
    return {**dataclasses.asdict(known), "cookie": known.cookie.hex()}


def unpacked(told: Told) -> Deputy:
    return Deputy(
        **{
            **told,
            "cookie": bytes.fromhex(told["cookie"]),
            "pid": Pid(told["pid"]),
            "close_on_exec": tuple(told["close_on_exec"]),
        }
    )


def turn_tree(root: int, carried: Sequence[bytes] = ()) -> list[Deputy]:
    """Stop and park a tree and turn every process of it, in this process."""
    tree = freeze.freeze(Pid(root))
    tree.park()
    return [
        deputy.become(list(group.values()), deputy.new_cookie(), carried=carried)
        for group in tree.tracees.values()
    ]


def turned(root: int, work: Callable[[], list[Deputy]] | None = None) -> dict[int, Deputy]:
    """Do the same in a process that ends then; return the deputies by pid."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            found = work() if work else turn_tree(root)
            os.write(writing, json.dumps([packed(each) for each in found]).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001  # told in the test
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as file:
        raw = file.read()
    status = os.waitpid(pid, 0)[1]
    assert status == 0, raw.decode() or f"wait status {status}"
    return {each["pid"]: unpacked(each) for each in json.loads(raw)}


def serve(line: socket.socket) -> None:
    """Be a keeper: do what the lines ask for, and tell what happens."""
    lock = threading.Lock()

    def say(told: Told) -> None:
        with lock:
            line.sendall(json.dumps(told).encode() + b"\n")

    def tell(pid: Pid, event: Event) -> None:
        told: Told = {"pid": pid, "event": type(event).__name__}
        told |= {key: value for key, value in dataclasses.asdict(event).items() if key != "info"}
        if isinstance(event, Signal):
            told |= {"info": event.info.hex(), "signo": event.signo}
        say(told)

    def answered(number: int, future: Future[Any]) -> None:
        error = future.exception()
        result = None if error else future.result()
        if isinstance(result, tuple):
            result = [result[0], [each.hex() for each in result[1]]]
        say(
            {
                "answer": number,
                "result": result,
                "error": type(error).__name__ if error else "",
                "text": str(error),
            }
        )

    keeper = Keeper(tell)
    serving = threading.Thread(target=keeper.run)
    serving.start()
    with line.makefile("rb") as commands:
        for raw in commands:
            asked = json.loads(raw)
            arguments = [bytes.fromhex(a["hex"]) if isinstance(a, dict) else a for a in asked["arguments"]]
            if asked["do"] == "adopt":
                arguments = [unpacked(json.loads(arguments[0]))]
            future = getattr(keeper, asked["do"])(*arguments)
            if asked["number"]:
                future.add_done_callback(lambda done, number=asked["number"]: answered(number, done))
    keeper.stop_running()
    serving.join()
    keeper.close()


class Keeping:
    """A keeper's process as the test sees it, who plays the remote end."""

    def __init__(self, *, confirms: bool = True) -> None:
        self.confirms = confirms
        self.events: list[Told] = []
        self._answers: dict[int, Told] = {}
        self._asked = 0
        self._rest = b""
        near, far = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                near.close()
                serve(far)
                os._exit(0)
            except BaseException:  # noqa: BLE001  # told in the test's output
                traceback.print_exc()
            finally:
                os._exit(1)
        far.close()
        self._line = near
        self.alive = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it as kill -9 does."""
        if self.alive:
            self.alive = False
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._line.close()

    def leave(self) -> None:
        """Let it end in good order."""
        self.alive = False
        self._line.shutdown(socket.SHUT_WR)
        assert os.waitpid(self.pid, 0)[1] == 0
        self._line.close()

    def say(self, do: str, *arguments: object, number: int = 0) -> None:
        """Ask for something without waiting."""
        words = [{"hex": each.hex()} if isinstance(each, bytes) else each for each in arguments]
        line = json.dumps({"do": do, "arguments": words, "number": number}) + "\n"
        self._line.sendall(line.encode())

    def ask(self, do: str, *arguments: object) -> Told:
        """Ask for something and return the answer. Raises AssertionError with what it raised."""
        self._asked += 1
        number = self._asked
        self.say(do, *arguments, number=number)
        answer = self.hear_until(lambda: self._answers.pop(number, None), f"an answer to {do}")
        assert not answer["error"], f"{answer['error']}: {answer['text']}"
        return answer

    def call(self, pid: int, name: str, *arguments: int | bytes) -> tuple[int, list[bytes]]:
        """Have a call made in a deputy."""
        result, buffers = self.ask("call", pid, name, *arguments)["result"]
        return result, [bytes.fromhex(each) for each in buffers]

    def adopt(self, *deputies: Deputy) -> None:
        """Have it take deputies over."""
        for each in deputies:
            self.ask("adopt", json.dumps(packed(each)))

    def hear(self, timeout_s: float) -> bool:
        """Take in what it says; tell whether it said anything."""
        if not select.select([self._line], [], [], timeout_s)[0]:
            return False
        raw = self._line.recv(1 << 16)
        assert raw, "the keeper has ended"
        *lines, self._rest = (self._rest + raw).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "answer" in told:
                self._answers[told["answer"]] = told
                continue
            self.events.append(told)
            if self.confirms and told.get("number"):
                self.say("confirm", told["pid"], told["number"])
        return True

    def hear_until(self, condition: Callable[[], T | None], what: str) -> T:
        """Listen until the condition holds; return what it returned."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not heard in time: {what}; heard {self.events[-5:]}"
            self.hear(0.1)
        return found

    def next(self, kind: str, pid: int | None = None) -> Told:
        """Return the next event of a kind, which is taken out."""

        def found() -> Told | None:
            for each in self.events:
                if each["event"] == kind and pid in (None, each["pid"]):
                    self.events.remove(each)
                    return each
            return None

        return self.hear_until(found, f"{kind} of {pid}")
