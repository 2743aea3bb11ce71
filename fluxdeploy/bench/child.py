"""How processes of our own modules are started: the current folder lends them no module.

`python -m` looks for modules in the current folder first, and `python -c` does too. A numpy.py in a
folder of downloads would run there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import fluxdeploy

__all__ = ["child_environment", "module_command"]

# An empty entry is the current folder; no module has been imported from there yet.
_START = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]; "
    "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """What runs a module of ours as `python -m module arguments` does; for `child_environment`."""
    return [sys.executable, "-c", _START, module, *arguments]


def child_environment() -> dict[str, str]:
    """This process's, in which our package is found, and nothing in the current folder.

    PYTHONPATH may have an empty entry, which is the current folder too: it is left out.
    """
    root = str(Path(fluxdeploy.__file__).parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
