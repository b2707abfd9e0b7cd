"""Measure, print, and write `build/bench.json` and `docs/benchmarks.md`: `python -m bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench import cases, limits, page
from bench.numbers import GIB, KIB, Growth, Result
from bench.place import ROOT, Place

_WARM_BYTES = 6 * GIB
_RESIDENT_MIB = (4, KIB, 4 * KIB)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=11, help="of each small case (default: %(default)s)")
    parser.add_argument("--large-runs", type=int, default=7, help="of 1 GiB cases (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    return parser.parse_args()


def _results(place: Place, runs: int, large_runs: int) -> Iterator[Result]:
    yield from cases.command_line(max(runs, 15))
    yield from cases.small_limits(place, large_runs)
    yield from cases.small(place, runs * 3)
    yield from cases.numpy(place, runs)
    yield from cases.gibibyte(place, large_runs)
    for mib in _RESIDENT_MIB:
        if cases.fits(mib):
            yield from cases.resident(place, mib, 3 if mib > KIB else large_runs)


def _growths(place: Place, runs: int) -> Iterator[Growth]:
    for axis in cases.AXES:
        _say(f"{axis.name}: {' '.join(map(str, axis.counts))}")
        yield cases.grows(place, axis, runs)


def _told(results: Iterator[Result]) -> Iterator[Result]:
    for each in results:
        _say(f"{each.name}: {each.sample.median:.2f} {each.sample.unit}")
        yield each


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Measure everything. A missed target is a line in the report, not a failure."""
    options = _options()
    load_before = os.getloadavg()[0]
    limits.warm(_WARM_BYTES)
    with Place.open() as place:
        results = tuple(_told(_results(place, options.runs, options.large_runs)))
        growths = tuple(_growths(place, max(7, options.runs // 2)))
    found = page.Page(machine=page.machine(load_before), results=results, growths=growths)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    text = page.text(found)
    options.page.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
