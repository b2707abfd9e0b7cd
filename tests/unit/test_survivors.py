"""Who survives what: the words for it, and what is kept of a move that cannot be settled."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.errors import DestinationError, Survivor
from godwit.migrate import journal, settle, source
from godwit.migrate.channel import Channel, Closed
from godwit.migrate.journal import Member, Record, State
from godwit.procfs import stat
from godwit.types import Pid

MIGRATION = "5" * 32


@pytest.fixture
def living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Member]:
    monkeypatch.setenv("GODWIT_STATE_DIR", str(tmp_path))
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as process:
        try:
            started = stat.read(Pid(process.pid)).starttime
            yield Member(pid=process.pid, starttime=started, inner=7, stopped=False)
        finally:
            process.kill()


def nobody(peer: str) -> Channel:
    raise DestinationError(f"{peer} does not answer")


def recovered(member: Member) -> settle.Recovered:
    journal.write(
        Record(migration=MIGRATION, role="source", state=State.COMMITTED, peer="b", members=(member,))
    )
    (found,) = settle.everything(nobody)
    return found


def test_a_living_copy_stays_undecided_as_long_as_nobody_answers(living: Member) -> None:
    found = recovered(living)
    assert found.outcome.startswith(settle.STILL_UNDECIDED)
    assert found.pid == living.pid
    assert journal.read(MIGRATION, "source") is not None


def test_a_record_of_nobody_who_lives_here_is_told_of_once(living: Member) -> None:
    gone = Member(pid=living.pid, starttime=living.starttime - 1, inner=7, stopped=False)
    found = recovered(gone)
    assert "whether it runs at b is to be seen there" in found.outcome
    assert found.pid == 0
    assert journal.read(MIGRATION, "source") is None
    assert settle.everything(nobody) == ()


@pytest.mark.parametrize("error", [Closed("cut"), FileNotFoundError(2, "no such file")])
def test_before_the_commit_the_source_survives_and_after_it_nobody_is_named(error: OSError) -> None:
    assert source.failed(error, committed=False).survivor is Survivor.SOURCE
    after = source.failed(error, committed=True)
    assert after.survivor is Survivor.UNDECIDED
    assert "godwit recover" in after.remedy
