"""The ways of moving, as fixtures."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.lab.cluster import Lab
from tests.journey.transfer import Flown, Local, Podded, Restored, Transfer, Unmoved

LOCAL: dict[str, Callable[[Path], Local]] = {"none": Unmoved, "restore": Restored, "restore in a pod": Podded}
STRATEGIES = (*LOCAL, "migrate")
NODES = ("a", "b", "c")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this machine that is /shared in every node."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def lab(shared: Path) -> Iterator[Lab]:
    """A laboratory for the tests of a module, which clean up behind themselves."""
    with Lab.up(NODES, name=f"journey-{uuid.uuid4().hex[:8]}", shared=shared) as running:
        yield running


@pytest.fixture
def flight(lab: Lab, shared: Path) -> Iterator[Flown]:
    """Moves in the laboratory only."""
    transfer = Flown(shared, lab)
    yield transfer
    transfer.close()


@pytest.fixture(params=STRATEGIES)
def transfer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transfer]:
    """Each way of moving in turn."""
    local = LOCAL.get(request.param)
    if local is None:
        yield request.getfixturevalue("flight")
        return
    found = local(tmp_path)
    yield found
    found.close()
