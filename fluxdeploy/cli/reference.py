"""Writes the help of every command as Markdown: `python -m fluxdeploy.cli.reference FILE`."""

from __future__ import annotations

from pathlib import Path

import click

from fluxdeploy.cli import COMMANDS, main

__all__ = ["render"]

_WIDTH = 88

_HEADER = """\
# Commands

<!-- Generated from the commands' own help by `make docs`. Edit the docstrings and run it again. -->

Every command prints this help with `--help`. Results go to stdout, progress and errors to stderr.
The exit code is 0 for success, 2 for wrong usage, 130 after Ctrl-C, and 1 for any other failure;
`FLUXDEPLOY_DEBUG=1` adds a traceback to an error's message.
"""


def render() -> str:
    """The page as one string."""
    group = click.Context(
        main, info_name="fluxdeploy", terminal_width=_WIDTH, **main.context_settings
    )
    parts = [_HEADER, _render_help("fluxdeploy", group)]
    for name in COMMANDS:
        command = main.get_command(group, name)
        assert command is not None
        ctx = click.Context(command, info_name=name, parent=group, **command.context_settings)
        parts.append(_render_help(f"fluxdeploy {name}", ctx))
    return "\n".join(parts)


def _render_help(title: str, ctx: click.Context) -> str:
    return f"## {title}\n\n```text\n{ctx.get_help()}\n```\n"


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
def _write(path: Path) -> None:
    """Write the page to PATH."""
    path.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    _write()
