"""The network of a laboratory, in the supervisor's network namespace: a bridge, and a link to each node.

The namespace is the laboratory's own, so addresses and names cannot collide with anything. With a
delay there is a bridge for each node, and `switch` joins them.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from godwit.lab.plan import GATEWAY, PREFIX_BITS, LabPlan
from godwit.linux import ns, rtnetlink, tun
from godwit.types import OwnedFd, Pid

BRIDGE = "lab0"
_LOOPBACK_INDEX = 1


class Fabric:
    """What the links are plugged into. Made, and used, in its own network namespace."""

    def __init__(self, route: rtnetlink.Route, plan: LabPlan) -> None:
        self._route = route
        self._plan = plan
        self.taps: list[OwnedFd] = []
        route.set_up(_LOOPBACK_INDEX, up=True)
        self._bridge = self._make_bridge(BRIDGE)
        route.add_address(self._bridge, GATEWAY, PREFIX_BITS)

    def plug(self, position: int, init: Pid) -> socket.socket:
        """Join a node, and return a socket of its network namespace."""
        plan, route = self._plan, self._route
        with OwnedFd(os.open(f"/proc/{init}/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as netns:
            bridge = self._make_bridge(f"node{position}") if plan.delay_ns else self._bridge
            port = route.add_veth(port_name(position), "eth0", netns.number)
            route.set_master(port, bridge)
            route.set_up(port, up=True)
            self._shape(route, port)
            with _inside(netns), rtnetlink.Route() as inner:
                inner.set_up(_LOOPBACK_INDEX, up=True)
                eth0 = socket.if_nametoindex("eth0")
                inner.add_address(eth0, plan.nodes[position].address, PREFIX_BITS)
                inner.set_up(eth0, up=True)
                self._shape(inner, eth0)
                return socket.socket(socket.AF_INET, socket.SOCK_STREAM)

    def _make_bridge(self, name: str) -> int:
        bridge = self._route.add_bridge(name)
        if self._plan.delay_ns:
            self.taps.append(tun.make_tap(f"{name}-wire"))
            wire = socket.if_nametoindex(f"{name}-wire")
            self._route.set_master(wire, bridge)
            self._route.set_up(wire, up=True)
        self._route.set_up(bridge, up=True)
        return bridge

    def _shape(self, route: rtnetlink.Route, index: int) -> None:
        if self._plan.bits_per_s is None:
            return
        bytes_per_s = self._plan.bits_per_s // 8
        # A bucket smaller than one timer tick's worth would never reach the rate; smaller than one
        # segmented packet of 64 KiB, and TCP would be cut to pieces.
        burst_bytes = max(bytes_per_s // 100, 128 * 1024)
        limit_bytes = burst_bytes + max(bytes_per_s // 20, 128 * 1024)
        route.limit_rate(index, bytes_per_s=bytes_per_s, burst_bytes=burst_bytes, limit_bytes=limit_bytes)


def port_name(position: int) -> str:
    """Name the fabric's side of the link to the node at `position` of the plan."""
    return f"port{position}"


def set_port(supervisor: Pid, position: int, *, up: bool) -> None:
    """Switch the link of a node on or off, at the fabric's side: the node sees a dead line."""
    ns.call_in_netns(supervisor, lambda: _switch(position, up=up))


def ports_up(supervisor: Pid, count: int) -> list[bool]:
    """Tell for each of `count` nodes whether its link is switched on. False when the node is gone."""
    return ns.call_in_netns(supervisor, lambda: [_is_up(position) for position in range(count)])


def connect(supervisor: Pid, address: str, port: int, timeout_s: float) -> socket.socket:
    """Connect to a node from the host, out of the bridge's namespace."""
    return ns.call_in_netns(supervisor, lambda: socket.create_connection((address, port), timeout_s))


def _switch(position: int, *, up: bool) -> None:
    with rtnetlink.Route() as route:
        route.set_up(socket.if_nametoindex(port_name(position)), up=up)


def _is_up(position: int) -> bool:
    try:
        return rtnetlink.link_is_up(port_name(position))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return False


@contextmanager
def _inside(netns: OwnedFd) -> Iterator[None]:
    with OwnedFd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as own:
        ns.setns(netns.number, ns.CLONE_NEWNET)
        try:
            yield
        finally:
            ns.setns(own.number, ns.CLONE_NEWNET)
