"""What a laboratory is asked to be, and what its parts are called. Values only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from godwit.errors import RequestError

PORT = 7487
"""Where every node answers migrations."""

SERVICE = "godwit.migrate.receive:serve_connection"
"""What answers there: called with the connected socket and the directory of the node's certificates."""

SHARED = "/shared"
"""The one directory that is the same in every node."""

NODE_RUN = "/run/godwit"
"""Inside a node: certs/ and nodes.json."""

GATEWAY = "10.87.0.254"
"""The address of the bridge, from which the host talks to nodes."""

PREFIX_BITS = 24
MAX_NODES = 200

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_RATE = re.compile(r"(\d+(?:\.\d+)?)(|k|m|g)bit")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """One machine to be made."""

    name: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LabPlan:
    """A laboratory to be made."""

    name: str
    nodes: tuple[NodePlan, ...]
    shared: str | None  # a directory of the host; None: one of the laboratory's own, gone with it
    bits_per_s: int | None  # of each node's link, in each direction
    delay_ns: int | None  # from any node to any other, one way
    service: str  # module:function


def checked_name(name: str, what: str) -> str:
    """Return `name` if it can be a host name and a directory. Raises RequestError."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{what} name {name!r} is not a host name",
            remedy="use up to 32 lower-case letters, digits and inner hyphens",
        )
    return name


def plan_lab(
    names: Sequence[str],
    *,
    lab: str,
    shared: str | None = None,
    bandwidth: str | None = None,
    delay: str | None = None,
    service: str = SERVICE,
) -> LabPlan:
    """Check a request and number its nodes. Raises RequestError."""
    checked_name(lab, "lab")
    if not 1 <= len(names) <= MAX_NODES:
        raise RequestError(f"a lab has 1 to {MAX_NODES} nodes, not {len(names)}")
    if len(set(names)) != len(names):
        raise RequestError(f"a node name is given twice: {' '.join(names)}")
    nodes = tuple(
        NodePlan(name=checked_name(name, "node"), address=f"10.87.0.{number}")
        for number, name in enumerate(names, start=1)
    )
    return LabPlan(
        name=lab,
        nodes=nodes,
        shared=shared,
        bits_per_s=None if bandwidth is None else parse_rate(bandwidth),
        delay_ns=None if delay is None else parse_time(delay),
        service=service,
    )


def parse_rate(text: str) -> int:
    """Return bits per second from `1gbit`, `100mbit`, as tc(8) writes them. Raises RequestError."""
    found = _RATE.fullmatch(text.lower())
    rate = int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2]]) if found else 0
    if rate < 8000:
        raise RequestError(f"{text!r} is not a bandwidth", remedy="write it as 1gbit, 100mbit or 500kbit")
    return rate


def parse_time(text: str) -> int:
    """Return nanoseconds from `5ms`, `200us`, `1s`. Raises RequestError."""
    found = _TIME.fullmatch(text.lower())
    if not found:
        raise RequestError(f"{text!r} is not a delay", remedy="write it as 5ms, 200us or 1s")
    return int(float(found[1]) * {"us": 10**3, "ms": 10**6, "s": 10**9}[found[2]])
