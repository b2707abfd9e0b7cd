"""Measure, print, and write `build/bench.json` and `docs/benchmarks.md`: `python -m bench`.

With --quick or --only the results go to `build/bench-part.json` and `build/bench-part.md` instead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bench import cases, criu, limits, live, page, plot, redis, tracked
from bench.live import Sizes
from bench.numbers import GIB, KIB, MIB, Growth, Missing, Result
from bench.place import BUILD, ROOT, Place
from godwit.errors import GodwitError

_WARM_BYTES = 4 * GIB  # what the two copies of a large program need, and what lies between them
_RESIDENT_MIB = (4, KIB)
_GROWTHS = "growth"

Rows = Iterator[Result | Missing]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=11, help="of each small case (default: %(default)s)")
    parser.add_argument("--large-runs", type=int, help="of 1 GiB cases (default: 7, or RUNS if less)")
    parser.add_argument(
        "--huge-runs", type=int, help="of 8 GiB cases, 0: none (default: 3, none if RUNS is 1)"
    )
    parser.add_argument("--quick", action="store_true", help="every case once, without the 8 GiB one")
    parser.add_argument("--only", nargs="+", choices=[*_parts(), _GROWTHS], help="measure these parts")
    parser.add_argument("--large-mib", type=int, default=KIB, help=argparse.SUPPRESS)
    parser.add_argument("--huge-mib", type=int, default=8 * KIB, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--page", type=Path, help="where the page goes; its plot goes beside it")
    options = parser.parse_args()
    if options.quick:
        options.runs = 1
    if options.large_runs is None:
        options.large_runs = min(7, options.runs)
    if options.huge_runs is None:
        options.huge_runs = 3 if options.runs > 1 else 0
    part = options.runs == 1 or options.only is not None
    options.json = options.json or ROOT / "build" / ("bench-part.json" if part else "bench.json")
    options.page = options.page or ROOT / ("build/bench-part.md" if part else "docs/benchmarks.md")
    return options


def _parts() -> dict[str, Callable[[Place, Sizes], Rows]]:
    """Return what is measured, in this order."""
    return {
        "command": _command,
        "live": live.freezes,
        "large": live.large,
        "fault": live.faults,
        "tracked": _tracked,
        "redis": redis.moved,
        "criu": _criu,
        "stopcopy": _stopcopy,
        "resident": _resident,
    }


def _command(place: Place, sizes: Sizes) -> Rows:
    yield from cases.command_line(max(sizes.runs, 5))
    yield from cases.small_limits(place, sizes.large_runs)


def _tracked(place: Place, sizes: Sizes) -> Rows:  # noqa: ARG001  # on this machine, without a laboratory
    yield from tracked.slowdown(sizes.runs)


def _criu(place: Place, sizes: Sizes) -> Rows:  # noqa: ARG001  # the same
    yield from criu.rows(sizes)


def _stopcopy(place: Place, sizes: Sizes) -> Rows:
    yield from cases.small(place, sizes.runs * 3)
    yield from cases.numpy(place, sizes.runs)
    yield from cases.gibibyte(place, sizes.large_runs)


def _resident(place: Place, sizes: Sizes) -> Rows:
    for mib in _RESIDENT_MIB:
        yield from cases.resident(place, mib, sizes.large_runs)


def _results(place: Place, options: argparse.Namespace) -> Rows:
    sizes = Sizes(
        runs=options.runs,
        large_runs=options.large_runs,
        huge_runs=options.huge_runs,
        large_mib=options.large_mib,
        huge_mib=options.huge_mib,
    )
    for name, measure in _parts().items():
        if options.only and name not in options.only:
            continue
        started = time.monotonic()
        try:
            yield from measure(place, sizes)
        except (GodwitError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            # The other parts took long, too: they are worth having.
            yield Missing(name=f"the rest of `{name}`", why=f"it failed: {error}", failed=True)
        _say(f"-- {name}: {time.monotonic() - started:.0f} s")


def _growths(place: Place, options: argparse.Namespace) -> Iterator[Growth]:
    if options.only and _GROWTHS not in options.only:
        return
    for axis in cases.AXES:
        _say(f"{axis.name}: {' '.join(map(str, axis.counts))}")
        yield cases.grows(place, axis, max(7, options.runs // 2) if options.runs > 1 else 1)


def _told(rows: Rows) -> Rows:
    for each in rows:
        if isinstance(each, Missing):
            _say(f"{each.name}: not measured: {each.why}")
        else:
            asked = "" if each.target is None else f"  (≤ {each.target.limit:.4g})"
            _say(f"{each.name}: {each.sample.median:.2f} {each.sample.unit}{asked}")
        yield each


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Measure everything. A missed target is a line in the report, what could not be measured a failure."""
    options = _options()
    load_before = os.getloadavg()[0]
    BUILD.mkdir(parents=True, exist_ok=True)
    limits.warm(_WARM_BYTES if options.huge_runs == 0 else 2 * options.huge_mib * MIB + GIB)
    with Place.open() as place:
        rows = list(_told(_results(place, options)))
        growths = tuple(_growths(place, options))
    results = tuple(each for each in rows if isinstance(each, Result))
    missing = tuple(each for each in rows if isinstance(each, Missing))
    found = page.Page(machine=page.machine(load_before), results=results, growths=growths, missing=missing)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    picture = options.page.with_suffix(".svg")
    picture.write_text(plot.draw(results) + "\n", encoding="utf-8")
    text = page.text(found, picture.name)
    options.page.write_text(text, encoding="utf-8")
    print(text)
    return 1 if any(each.failed for each in missing) else 0


if __name__ == "__main__":
    sys.exit(main())
