"""Programs that are killed in the very moment in which they begin to run at the destination."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.errors import DestinationError
from godwit.lab.cluster import Lab, Node
from tests.conftest import requires
from tests.journey.live import STRATEGIES, Live
from tests.journey.transfer import QUIET_TIMEOUT_S, command, complaint
from tests.workloads.driver import wait_until

pytestmark = requires("root")

TIMES = 6  # the moment is short
PROGRAMS = {"writer_c": ("mib=16", "rate=50"), "spaces_c": ("rate=0", "sparse_gib=1")}


@pytest.fixture
def live(lab: Lab, shared: Path) -> Iterator[Live]:
    """Moves in the laboratory, with words of the test's choice."""
    transfer = Live(shared, lab)
    yield transfer
    transfer.close()


def copies(node: Node, name: str) -> list[int]:
    """List a node's processes that run the program, stopped ones too."""
    return [pid for pid in node.pids() if f"/{name}-" in command(node.path(f"proc/{pid}"))]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_killed_on_arrival_ends_the_move(live: Live, name: str, strategy: str) -> None:
    destination = live.lab.node("b")
    for _ in range(TIMES):
        program = live.start(name, PROGRAMS[name])
        with live.begin(program, "b", *STRATEGIES[strategy]) as watched:
            watched.wait_for("committing")
            assert wait_until(lambda: bool(copies(destination, name)), QUIET_TIMEOUT_S)
            destination.run(["kill", "-KILL", *map(str, copies(destination, name))])
            done = watched.finish(QUIET_TIMEOUT_S)
        # It may have died a moment before the decision: then it lives where it was.
        if done.returncode == DestinationError.exit_status:
            assert "was killed before it ran" in done.stderr, complaint(done)
            live.expect_undone(program, "b")
            live.lab.node("a").run(["kill", "-KILL", str(program.pid)])
        else:
            assert done.returncode == 0, complaint(done)
        for node in live.lab.nodes:
            live.expect_nothing(node)
