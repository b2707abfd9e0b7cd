"""`godwit completion`: the words a shell needs to complete ours."""

from __future__ import annotations

import click

from godwit.cli.output import examples, say


@click.command(
    epilog=examples(
        'eval "$(godwit completion bash)"                                    in ~/.bashrc',
        'eval "$(godwit completion zsh)"                                     in ~/.zshrc',
        "godwit completion fish > ~/.config/fish/completions/godwit.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete godwit's words.

    Commands, options, and the pids of running processes are completed.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    program = click.get_current_context().find_root().command
    complete = found(program, {}, "godwit", "_GODWIT_COMPLETE")
    # `source` would ask bash for its version first, which need not be here to print words for it.
    say(complete.source_template % complete.source_vars())
