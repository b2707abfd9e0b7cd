"""The programs that must fly, in full size: around the laboratory once, and away and back ten times."""

from __future__ import annotations

import pytest

from tests.conftest import requires
from tests.journey.transfer import Flown
from tests.workloads.driver import WORKLOADS

pytestmark = requires("root")

PROGRAMS = (
    "static_c",
    "threads_c",
    "numpy_py",
    "node_js",
    "java",
    "go_static",
    "sqlite_py",
    "pipeline_sh",
    "redis",
    "tree_py",
)


def fly(flight: Flown, name: str, route: tuple[str, ...]) -> None:
    reason = WORKLOADS[name].available()
    if reason is not None:
        pytest.skip(reason)
    program = flight.start(name)
    for destination in route:
        flight.move(program, destination)
    assert program.pid > 1
    assert len(program.reports) == len(route)
    flight.finish(program)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_flies_around_the_laboratory(flight: Flown, name: str) -> None:
    fly(flight, name, ("b", "c", "a"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_flies_away_and_back_ten_times(flight: Flown, name: str) -> None:
    fly(flight, name, ("b", "a") * 10)
