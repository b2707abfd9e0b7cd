"""Answer each line `NUMBER HEX` with `NUMBER SHA256 PID`, and exit with the number of lines modulo 64."""

from __future__ import annotations

import hashlib
import os
import sys


def main() -> int:
    """Serve until the pipe ends. Exit 99: the parent changed."""
    parent = int(sys.argv[1])
    count = 0
    for line in sys.stdin.buffer:
        number, payload = line.split()
        if os.getppid() != parent:
            return 99
        count += 1
        digest = hashlib.sha256(bytes.fromhex(payload.decode())).hexdigest()
        sys.stdout.write(f"{number.decode()} {digest} {os.getpid()}\n")
        sys.stdout.flush()
    return count % 64


if __name__ == "__main__":
    sys.exit(main())
