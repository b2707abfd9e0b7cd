"""Have everything happen, and write docs/reliability.md: `python -m tests.kernel.reliability` (as root).

With `everyday`: only those that `make test` has happen. With other words: only cases whose names hold one of
them, to be looked at instead of written.
"""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from tests.conftest import SESSION_VARIABLE
from tests.kernel import counting as tools
from tests.kernel import disasters
from tests.kernel.counting import ROOT, Pair
from tests.kernel.disasters import Result
from tests.kernel.harm import Case

PAGE: Final = ROOT / "docs" / "reliability.md"
_HEAD: Final = """\
# Reliability

What became of a program when something went wrong at a step of its move. This page is generated: `python -m
tests.kernel.reliability`, as root, has each of these things happen once and writes it; one that does not
end well ends the run. `make test` has a part of them happen, `make test-slow` all.

The program counts into a file, and goes through {mib} MiB of memory all the time, checking every word. The
process that reaches the step waits there until the fault has happened. Afterwards exactly one copy runs,
the one that the error named, and its memory and file are right; or nobody, where the program itself was
killed. No stopped task, pod, mount, list of pending pages or undecided record is left, and no userfaultfd
in a pod's init.

- *by itself*: when the command had ended, and what was left of the move, everything was settled.
- *godwit recover*: who could have settled it was killed too. Until then the copies stood still; the command
  was given at the source, then at the destination.
- *nobody*, where the other copy was killed with pages that the running one lacked: the error says so, and
  the program, which waits for them, is to be ended.
- *receiver out of addresses*: `RLIMIT_AS` of the receiving process is what it has already. *receiver out of
  memory*: it gets a memory cgroup of 256 KiB, and the kernel kills it. *disk full*: that of the state
  directory, 64 KiB. For these three there is room again after a second.
- *line stalled*: not a byte passes on the lines that there are; later ones work. How long a silence is
  borne was shortened to {patience:.0f} s.

The run that wrote this page had {done} of the {all} cases happen. Steps are those of
`godwit.migrate.faults`, in the order in which they come. A strategy is missing where it does not pass a
step, a fault where what it is about is not there. The time, in seconds, is that of the slowest, from the
program's start until all had been checked.

"""


def rows(results: Iterable[Result]) -> Iterator[str]:
    """Yield a table for each step, strategies that ended alike in one row."""
    for (role, step), at_step in groupby(results, key=lambda each: (each.case.role, each.case.step)):
        yield f"\n## {role}: {step}\n"
        yield "| step | fault | strategy | what survived | settled | time |"
        yield "| --- | --- | --- | --- | --- | --- |"
        alike: dict[tuple[str, str, str], list[Result]] = {}
        for each in at_step:
            alike.setdefault((each.case.fault, each.survived, each.settled), []).append(each)
        for (fault, survived, settled), same in alike.items():
            strategies = ", ".join(each.case.strategy for each in same)
            seconds = max(each.seconds for each in same)
            yield f"| {step} | {fault} | {strategies} | {survived} | {settled} | {seconds:.1f} |"


def page(results: Sequence[Result]) -> str:
    head = _HEAD.format(
        mib=disasters.MIB, patience=disasters.PATIENCE_S, done=len(results), all=len(disasters.cases())
    )
    return head + "\n".join(rows(results)).lstrip("\n") + "\n"


def suffered(cases: Iterable[Case]) -> Iterator[Result]:
    """Have the cases happen one after the other. Raises AssertionError at the first that ends badly."""
    with tempfile.TemporaryDirectory(prefix="godwit-reliability-") as name:
        place = Path(name)
        program = tools.compiled(place)
        authority = Pair.make(place / "pair")
        for case in cases:
            with tempfile.TemporaryDirectory(dir=place) as own:
                here = Path(own)
                try:
                    yield disasters.suffer(case, program, disasters.machines(authority, here), here)
                except AssertionError as error:
                    error.add_note(f"in the case {case.name}")
                    raise


def main(words: list[str]) -> int:
    os.environ[SESSION_VARIABLE] = str(uuid.uuid4())
    if words == ["everyday"]:
        words, wanted = [], disasters.covering()
    else:
        wanted = [case for case in disasters.cases() if not words or any(word in case.name for word in words)]
    results: list[Result] = []
    for result in suffered(wanted):
        results.append(result)
        sys.stderr.write(
            f"{len(results)}/{len(wanted)} {result.case.name}: {result.survived}, {result.settled}\n"
        )
    if words:
        sys.stdout.write(page(results))
    else:
        PAGE.write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
