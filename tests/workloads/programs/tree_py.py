"""Five processes in two sessions, a group whose leader is gone, and two dead children that nobody has buried.

root ─┬─ plain            the root's group
      ├─ orphaned         in a group whose leader has died and was reaped
      ├─ session ── inner a session of their own
      ├─ (exited with 37, a zombie)
      └─ (killed by SIGTERM, a zombie)
"""

from __future__ import annotations

import os
import select
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from life import BadError, Life, check, conclude, nap

ANSWER_WITHIN_S = 60.0
ZOMBIE_STATUS = 37


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process of the tree, and the pipes on which it answers who it is."""

    name: str
    pid: int
    parent: int
    group: int
    session: int
    ask: int
    answer: int


def identity() -> str:
    """Who I am, by system calls."""
    return f"{os.getpid()} {os.getppid()} {os.getpgrp()} {os.getsid(0)}"


def mine(words: str) -> list[str]:
    """An identity without the parent."""
    pid, _parent, group, session = words.split()
    return [pid, group, session]


def serve(questions: int, answers: int) -> int:
    """Answer each number with it and my identity; return how many there were, modulo 64."""
    count = 0
    while question := os.read(questions, 16):
        count += 1
        os.write(answers, question.strip() + b" " + identity().encode() + b"\n")
    return count % 64


def keep_only(*descriptors: int) -> None:
    """Close all else: a pipe ends for its reader when the last copy of its other end is closed."""
    for descriptor in range(3, 256):
        if descriptor not in descriptors:
            try:
                os.close(descriptor)
            except OSError:
                continue


def spawn() -> tuple[int, int, int]:
    """Fork a member that serves. Returns pid, ask, answer."""
    ask_out, ask_in = os.pipe()
    answer_out, answer_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        keep_only(ask_out, answer_in)
        os._exit(serve(ask_out, answer_in))
    os.close(ask_out)
    os.close(answer_in)
    return pid, ask_in, answer_out


def spawn_orphaned() -> Member:
    """A member of a group whose leader has died."""
    ready_out, ready_in = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        os.read(ready_out, 1)
        os._exit(0)
    os.setpgid(leader, leader)
    pid, ask, answer = spawn()
    os.setpgid(pid, leader)
    os.write(ready_in, b"x")
    check(os.waitpid(leader, 0) == (leader, 0), "the leader of the group ended badly")
    os.close(ready_out)
    os.close(ready_in)
    return Member(
        name="orphaned",
        pid=pid,
        parent=os.getpid(),
        group=leader,
        session=os.getsid(0),
        ask=ask,
        answer=answer,
    )


def spawn_session() -> tuple[Member, Member]:
    """A member with a session of its own, and its child, whom we talk to directly."""
    ask_out, ask_in = os.pipe()
    answer_out, answer_in = os.pipe()
    inner_ask_out, inner_ask_in = os.pipe()
    inner_answer_out, inner_answer_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        inner = os.fork()
        if inner == 0:
            keep_only(inner_ask_out, inner_answer_in)
            os._exit(serve(inner_ask_out, inner_answer_in))
        os.write(answer_in, b"%d\n" % inner)
        keep_only(ask_out, answer_in)
        count = serve(ask_out, answer_in)
        _, status = os.waitpid(inner, 0)
        # The child was asked as often: both counts agree, or this status does not.
        os._exit(count if os.waitstatus_to_exitcode(status) == count else 99)
    for descriptor in (ask_out, answer_in, inner_ask_out, inner_answer_in):
        os.close(descriptor)
    inner = int(os.read(answer_out, 32))
    outer = Member(
        name="session", pid=pid, parent=os.getpid(), group=pid, session=pid, ask=ask_in, answer=answer_out
    )
    return outer, Member(
        name="inner", pid=inner, parent=pid, group=pid, session=pid, ask=inner_ask_in, answer=inner_answer_out
    )


def state_of(pid: int) -> list[str]:
    """State, parent, group and session of a process, from proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:4]


def spawn_zombies() -> tuple[int, int]:
    """Two children that have ended and were not waited for."""
    exited = os.fork()
    if exited == 0:
        os._exit(ZOMBIE_STATUS)
    killed = os.fork()
    if killed == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while True:
            signal.pause()
    os.kill(killed, signal.SIGTERM)
    for pid in (exited, killed):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return exited, killed


def verify(member: Member, number: int) -> None:
    """Raise unless the member answers, and is who it was, in its own eyes and in ours."""
    os.write(member.ask, b"%d\n" % number)
    ready, _, _ = select.select([member.answer], [], [], ANSWER_WITHIN_S)
    check(bool(ready), f"{member.name} does not answer")
    found = os.read(member.answer, 200).decode().strip()
    wanted = f"{number} {member.pid} {member.parent} {member.group} {member.session}"
    check(found == wanted, f"{member.name} says {found!r}, not {wanted!r}")
    check(os.getpgid(member.pid) == member.group, f"{member.name} is in group {os.getpgid(member.pid)}")
    check(os.getsid(member.pid) == member.session, f"{member.name} is in session {os.getsid(member.pid)}")
    seen = state_of(member.pid)[1:]
    check(
        seen == [str(member.parent), str(member.group), str(member.session)],
        f"{member.name} has {seen} in proc",
    )


def bury(members: list[Member], zombies: tuple[int, int], number: int) -> None:
    """Reap everyone; each has a status that only it can have."""
    pid, status = os.waitpid(zombies[0], 0)
    check(
        (pid, os.waitstatus_to_exitcode(status)) == (zombies[0], ZOMBIE_STATUS),
        f"the zombie left status {status}",
    )
    pid, status = os.waitpid(zombies[1], 0)
    check((pid, status) == (zombies[1], signal.SIGTERM), f"the killed zombie left status {status}")
    inner_first = sorted(members, key=lambda member: member.name != "inner")
    for member in inner_first:
        os.close(member.ask)
    for member in inner_first:
        if member.parent == os.getpid():
            pid, status = os.waitpid(member.pid, 0)
            check(
                status == (number % 64) << 8,
                f"{member.name} left status {status:#x} after {number} questions",
            )
    try:
        raise BadError(f"a child more than there should be: {os.wait()}")
    except ChildProcessError:
        return


def work(life: Life) -> str:
    """Ask everyone who they are until told to stop, then reap them."""
    me = identity()
    pid, ask, answer = spawn()
    plain = Member(
        name="plain",
        pid=pid,
        parent=os.getpid(),
        group=os.getpgrp(),
        session=os.getsid(0),
        ask=ask,
        answer=answer,
    )
    orphaned = spawn_orphaned()
    members = [plain, orphaned, *spawn_session()]
    zombies = spawn_zombies()
    number = 0
    while not life.stopping():
        number += 1
        for member in members:
            verify(member, number)
        for zombie in zombies:
            state = state_of(zombie)
            check(
                state == ["Z", str(os.getpid()), str(os.getpgrp()), str(os.getsid(0))],
                f"the zombie is {state}",
            )
        # Our own parent may be another one after a move; our names may not.
        check(mine(identity()) == mine(me), f"I was {me}, am {identity()}")
        life.alive()
        nap(0.01)
    bury(members, zombies, number)
    return f"{number} rounds"


if __name__ == "__main__":
    conclude(Life(sys.argv[1]), work)
