"""A picture of all rows that are held to something: each run, relative to what was asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from bench.numbers import Result, Target
from godwit.cli.svg import Drawing, fitting

_WIDTH: Final = 1200
_LEFT: Final = 470
_RIGHT: Final = 1080
_TOP: Final = 84
_ROW: Final = 20
_DOT: Final = 4
_TICKS: Final = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
_LEAST: Final = 0.05  # of what was asked: below it all looks the same


def draw(results: Sequence[Result]) -> str:
    """Return the picture as SVG."""
    rows = [(each, each.target) for each in results if each.target is not None]
    drawing = Drawing(_WIDTH)
    drawing.text(20, 34, "What was measured, as a multiple of what was asked", "title")
    drawing.text(20, 56, "A dot is a run, the bar their median. Left of the dashed line is met.", "faint")
    highest = max([2.0, *(each.sample.highest / target.limit for each, target in rows)])
    bottom = _TOP + _ROW * len(rows)
    for tick in _TICKS:
        if tick <= highest:
            x = _x(tick, highest)
            drawing.line((x, _TOP - 8), (x, bottom), "mark" if tick == 1 else "grid", "")
            drawing.text(x, _TOP - 12, f"{tick:g}", "faint", "middle")
    for number, (each, target) in enumerate(rows):
        _row(drawing, _TOP + _ROW * number, each, target, highest)
    return drawing.render(bottom + 16, "Benchmarks: measured and asked")


def _row(drawing: Drawing, top: float, each: Result, target: Target, highest: float) -> None:
    middle = top + _ROW / 2
    drawing.text(_LEFT - 12, middle + 4, fitting(each.name, _LEFT - 30), "small", "end")
    kind = "destination" if target.met else "freeze"
    for value in each.sample.values:
        x = _x(value / target.limit, highest)
        drawing.rect(x - _DOT / 2, middle - _DOT / 2, _DOT, _DOT, kind, f"{value:.3g} {each.sample.unit}")
    x = _x(each.sample.median / target.limit, highest)
    drawing.rect(x - 1, top + 3, 2, _ROW - 6, kind)
    words = f"{each.sample.median:.3g} {each.sample.unit}"
    drawing.text(_RIGHT + 12, middle + 4, words, "number")


def _x(ratio: float, highest: float) -> float:
    share = math.log(max(ratio, _LEAST) / _LEAST) / math.log(highest / _LEAST)
    return _LEFT + share * (_RIGHT - _LEFT)
