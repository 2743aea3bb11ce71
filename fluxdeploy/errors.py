"""Every error that `fluxdeploy` raises on purpose, and its warnings.

Each message is one or two sentences: what failed, what is allowed, what to do. The command line
prints the message without a traceback and exits with 1 (2 for `UsageError`).
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "CutPromptWarning",
    "EngineError",
    "ExportError",
    "FluxDeployError",
    "MissingDependencyError",
    "NumericError",
    "QueueFullError",
    "UnmeasuredSkipsWarning",
    "UnusedArgumentWarning",
    "UsageError",
]


_MAX_MESSAGE = 2000


class FluxDeployError(Exception):
    """Base of all errors that carry a message meant for the user.

    A message may quote a file, which may be one long name or list: then its middle is left out.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > _MAX_MESSAGE:
            half = _MAX_MESSAGE // 2
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(text)


class UsageError(FluxDeployError, ValueError):
    """An argument is outside its allowed range: sizes, steps, seeds, prompts."""


class CheckpointError(FluxDeployError):
    """A checkpoint is missing, broken, or of a kind that is not read."""


class BundleError(FluxDeployError):
    """A bundle or its manifest is missing, broken, or cannot be written."""


class ExportError(FluxDeployError):
    """A component could not be traced, bound to its weights, or checked."""


class EngineError(FluxDeployError):
    """An engine could not be built, opened or run."""


class NumericError(FluxDeployError):
    """A tensor holds NaN or infinity, or an output is past its gate."""


class MissingDependencyError(FluxDeployError):
    """An optional package is needed for this; the message names the extra that installs it."""


class Cancelled(FluxDeployError):
    """The call's `CancelToken` was cancelled; no picture was made."""


class QueueFullError(FluxDeployError):
    """As many calls wait as may.

    retry_after: about how many seconds those that are here take.
    """

    def __init__(self, message: object, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnusedArgumentWarning(UserWarning):
    """An argument does nothing beside the others; the picture is made all the same."""


class CutPromptWarning(UserWarning):
    """A text encoder does not read a prompt to its end; the picture is made all the same."""


class UnmeasuredSkipsWarning(UserWarning):
    """Steps are skipped for a size at which `fluxdeploy tune` has measured nothing."""
