"""Values that people write with a unit: `20ms`, `1.5s`, `2min`; `100MB`, `12MiB/s`."""

from __future__ import annotations

import re
from typing import Any, Final

import click

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([a-zA-Zµ/]*)")
_SECONDS: Final = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_BYTES: Final = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "kib": 1 << 10,
    "m": 10**6,
    "mb": 10**6,
    "mib": 1 << 20,
    "g": 10**9,
    "gb": 10**9,
    "gib": 1 << 30,
}


class Duration(click.ParamType[float]):
    """A length of time; seconds without a unit. More than nothing."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """Return seconds."""
        if isinstance(value, float | int):
            return float(value)
        found = _NUMBER.fullmatch(str(value).strip())
        unit = _SECONDS.get(found[2]) if found else None
        if found is None or unit is None:
            self.fail(f"{value!r} is no length of time; say 20ms, 1.5s or 2min", param, ctx)
        seconds = float(found[1]) * unit
        if not 0 < seconds < 1e9:
            self.fail(f"{value!r} is out of range; say more than 0 and less than 30 years", param, ctx)
        return seconds


class Rate(click.ParamType[float]):
    """Bytes in a second."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """Return bytes per second."""
        if isinstance(value, float | int):
            return float(value)
        found = _NUMBER.fullmatch(str(value).strip())
        unit = _BYTES.get(found[2].lower().removesuffix("/s").removesuffix("ps")) if found else None
        if found is None or unit is None:
            self.fail(f"{value!r} is no rate; say 100MB/s or 12MiB/s", param, ctx)
        rate = float(found[1]) * unit
        if not 1000 <= rate <= 1e15:
            self.fail(f"{value!r} is out of range; say at least 1kB/s", param, ctx)
        return rate


DURATION: Final = Duration()
RATE: Final = Rate()
