"""The command line: one verb per module of this package, loaded when it is called.

Every expected failure ends in one message on stderr, never in a traceback: exit code 2 for wrong
usage, 130 after Ctrl-C, 1 for everything else. `FLUXDEPLOY_DEBUG=1` adds the traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import traceback
from typing import IO, Any

import click

from fluxdeploy import __version__
from fluxdeploy.errors import FluxDeployError, UsageError

__all__ = ["COMMANDS", "DEBUG_VARIABLE", "main"]

DEBUG_VARIABLE = "FLUXDEPLOY_DEBUG"

COMMANDS = {
    "build": "Turn a checkpoint into a bundle.",
    "plan": "Tell what a build will take.",
    "export": "Write only the ONNX files of a checkpoint.",
    "generate": "Make pictures from prompts.",
    "verify": "Compare a bundle with PyTorch.",
    "bench": "Time bundles, and other ways to run the model.",
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
        click.echo(f"Error: {self.format_message()}", file=file, err=file is None)


class _UsageFailure(_Failure):
    """As click's own usage errors."""

    exit_code = 2


class _Interruption(_Failure):
    """128 + SIGINT, as a shell reports it."""

    exit_code = 130


class _CommandGroup(click.Group):
    """Loads a command when it is asked for, and turns exceptions into messages."""

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
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click has its own ways with these
        except KeyboardInterrupt as error:
            click.echo(err=True)  # the terminal has printed ^C on this line
            resumes = ctx.invoked_subcommand in _RESUMABLE
            then = "; run the same command again to resume" if resumes else ""
            message = f"Interrupted{then}."
            raise _failure(error, message, _Interruption) from None
        except UsageError as error:
            raise _failure(error, str(error), _UsageFailure) from None
        except FluxDeployError as error:
            raise _failure(error, str(error)) from None
        except OSError as error:
            raise _failure(error, _describe_os_error(error)) from None
        except MemoryError as error:
            message = "Memory ran out; close other programs, or ask for less at once."
            raise _failure(error, message) from None
        except Exception as error:  # noqa: BLE001 - the last stop before a user's eyes
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            message = (
                f"This is a bug in fluxdeploy ({what}). "
                f"Run the command again with {DEBUG_VARIABLE}=1 for a traceback to report."
            )
            raise _failure(error, message) from None


def _failure(
    error: BaseException, message: str, kind: type[_Failure] = _Failure
) -> click.ClickException:
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
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
