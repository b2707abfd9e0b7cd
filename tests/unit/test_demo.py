from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from godwit.lab import demo
from godwit.lab.flyer import KINDS, SHAPES, WORKERS, Shape, link
from godwit.lab.proof import Verdict, examine

GOOD = Verdict(lines=200, wrong_blocks=0, child_status=0, pid_changes=0)


def write_log(kind: str, shape: Shape, lines: int = 200) -> list[bytes]:
    """The log as the program writes it, from real words."""
    words = [KINDS[kind](shape, worker) for worker in range(WORKERS)]
    chain, log = b"", []
    for number in range(1, lines + 1):
        total = sum(each.rewrite(number % shape.blocks) for each in words) & (1 << 64) - 1
        chain = link(chain, number, total)
        log.append(b"%d %d %d %s\n" % (number, number * 5_000_000, total, chain.hex().encode()))
    return log


@pytest.fixture(scope="module")
def log() -> list[bytes]:
    return write_log("plain", SHAPES["plain"])


@pytest.mark.parametrize("kind", ["plain", "numpy"])
def test_a_good_log_is_proven(kind: str) -> None:
    pytest.importorskip("numpy") if kind == "numpy" else None
    shape = Shape(blocks=8, words=64)
    proof = examine(write_log(kind, shape), shape, GOOD)
    assert (proof.lines, proof.faults) == (200, ())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda log: log[:99] + log[100:], "1 lost"),
        (lambda log: log[:100] + log[99:], "written twice"),
        (lambda log: [*log[:50], log[51], log[50], *log[52:]], "comes 52"),
        (lambda log: log[:-1], "199 good ones"),
        (lambda log: [*log[:-1], log[-1][:-5]], "stands"),
        (lambda log: [*log[:70], log[70].replace(b"71 ", b"71 x", 1), *log[71:]], "stands"),
    ],
)
def test_a_log_with_a_fault_is_not_proven(log: list[bytes], change: object, words: str) -> None:
    assert callable(change)
    faults = examine(change(log), SHAPES["plain"], GOOD).faults
    assert any(words in fault for fault in faults), faults


@pytest.mark.parametrize(("place", "words"), [(2, "threads computed"), (3, "chain of hashes")])
def test_a_wrong_checksum_is_found(log: list[bytes], place: int, words: str) -> None:
    fields = log[120].split()
    fields[place] = b"1" + fields[place][1:] if fields[place][:1] != b"1" else b"2" + fields[place][1:]
    proof = examine([*log[:120], b" ".join(fields) + b"\n", *log[121:]], SHAPES["plain"], GOOD)
    assert len(proof.faults) == 1
    assert "line 121" in proof.faults[0]
    assert words in proof.faults[0]


@pytest.mark.parametrize("bad", [{"wrong_blocks": 1}, {"child_status": -9}, {"pid_changes": 3}])
def test_what_the_program_found_counts(log: list[bytes], bad: dict[str, int]) -> None:
    assert len(examine(log, SHAPES["plain"], replace(GOOD, **bad)).faults) == 1


def test_the_longest_gap_is_found_where_it_is(log: list[bytes]) -> None:
    later = [
        line
        if number < 150
        else line.replace(b" %d " % (number * 5_000_000), b" %d " % (number * 5_000_000 + 10**8))
        for number, line in enumerate(log, start=1)
    ]
    proof = examine(later, SHAPES["plain"], GOOD)
    assert proof.longest_gap() == (105.0, 150)
    assert proof.longest_gap(1, 149)[0] == 5.0
    assert proof.longest_gap(149, 151) == (105.0, 150)
    assert proof.longest_gap(150, 10**6)[0] == 5.0


def test_only_whole_lines_of_a_growing_log_count(tmp_path: Path) -> None:
    tail = demo._Tail(tmp_path / "log")
    assert tail.look() == 0
    with (tmp_path / "log").open("ab", buffering=0) as log:
        log.write(b"1 a\n2 b\n3")
        assert tail.look() == 2
        log.write(b" c")
        assert tail.look() == 2
        log.write(b"\n4 d\n")
        assert tail.look() == 4
