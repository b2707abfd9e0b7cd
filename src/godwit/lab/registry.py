"""Finding a node by name and connecting to it, from inside a node or from the host."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import msgspec

from godwit.errors import DestinationError, RequestError
from godwit.lab import fabric, state
from godwit.lab.plan import NODE_RUN
from godwit.types import Pid

_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAddress:
    """Where a node answers migrations, and what to prove ourselves with there."""

    name: str
    lab: str
    address: str
    port: int
    certs_dir: Path  # ca.pem, node.pem, node.key: of the node we are in, or the host's own
    supervisor: Pid | None  # on the host: the way into the laboratory's network


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listed:
    name: str
    address: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Roll:
    """nodes.json in a node."""

    lab: str
    own_name: str
    nodes: tuple[_Listed, ...]


def own_name() -> str | None:
    """Return the name of the node we are in, or None outside any."""
    roll = _roll()
    return None if roll is None else roll.own_name


def lookup(name: str) -> NodeAddress | None:
    """Find a node.

    Args:
        name: The node's name; on the host also LAB/NODE. The host looks in lab $GODWIT_LAB if that is
            set, else in all that are up.

    Raises:
        RequestError: Several laboratories have a node of that name.
    """
    roll = _roll()
    if roll is not None:
        for each in roll.nodes:
            if each.name == name:
                return NodeAddress(
                    name=name,
                    lab=roll.lab,
                    address=each.address,
                    port=each.port,
                    certs_dir=Path(NODE_RUN, "certs"),
                    supervisor=None,
                )
        return None
    lab, slash, node = name.rpartition("/")
    if not slash:
        lab = os.environ.get("GODWIT_LAB", "")
    found = [
        _on_host(record, each)
        for record in state.living()
        if lab in {"", record.name}
        for each in record.nodes
        if each.name == node
    ]
    if len(found) > 1:
        labs = " ".join(each.lab for each in found)
        raise RequestError(f"node {name!r} is in several labs: {labs}", remedy=f"say LAB/{node}")
    return found[0] if found else None


def connect(name: str, timeout_s: float = _CONNECT_TIMEOUT_S) -> socket.socket:
    """Return a blocking TCP connection to the migration port of a node, found as `lookup` does.

    Raises:
        RequestError: There is no such node.
        DestinationError: It does not answer.
    """
    found = lookup(name)
    if found is None:
        raise RequestError(f"no node {name!r}", remedy="godwit lab status lists them")
    try:
        if found.supervisor is None:
            connection = socket.create_connection((found.address, found.port), timeout_s)
        else:
            connection = fabric.connect(found.supervisor, found.address, found.port, timeout_s)
    except OSError as error:
        raise DestinationError(f"node {name} does not answer: {error}", remedy="godwit lab status") from error
    connection.settimeout(None)
    return connection


def _roll() -> _Roll | None:
    try:
        return msgspec.json.decode(Path(NODE_RUN, "nodes.json").read_bytes(), type=_Roll)
    except FileNotFoundError:
        return None


def _on_host(record: state.LabRecord, node: state.NodeRecord) -> NodeAddress:
    return NodeAddress(
        name=node.name,
        lab=record.name,
        address=node.address,
        port=node.port,
        certs_dir=record.directory / "certs",
        supervisor=record.owner.pid,
    )
