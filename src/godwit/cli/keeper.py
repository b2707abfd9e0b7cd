"""`godwit keeper`: the process that serves what has stayed at home. Started by who needs it."""

from __future__ import annotations

import click

from godwit.cli.output import common_options, examples


@click.command(
    hidden=True, epilog=examples("godwit keeper          nobody needs to: it is started by itself")
)
@common_options
def keeper() -> None:
    """Be the keeper of this user and machine, unless there is one.

    It serves the files, and stands in for the pids, of programs that have left this machine, and holds the
    other ends of those that have come. It ends when it has had nothing to do for a while.
    """
    from godwit import api

    api.keep()
