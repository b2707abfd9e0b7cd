"""Pictures as SVG text: shapes, words that fit, scales with round numbers. Knows nothing of moves.

Whatever words come from outside are made visible by `printable` and then escaped, so that no name can
end an attribute or break the document. There is no script, and nothing is loaded.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from godwit.cli.output import printable

# Of a sans serif of 11 px; on the wide side, since every reader has another one.
_LETTER_PX: Final = 6.6
_WIDE_PX: Final = 12.0

_LIGHT: Final = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "faint": "#59636e",
    "grid": "#d8dee4",
    "program": "#57606a",
    "source": "#1f6feb",
    "destination": "#1a7f37",
    "faults": "#bc4c00",
    "freeze": "#cf222e",
}
_DARK: Final = {
    "paper": "#0d1117",
    "ink": "#e6edf3",
    "faint": "#9198a1",
    "grid": "#30363d",
    "program": "#8b949e",
    "source": "#4493f8",
    "destination": "#3fb950",
    "faults": "#f0883e",
    "freeze": "#ff7b72",
}


def escaped(words: str) -> str:
    """Return words as they may stand in XML and HTML, also in an attribute."""
    return html.escape(printable(words))


def width_px(words: str) -> float:
    """Return about how wide words are in the small type."""
    return sum(_WIDE_PX if unicodedata.east_asian_width(each) in "WF" else _LETTER_PX for each in words)


def fitting(words: str, room_px: float) -> str:
    """Return the words, cut if they are wider than that; nothing when not even three letters fit."""
    words = printable(words)
    if width_px(words) <= room_px:
        return words
    if room_px < 4 * _LETTER_PX:
        return ""
    kept = words[: int(room_px / _LETTER_PX)]
    while kept and width_px(kept) + _LETTER_PX > room_px:
        kept = kept[:-1]
    return kept + "…"


class Drawing:
    """Shapes in the order in which they are painted."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._parts: list[str] = []

    def rect(self, left: float, top: float, width: float, height: float, kind: str, title: str = "") -> None:
        """Draw a box; `title` is shown to who points at it."""
        shape = f'x="{left:.2f}" y="{top:.2f}" width="{max(width, 0):.2f}" height="{max(height, 0):.2f}"'
        self._shape("rect", f'{shape} class="{kind}"', title)

    def line(self, start: tuple[float, float], end: tuple[float, float], kind: str, title: str = "") -> None:
        """Draw a straight line."""
        shape = f'x1="{start[0]:.2f}" y1="{start[1]:.2f}" x2="{end[0]:.2f}" y2="{end[1]:.2f}"'
        self._shape("line", f'{shape} class="{kind}"', title)

    def path(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """Draw a line through points."""
        steps = " ".join(f"{x:.2f} {y:.2f}" for x, y in points)
        self._shape("path", f'd="M{steps}" class="{kind}"', "")

    def combs(self, teeth: Iterable[tuple[float, float, float]], kind: str, title: str = "") -> None:
        """Draw upright strokes, each of x, top and bottom, as one shape."""
        strokes = "".join(f"M{x:.1f} {top:.1f}V{bottom:.1f}" for x, top, bottom in teeth)
        self._shape("path", f'd="{strokes}" class="{kind}"', title)

    def text(self, left: float, base: float, words: str, kind: str = "small", anchor: str = "start") -> None:
        """Write words; `anchor` is start, middle or end."""
        at = f'x="{left:.2f}" y="{base:.2f}" text-anchor="{anchor}" class="{kind}"'
        self._parts.append(f"<text {at}>{escaped(words)}</text>")

    def axis(self, scale: Scale, base: float, top: float, bottom: float) -> None:
        """Draw an upright line at each round time of a scale, and its label at the height `base`."""
        for x, label in scale.ticks():
            self.line((x, top), (x, bottom), "grid")
            self.text(min(x, self.width - 4 - width_px(label) / 2), base, label, "faint", "middle")

    def render(self, height: float, title: str) -> str:
        """Return the document."""
        size = f'viewBox="0 0 {self.width} {height:.0f}" width="{self.width}" height="{height:.0f}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escaped(title)}">',
                f"<title>{escaped(title)}</title>",
                f"<style>{_style()}</style>",
                f'<rect width="{self.width}" height="{height:.0f}" class="paper"/>',
                *self._parts,
                "</svg>",
            ]
        )

    def _shape(self, name: str, attributes: str, title: str) -> None:
        if title:
            self._parts.append(f"<{name} {attributes}><title>{escaped(title)}</title></{name}>")
        else:
            self._parts.append(f"<{name} {attributes}/>")


