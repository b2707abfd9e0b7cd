"""Count once a second. Move it, and see that it goes on counting."""

from __future__ import annotations

import os
import time

started = time.monotonic()
number = 0
while True:
    number += 1
    print(f"{number} from pid {os.getpid()} after {time.monotonic() - started:.0f} s", flush=True)
    time.sleep(1)
