"""How OpenMP's threads wait is said while a library is loaded, and to nobody else."""

from __future__ import annotations

import os
import sys

import pytest

from fluxdeploy.build.checkpoint import find_checkpoint
from fluxdeploy.errors import MissingDependencyError

VARIABLE = "OMP_WAIT_POLICY"


@pytest.mark.parametrize("given", [None, "active"])
def test_what_loads_pytorch_for_a_build_says_it(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spinning threads make a build beside one busy program ten times as slow."""
    seen: list[str | None] = []

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "exporters.export":
                seen.append(os.environ.get(VARIABLE))
                raise ImportError(name="torch")

    monkeypatch.delitem(sys.modules, "exporters.export", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    if given is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(MissingDependencyError, match="torch"):
        find_checkpoint(None)
    assert seen == [given or "passive"]
    assert os.environ.get(VARIABLE) == given, "children do not see it"