def _style() -> str:
    shapes = (
        "text{font:11px system-ui,'DejaVu Sans',sans-serif}.head{font-size:15px;font-weight:600}"
        ".title{font-size:19px;font-weight:600}.number{font-variant-numeric:tabular-nums}"
        ".grid,.rule,.step,.zoom{fill:none}.grid,.rule{stroke-width:1}.step{stroke-width:2}"
        ".zoom{stroke-dasharray:3 3}.band{opacity:.16;pointer-events:none}"
        ".tick{fill:none;stroke-width:1;opacity:.75}"
        ".mark{stroke-width:1.5;stroke-dasharray:4 3}.bar{stroke-width:.7}.onbar{font-weight:600}"
    )
    return f"{shapes}{colours(_LIGHT)}@media(prefers-color-scheme:dark){{{colours(_DARK)}}}"


def colours(of: dict[str, str]) -> str:
    """Return the rules that give each kind of shape its colour."""
    tracks = "".join(
        f".{name}{{fill:{of[name]}}}.tick.{name}{{stroke:{of[name]};fill:none}}"
        for name in ("program", "source", "destination", "faults", "freeze")
    )
    return (
        f".paper{{fill:{of['paper']}}}.bar{{stroke:{of['paper']}}}.onbar{{fill:{of['paper']}}}"
        f".small,.head,.title,.number{{fill:{of['ink']}}}.faint{{fill:{of['faint']}}}"
        f".grid{{stroke:{of['grid']}}}.rule{{stroke:{of['faint']}}}.step{{stroke:{of['source']}}}"
        f".zoom,.mark{{stroke:{of['freeze']}}}.hot{{fill:{of['freeze']}}}{tracks}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Where on the paper a moment is."""

    start_ns: int
    end_ns: int
    left: float
    right: float

    def x(self, at_ns: float) -> float:
        """Return the place of a moment, at the edge when it is beyond."""
        share = (at_ns - self.start_ns) / max(1, self.end_ns - self.start_ns)
        return self.left + min(1.0, max(0.0, share)) * (self.right - self.left)

    def ticks(self, about: int = 8) -> list[tuple[float, str]]:
        """Return places with round times after the start, and their labels."""
        length_ns = max(1, self.end_ns - self.start_ns)
        step_ns = rounded_up(length_ns / about)
        unit, name = unit_of(length_ns)
        return [
            (self.x(self.start_ns + step * step_ns), f"{step * step_ns / unit:,g} {name}")
            for step in range(int(length_ns / step_ns) + 1)
        ]


def rounded_up(value: float) -> float:
    """Return the next larger of 1, 2, 5, 10, 20, 50, ..."""
    power = 1.0
    while power * 10 < value:
        power *= 10
    return next(power * each for each in (1, 2, 5, 10) if power * each >= value or each == 10)


def unit_of(length_ns: float) -> tuple[int, str]:
    """Return the unit of time that suits a length, in ns, and its name."""
    if length_ns >= 10e9:
        return 1_000_000_000, "s"
    if length_ns >= 1e6:
        return 1_000_000, "ms"
    if length_ns >= 1e3:
        return 1_000, "µs"
    return 1, "ns"


def duration(length_ns: float) -> str:
    """Return a length of time in words, with three digits that count."""
    unit, name = unit_of(length_ns)
    value = length_ns / unit
    digits = 0 if value >= 100 or unit == 1 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {name}"
