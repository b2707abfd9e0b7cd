"""`godwit lab`: a cluster of namespace machines on this computer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from godwit.lab.cluster import Lab, LabStatus
    from godwit.lab.state import NodeRecord

Function = TypeVar("Function", bound=Callable[..., object])


def _name_option(function: Function) -> Function:
    return click.option("--name", default="lab", show_default=True, envvar="GODWIT_LAB", help="Which lab.")(
        function
    )


def _examples(*lines: str) -> str:
    # \b keeps click from filling the lines like a paragraph.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _json_option(function: Function) -> Function:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(function)


@click.group(
    epilog=_examples(
        "godwit lab up a b c",
        "godwit lab exec a -- hostname",
        "godwit lab exec a --detach --output /shared/log -- python3 work.py",
        "godwit lab status",
        "godwit lab down",
    )
)
def lab() -> None:
    """Machines made of namespaces, all on this computer.

    Each node has its own host name, address, processes, network and root file system over this
    computer's. /shared is the same directory in all of them. One supervisor holds it all: when it
    ends, however it ends, nothing stays behind.
    """


@lab.command(
    epilog=_examples(
        "godwit lab up a b c",
        "godwit lab up a b --name slow --bandwidth 100mbit",
        "godwit lab up a b --shared /home/me/work",
    )
)
@click.argument("nodes", nargs=-1)
@_name_option
@click.option("--shared", metavar="DIR", help="A directory of this computer to be /shared in every node.")
@click.option("--bandwidth", metavar="RATE", help="Of each node's link, each way: 1gbit, 100mbit.")
@click.option("--delay", metavar="TIME", help="From any node to any other, one way: 5ms, 200us.")
@_json_option
def up(
    nodes: tuple[str, ...],
    name: str,
    shared: str | None,
    bandwidth: str | None,
    delay: str | None,
    as_json: bool,
) -> None:
    """Start a lab with these NODES (a b c, if none is named)."""
    from godwit.lab.cluster import Lab

    started = Lab.up(nodes or ("a", "b", "c"), name=name, shared=shared, bandwidth=bandwidth, delay=delay)
    _show([started], as_json=as_json)


@lab.command(
    "exec",
    epilog=_examples(
        "godwit lab exec a -- ps ax",
        "godwit lab exec a -- bash",
        "godwit lab exec a --detach --output /shared/log -- python3 work.py",
    ),
)
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_name_option
@click.option("--detach", is_flag=True, help="Let it run on in the node, in a session of its own.")
@click.option("--output", metavar="FILE", help="With --detach: append its output to this file of the node.")
@click.option("--cwd", metavar="DIR", default="/", show_default=True, help="Where in the node to start it.")
@_json_option
def exec_(
    node: str,
    command: tuple[str, ...],
    name: str,
    detach: bool,
    output: str | None,
    cwd: str,
    as_json: bool,
) -> None:
    """Run COMMAND in NODE and return its exit status.

    With --detach print its pid, as the node sees it and as this computer sees it, and return at once.
    """
    from godwit.lab.cluster import Lab

    if (output or as_json) and not detach:
        raise click.UsageError("--output and --json go with --detach")
    target = Lab.find(name).node(node)
    try:
        if detach:
            process = target.start(command, cwd=cwd, stdout=output, stderr=output)
            pids = {"node_pid": process.node_pid, "host_pid": process.host_pid}
            _say(pids, f"pid {process.node_pid} in {node}, {process.host_pid} on the host", as_json=as_json)
            process.close()
            return
        status = _run_attached(target.record, command, cwd)
    except OSError as error:
        click.echo(f"godwit: cannot run {command[0]} in {node}: {error.strerror}", err=True)
        status = 127 if isinstance(error, FileNotFoundError) else 126
    sys.exit(status)


def _run_attached(node: NodeRecord, command: tuple[str, ...], cwd: str) -> int:
    from godwit.lab import enter

    wanted = enter.Command(argv=command, cwd=cwd, stdin=0, stdout=1, stderr=2)
    return enter.wait_as_shell(enter.start_attached(node, wanted))


@lab.command(epilog=_examples("godwit lab status", "godwit lab status --json"))
@click.option("--name", envvar="GODWIT_LAB", help="Only this lab; otherwise all.")
@_json_option
def status(name: str | None, as_json: bool) -> None:
    """Show what is up."""
    from godwit.lab.cluster import Lab, all_labs

    _show([Lab.find(name)] if name else all_labs(), as_json=as_json)


@lab.command(epilog=_examples("godwit lab partition b"))
@click.argument("node")
@_name_option
@_json_option
def partition(node: str, name: str, as_json: bool) -> None:
    """Cut NODE off the network."""
    from godwit.lab.cluster import Lab

    Lab.find(name).partition(node)
    _say({"node": node, "connected": False}, f"{node} is cut off", as_json=as_json)


@lab.command(epilog=_examples("godwit lab heal b"))
@click.argument("node")
@_name_option
@_json_option
def heal(node: str, name: str, as_json: bool) -> None:
    """Join NODE to the network again."""
    from godwit.lab.cluster import Lab

    Lab.find(name).heal(node)
    _say({"node": node, "connected": True}, f"{node} is connected", as_json=as_json)


@lab.command(epilog=_examples("godwit lab down", "godwit lab down --name slow"))
@_name_option
@_json_option
def down(name: str, as_json: bool) -> None:
    """End everything in a lab and remove it."""
    from godwit.lab.cluster import Lab

    Lab.find(name).down()
    _say({"name": name, "up": False}, f"lab {name} is down", as_json=as_json)


def _show(labs: list[Lab], *, as_json: bool) -> None:
    states = [each.status() for each in labs]
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode({"labs": states}))
    elif not states:
        click.echo("no lab is up")
    for each in () if as_json else states:
        _show_lab(each)


def _show_lab(seen: LabStatus) -> None:
    link = f", {seen.bits_per_s / 1e6:g} Mbit/s" if seen.bits_per_s else ""
    link += f", {seen.delay_ns / 1e6:g} ms" if seen.delay_ns else ""
    click.echo(f"lab {seen.name}, supervisor {seen.supervisor_pid}{link}, /shared is {seen.shared}")
    width = max(len(node.name) for node in seen.nodes)
    for node in seen.nodes:
        condition = "down" if not node.alive else "up" if node.connected else "cut off"
        click.echo(
            f"  {node.name:{width}}  {node.address:11}  {condition:7}  "
            f"{node.processes} processes, init {node.init_pid}"
        )


def _say(fields: Mapping[str, object], line: str, *, as_json: bool) -> None:
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(fields))
    else:
        click.echo(line)
