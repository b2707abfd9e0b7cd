"""Whatever happens at whatever step, with every strategy: one copy lives, and nothing else is left.

See `disasters`; `docs/reliability.md` is made from the same cases.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from godwit.engine.ranges import RangeSet
from godwit.migrate.channel import Channel
from godwit.migrate.draining import left_of
from godwit.migrate.pageserver import CopyLostError, PageServer
from godwit.migrate.timeline import DISABLED
from godwit.types import Pid
from tests.conftest import requires
from tests.kernel import counting as tools
from tests.kernel import disasters
from tests.kernel.counting import Pair
from tests.kernel.harm import Case

pytestmark = [requires("root", "command:cc")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.compiled(tmp_path_factory.mktemp("counter"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.make(tmp_path_factory.mktemp("pair"))


EVERYDAY = disasters.covering()


@pytest.mark.parametrize("case", EVERYDAY, ids=lambda case: case.name)
def test_one_copy_survives(case: Case, program: Path, authority: Pair, tmp_path: Path) -> None:
    disasters.suffer(case, program, disasters.machines(authority, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in disasters.cases() if case not in EVERYDAY], ids=lambda case: case.name
)
def test_one_copy_survives_everything(case: Case, program: Path, authority: Pair, tmp_path: Path) -> None:
    disasters.suffer(case, program, disasters.machines(authority, tmp_path), tmp_path)


class Silence:
    """The end of a line on which nobody says anything."""

    def write(self, _: bytes | bytearray | memoryview) -> None:
        raise AssertionError("a dead copy has nothing to say")

    def fill(self, _: memoryview) -> int:
        return 0

    def linger(self) -> None:
        pass

    def has_word(self) -> bool:
        return False

    def fileno(self) -> int:
        return -1

    def cut(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_killed_copy_is_not_taken_for_one_without_pages() -> None:
    """Nor for a broken line, after which the source would come back for ever."""
    copy = subprocess.Popen(["sleep", "60"])
    with copy:
        os.kill(copy.pid, signal.SIGSTOP)
        left = left_of([Pid(copy.pid)])
        left[0].ranges = RangeSet([(0x10000, 0x20000)])
        copy.kill()
        copy.wait()
    server = PageServer(Channel(Silence()), left, bytearray(1 << 16), lambda _: None, DISABLED)
    with contextlib.closing(left[0].table), pytest.raises(CopyLostError):
        server.serve()
