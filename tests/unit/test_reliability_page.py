"""The page about reliability tells of every step there is, and of everything that happens at one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.migrate.faults import DESTINATION_STEPS, SOURCE_STEPS
from tests.kernel import disasters, harm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


@pytest.mark.parametrize(
    ("role", "steps"),
    [("source", SOURCE_STEPS), ("destination", DESTINATION_STEPS)],
    ids=lambda value: value[:6],
)
def test_every_step_has_its_table(role: str, steps: list[str]) -> None:
    headings = [line.removeprefix("## ") for line in PAGE.read_text().splitlines() if line.startswith("## ")]
    assert [heading for heading in headings if heading.startswith(role)] == [
        f"{role}: {step}" for step in steps
    ]


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Yield role, step, fault and strategy of everything that the page tells of."""
    role = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            role = line.removeprefix("## ").partition(":")[0]
        elif line.startswith("| ") and not line.startswith(("| step |", "| ---")):
            step, fault, strategies = (cell.strip() for cell in line.split("|")[1:4])
            yield from ((role, step, fault, strategy) for strategy in strategies.split(", "))


def test_every_row_is_a_case_and_everyday_cases_have_theirs() -> None:
    told = set(rows())
    assert told <= {(case.role, case.step, case.fault, case.strategy) for case in disasters.cases()}
    assert told >= {(case.role, case.step, case.fault, case.strategy) for case in disasters.covering()}


def test_the_everyday_part_covers_steps_faults_and_strategies() -> None:
    part = disasters.covering()
    assert {(case.role, case.step) for case in part} == set(disasters.STEPS)
    assert {case.fault for case in part} == set(harm.FAULTS)
    assert {case.strategy for case in part} == set(disasters.NEVER) - {"stopcopy"}
