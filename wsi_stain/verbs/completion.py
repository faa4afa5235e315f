"""Verb `completion`."""

from __future__ import annotations

import click

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets the TAB key complete.

    \b
    wsi-stain completion bash >> ~/.bashrc
    wsi-stain completion zsh >> ~/.zshrc
    wsi-stain completion fish > ~/.config/fish/completions/wsi-stain.fish

    Open a new terminal afterwards.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.ClickException(f"click knows no completion for {shell}.")
    click.echo(kind(ctx.find_root().command, {}, "wsi-stain", "_WSI_STAIN_COMPLETE").source())
