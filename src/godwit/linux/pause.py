"""Time between two looks at what the kernel has no event for, as when another parent reaps."""

from __future__ import annotations

import time


def pause(seconds: float) -> None:
    """Let others run for a while. The caller looks again afterwards, and bounds how often."""
    time.sleep(seconds)  # noqa: TID251  # only here: where something can be waited for, wait for it
