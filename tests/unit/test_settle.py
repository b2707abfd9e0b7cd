"""What `godwit recover` does at a source, in which order."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from godwit.engine.ranges import Range
from godwit.migrate import draining, journal, settle
from godwit.migrate.entries import AnswerEntry
from godwit.migrate.journal import Member, Record, State
from godwit.wire.frames import FrameKind


class Line:
    """A channel that says what was sent."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def send(self, kind: FrameKind) -> None:
        self._done.append(kind.name)

    def close(self) -> None:
        self._done.append("closed")


def test_the_destination_may_forget_only_when_nothing_lives_here(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    line: Any = Line(done)
    answer = AnswerEntry(state=State.RUNNING, draining=True)
    empty: dict[int, list[Range]] = {}
    monkeypatch.setattr(settle, "ask", lambda *_: answer)
    monkeypatch.setattr(settle, "_signal", lambda *_: done.append("killed"))
    monkeypatch.setattr(draining, "left_of", lambda _: empty)
    monkeypatch.setattr(draining, "drain", lambda *_, **__: (None, line, 0))
    monkeypatch.setattr(journal, "remove", lambda *_: done.append("record removed"))
    member = Member(pid=1 << 30, starttime=1, inner=2, stopped=False)
    record = Record(migration="0" * 32, role="source", state=State.COMMITTED, peer="b", members=(member,))
    settle.source(record, lambda _: line)
    # Killed in between, it would be asked again, and must not be told to resume.
    assert done == ["closed", "killed", "record removed", "END", "closed"]


def test_a_move_that_was_given_up_is_not_remembered_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GODWIT_STATE_DIR", str(tmp_path))
    for name in ("0" * 32, "1" * 32):
        assert journal.decide(name, State.ABORTED) is State.ABORTED
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / f"{'0' * 32}.destination.json", (long_ago, long_ago))
    assert settle.everything(lambda _: pytest.fail("nobody is to be asked")) == ()
    assert [record.migration for record in journal.every()] == ["1" * 32]
