"""The group of all commands, each loaded when it is called, and how failures end.

Every expected failure ends in one message on stderr, never in a traceback: exit code 2 for wrong
usage, 130 after Ctrl-C, 1 for everything else. `FLUXDEPLOY_DEBUG=1` adds the traceback.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
from contextlib import nullcontext
from typing import IO, Any

import click

from fluxdeploy import __version__
from fluxdeploy.errors import FluxDeployError, UsageError
from fluxdeploy.interrupts import INTERRUPTED, ExitOnInterrupt, interrupted
from fluxdeploy.native import exhausted
from fluxdeploy.terminal import open_streams, reader_gone, say, visible

__all__ = ["COMMANDS", "DEBUG_VARIABLE", "main"]

DEBUG_VARIABLE = "FLUXDEPLOY_DEBUG"

COMMANDS = {
    "build": "Turn a checkpoint into a bundle.",
    "plan": "Tell what a build will take.",
    "export": "Write only the ONNX files of a checkpoint.",
    "generate": "Make pictures from prompts.",
    "verify": "Compare a bundle with PyTorch.",
    "tune": "Find steps that need no run of the transformer.",
    "bench": "Time bundles, and other ways to run the model.",
    "serve": "Serve pictures over HTTP, as OpenAI's images API.",
    "triton": "Write a model repository for Triton.",
    "inspect": "Show what a bundle or a picture holds.",
    "doctor": "Show what this machine can run.",
}
"""Each command's name and short help, here so that `fluxdeploy --help` imports no command. The
module of a command has the same name and holds it as `command`."""

_RESUMABLE = ("build",)
"""Commands that keep what they have finished; the others begin anew."""


class _Failure(click.ClickException):
    """A message for the user; exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {self.message}", file=file, err=file is None)


class _UsageFailure(_Failure):
    """As click's own usage errors."""

    exit_code = 2


class _Interruption(_Failure):
    """After Ctrl-C."""

    exit_code = INTERRUPTED


class _CommandGroup(click.Group):
    """Loads a command when it is asked for, and turns exceptions into messages."""

    def main(
        self,
        args: Any = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but that whatever happens ends in one message and an exit code."""
        open_streams()
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        # Without arguments they are those of the process, which is then ours.
        ours = args is None
        with ExitOnInterrupt() if ours else nullcontext():
            try:
                code = super().main(args, prog_name, complete_var, False, **extra)
            except click.ClickException as error:
                code = _show(error)
            except (KeyboardInterrupt, click.Abort):  # before the command, or after it
                code = _show(_Interruption("Interrupted."))
            reader_gone()
        if ours and code == INTERRUPTED:
            os._exit(code)  # what libraries do at the end may take long, or break
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError:
            _end_without_reader()
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name.lower(), COMMANDS, cutoff=0.5)
            meant = f" Did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(
                f"There is no command {name}; the commands are {', '.join(COMMANDS)}.{meant}", ctx
            )
        found = super().resolve_command(ctx, args)
        interrupted(name in _RESUMABLE)  # by Ctrl-C while it imports, which comes to no handler
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"fluxdeploy.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, SystemExit):
            raise  # these say themselves how they end
        except (KeyboardInterrupt, click.Abort) as error:
            say("", err=True)  # the terminal has printed ^C on this line
            message = interrupted(ctx.invoked_subcommand in _RESUMABLE)
            raise _failure(error, message, _Interruption) from None
        except UsageError as error:
            raise _failure(error, str(error), _UsageFailure) from None
        except FluxDeployError as error:
            raise _failure(error, str(error)) from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                _end_without_reader()
            raise _failure(error, _describe_os_error(error)) from None
        # The last stop before a user's eyes. A panic of a library in Rust is no `Exception`.
        except BaseException as error:  # noqa: BLE001
            if (why := exhausted(error)) is not None:
                raise _failure(error, f"{why[0].upper()}{why[1:]}.") from None
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            message = (
                f"This is a bug in fluxdeploy ({what}). "
                f"Run the command again with {DEBUG_VARIABLE}=1 for a traceback to report."
            )
            raise _failure(error, message) from None


def _show(error: click.ClickException) -> int:
    """Print a message; returns its exit code. What it quotes of the command line is visible."""
    error.message = visible(error.message)  # type: ignore[misc]
    try:
        error.show()
    except BrokenPipeError:
        reader_gone()
    return error.exit_code


def _end_without_reader() -> None:
    """End a command whose help click has written, where the reader has gone, as `head` does."""
    if reader_gone():
        raise click.exceptions.Exit(0)


def _failure(
    error: BaseException, message: str, kind: type[_Failure] = _Failure
) -> click.ClickException:
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        for line in "".join(traceback.format_exception(error)).splitlines():
            say(line, err=True)
    return kind(message)


def _describe_os_error(error: OSError) -> str:
    where = f" {error.filename}" if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk is full, so{where or ' a file'} could not be written. "
            "Free some space and run the same command again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"No permission to use{where or ' a file'}: choose another place, or allow it."
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}:{where}" if where else f"{reason}."


@click.group(
    cls=_CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Deploy FLUX.1 image models without PyTorch.

    `build` turns a checkpoint into a bundle: a folder with ONNX files, engines and tokenizers.
    `generate` makes pictures from a bundle with nothing but NumPy and a runtime. Every command
    works with no options, on the small model that ships with the package.

    \b
    Examples:
      fluxdeploy build
      fluxdeploy generate "a red circle above a blue square"
      fluxdeploy build ./FLUX.1-dev --precision bf16 --out flux-dev

    Completion of commands and options with the Tab key; put the line in your shell's start file:

    \b
      bash   eval "$(_FLUXDEPLOY_COMPLETE=bash_source fluxdeploy)"
      zsh    eval "$(_FLUXDEPLOY_COMPLETE=zsh_source fluxdeploy)"
      fish   _FLUXDEPLOY_COMPLETE=fish_source fluxdeploy | source
    """
