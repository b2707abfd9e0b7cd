"""Memory that is easily carried wrongly while the program runs, by every strategy."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.procfs import maps
from godwit.types import Pid
from tests.conftest import requires
from tests.kernel import counting as tools
from tests.kernel.counting import Counting, Pair

pytestmark = [requires("root", "command:cc")]

STRATEGIES = ("stopcopy", "precopy", "hybrid", "postcopy")
KINDS = ("zeroed", "wiped", "altstack", "late")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("holdings") / "holdings"
    source = Path(__file__).with_name("holdings.c")
    subprocess.run(["cc", "-O2", "-static", "-o", made, source], check=True, timeout=60)
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.make(tmp_path_factory.mktemp("pair"))


@pytest.fixture(params=KINDS)
def holder(request: pytest.FixtureRequest, program: Path, tmp_path: Path) -> Iterator[tuple[str, Counting]]:
    kind: str = request.param
    marker = f"holding-{uuid.uuid4().hex}"
    log = tmp_path / "log"
    process = subprocess.Popen(
        [program, kind, log, marker],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    found = Counting(process, marker, log)
    try:
        found.wait_for_progress(3)
        yield kind, found
    finally:
        found.end()


def roots(counter: Counting) -> list[int]:
    """Return the copies that are no children of others: a program may fork all the time."""
    copies = counter.copies()
    return [pid for pid in copies if tools.parent_of(pid) not in copies]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_program_finds_what_it_left(strategy: str, holder: tuple[str, Counting], pair: Pair) -> None:
    kind, counter = holder
    with tools.serving(pair.destination) as server:
        if kind == "late":
            os.kill(counter.pid, signal.SIGUSR1)
        outcome = tools.move(counter.pid, server.host, pair.source, GODWIT_TEST_STRATEGY=strategy)
        assert outcome.report is not None, outcome.error
        server.wait_until_idle()
        tools.until(lambda: len(roots(counter)) == 1, "one copy")
        counter.wait_for_progress(20)
        counter.check_log()
        if kind == "late":
            flags = [each.flags for each in maps.read_smaps(Pid(roots(counter)[0])) if "dc" in each.flags]
            assert [("lo" in each) for each in flags] == [True]
