"""What the demonstration's log proves: that no line was lost, doubled, reordered or computed wrongly."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from godwit.lab.flyer import Expectation, Shape, link

_MAX_FAULTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the program itself found at its end."""

    lines: int  # it has written
    wrong_blocks: int  # of its array
    child_status: int
    pid_changes: int  # steps in which its pid was not the one it began with


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The log, looked at line by line. No faults: proven."""

    lines: int
    faults: tuple[str, ...]  # the first of them
    times_ns: Sequence[int]  # of line 1, 2, ...: CLOCK_REALTIME

    def longest_gap(self, first: int = 1, last: int | None = None) -> tuple[float, int]:
        """Return the longest time between two neighbouring lines, in ms, and the number of the later line.

        Args:
            first: Look from this line on.
            last: Up to this line; None is the last.
        """
        end = len(self.times_ns) if last is None else min(last, len(self.times_ns))
        gaps = (
            ((self.times_ns[number - 1] - self.times_ns[number - 2]) / 1e6, number)
            for number in range(max(first, 1) + 1, end + 1)
        )
        return max(gaps, default=(0.0, 0))


def examine(log: Iterable[bytes], shape: Shape, verdict: Verdict) -> Proof:
    """Compare the log and the verdict with what arithmetic says."""
    faults: list[str] = []
    times = array("q")
    expected, chain, wanted = Expectation(shape), b"", 1
    for line in log:
        parsed = _parse(line)
        if parsed is None:
            faults.append(f"after line {wanted - 1} stands {line[:80]!r}")
            continue
        number, time_ns, total, end = parsed
        if number != wanted:
            faults.append(f"after line {wanted - 1} comes {number}: {_kind(number, wanted)}")
            break  # What follows says nothing new: sums and chain are those of another step.
        right = expected.step(number)
        chain = link(chain, number, right)
        if total != right:
            faults.append(f"line {number}: the threads computed {total}, not {right}")
        if end != chain.hex():
            faults.append(f"line {number}: the child's chain of hashes is broken")
        times.append(time_ns)
        wanted += 1
        if len(faults) >= _MAX_FAULTS:
            break
    faults += _of_verdict(verdict, wanted - 1)
    return Proof(lines=wanted - 1, faults=tuple(faults), times_ns=times)


def _kind(number: int, wanted: int) -> str:
    if number > wanted:
        return f"{number - wanted} lost"
    return "written twice" if number == wanted - 1 else "out of order, or written twice"


def _of_verdict(verdict: Verdict, lines: int) -> list[str]:
    found: list[str] = []
    if verdict.lines != lines:
        found.append(f"the program wrote {verdict.lines} lines, the log has {lines} good ones")
    if verdict.wrong_blocks:
        found.append(f"{verdict.wrong_blocks} blocks of the array are wrong")
    if verdict.child_status:
        found.append(f"the child ended with status {verdict.child_status}")
    if verdict.pid_changes:
        found.append("the program saw its pid change")
    return found


def _parse(line: bytes) -> tuple[int, int, int, str] | None:
    words = line.split()
    if len(words) != 4 or not line.endswith(b"\n") or not all(word.isdigit() for word in words[:3]):
        return None
    return int(words[0]), int(words[1]), int(words[2]), words[3].decode(errors="replace")
