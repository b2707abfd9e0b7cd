"""Deaths on demand, for the tests that kill either end at every step of the protocol.

`GODWIT_FAULT=source:frozen` kills the source's mover with SIGKILL when it reaches that step.
"""

from __future__ import annotations

import os
import signal
from typing import Final

SOURCE_STEPS: Final = (
    "connected planned round prepared frozen captured sent ready committed parked unlocked gone pushed killed"
).split()
DESTINATION_STEPS: Final = (
    "greeted prepared round received built parked journalled released told paged drained".split()
)


def at(role: str, step: str) -> None:
    """Die here if the environment says so."""
    if os.environ.get("GODWIT_FAULT") == f"{role}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)
