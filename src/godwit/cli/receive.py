"""`godwit receive`: the other end of a migration."""

from __future__ import annotations

from pathlib import Path

import click

from godwit.cli.output import common_options, examples, printable, say, say_json, settings


@click.command(
    epilog=examples(
        "godwit receive --listen 0.0.0.0:7487 --certs /etc/godwit/certs",
        "godwit receive --listen '[::]:0' --certs certs/b --once --json     a free port, for one move",
    )
)
@click.option("--stdio", is_flag=True, help="Speak on standard input and output: what ssh starts.")
@click.option("--listen", metavar="HOST:PORT", help="Wait for connections here. Port 0: any free one.")
@click.option(
    "--certs",
    metavar="DIR",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="With --listen: ca.pem, node.pem and node.key, as `godwit certs` makes them.",
)
@click.option("--once", is_flag=True, help="With --listen: end after one migration.")
@click.option("--link", is_flag=True, hidden=True, help="With --stdio: pass a link on to our keeper.")
@common_options
def receive(stdio: bool, listen: str | None, certs: Path | None, once: bool, link: bool) -> None:
    """Be the other end of a migration.

    Nobody types --stdio: `godwit migrate PID user@host` starts it over ssh. With --listen it serves
    tls://HOST:PORT until it is ended; only peers with a certificate of the same authority may come.
    Programs that have arrived run on when it ends.
    """
    if stdio == (listen is not None):
        raise click.UsageError("give either --stdio or --listen HOST:PORT")
    if stdio and (certs or once):
        raise click.UsageError("--certs and --once go with --listen")
    if listen is not None and certs is None:
        raise click.UsageError("--listen needs --certs DIR; `godwit certs` makes them")

    from godwit import api

    if link:
        api.serve_link_stdio()
    elif listen is None or certs is None:
        api.serve_stdio()
    else:
        api.serve_tls(listen, certs, once=once, ready=_announce)


def _announce(address: str) -> None:
    if settings().as_json:
        say_json({"listening": address})
    elif not settings().quiet:
        say(f"listening at tls://{printable(address)}")
