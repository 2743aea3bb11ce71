"""The command line: one verb per module of this package, loaded when it is called."""

from __future__ import annotations

from fluxdeploy.interrupts import ExitOnInterrupt

# Nobody who presses Ctrl-C right after Enter wants to read where an import was.
with ExitOnInterrupt():
    from fluxdeploy.cli.group import COMMANDS, DEBUG_VARIABLE, main

__all__ = ["COMMANDS", "DEBUG_VARIABLE", "main"]
