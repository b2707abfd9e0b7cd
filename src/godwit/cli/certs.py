"""`godwit certs`: an authority, and a certificate for each machine."""

from __future__ import annotations

import re
from pathlib import Path

import click

from godwit.cli.output import common_options, examples, printable, say, say_json, settings, table
from godwit.errors import RequestError

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:_-]{0,250}[A-Za-z0-9])?")


@click.command(
    epilog=examples(
        "godwit certs ./certs alpha beta",
        "godwit certs ./certs alpha,10.0.0.1,alpha.example.org beta,10.0.0.2",
        "scp -r ./certs/beta root@beta:/etc/godwit/certs",
    )
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
@common_options
def certs(directory: Path, hosts: tuple[str, ...]) -> None:
    """Make certificates for machines that move processes to each other.

    Makes a new authority, and DIR/HOST/ with ca.pem, node.pem and node.key for each machine: copy each to
    its machine, and keep node.key secret. Further names and addresses of a machine follow its name, with
    commas between. The authority's own key is never written: to add a machine later, make all anew.
    """
    machines = [host.split(",") for host in hosts]
    for names in machines:
        _check(directory, names)
    if len({names[0] for names in machines}) < len(machines):
        raise RequestError("a host is named twice")

    from godwit.migrate.certs import make_authority

    authority = make_authority()
    try:
        for name, *others in machines:
            authority.issue(name, others).write(directory / name)
    except OSError as error:
        raise RequestError(f"cannot write below {directory}: {error.strerror}") from error
    made = [(names[0], str(directory / names[0])) for names in machines]
    if settings().as_json:
        say_json({"hosts": [{"name": name, "directory": printable(path)} for name, path in made]})
    elif not settings().quiet:
        for line in table(made):
            say(line)


def _check(directory: Path, names: list[str]) -> None:
    for name in names:
        if not _HOST.fullmatch(name):
            raise RequestError(f"{printable(name)!r} is neither a host name nor an address")
    if (directory / names[0]).exists():
        raise RequestError(
            f"{directory / names[0]} is there already", remedy="choose another DIR, or remove it first"
        )
