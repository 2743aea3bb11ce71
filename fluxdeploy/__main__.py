"""`python -m fluxdeploy`: the command line."""

from __future__ import annotations

from fluxdeploy.cli import main

if __name__ == "__main__":
    main(prog_name="fluxdeploy")
