"""The check of licences and vulnerabilities: what passes, what does not, what cannot be said."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name: str, licence: str) -> dict[str, str]:
    return {"Name": name, "Version": "1.0", "License": licence}


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("a", "MIT"),
        ("a", "BSD License; MIT License"),
        ("a", "ISC License (ISCL)"),
        ("a", "Mozilla Public License 2.0 (MPL 2.0); Apache Software License"),
        ("a", "Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND (BSD-3-Clause OR MIT)"),
        ("tensorrt_rtx_cu13_libs", "Other/Proprietary License"),
        ("nvidia-cublas", "LicenseRef-NVIDIA-Proprietary"),
    ],
)
def test_licences_that_are_allowed(audit: Any, name: str, licence: str) -> None:
    assert not audit.licence_problems([package(name, licence)])


@pytest.mark.parametrize(
    ("licence", "told"),
    [
        ("GNU General Public License v3 (GPLv3)", "GNU General Public License v3 (GPLv3"),
        ("MIT AND AGPL-3.0-only", "AGPL-3.0-only"),
        ("MIT OR GPL-2.0-or-later", "GPL-2.0-or-later"),
        ("MIT License; GNU Library or Lesser General Public License (LGPL)", "GNU Library or L"),
        ("(Apache-2.0 OR BSD-2-Clause) AND CC-BY-NC-4.0", "CC-BY-NC-4.0"),
        ("Other/Proprietary License", "Other/Proprietary License"),
        ("UNKNOWN", "UNKNOWN"),
        ("", ""),
    ],
)
def test_licences_that_are_not(audit: Any, licence: str, told: str) -> None:
    found = audit.licence_problems([package("a", licence), package("b", "MIT")])
    assert len(found) == 1
    assert f"a 1.0: the licence {told}" in found[0]


def test_what_the_base_needs_is_not_proprietary(audit: Any) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    base = re.findall(
        r'^    "([\w-]+)', text.partition("\ndependencies = [")[2].split("]")[0], re.M
    )
    assert "numpy" in base
    assert not [name for name in base if audit.is_proprietary({"Name": name})]


CANARY = {"name": "flask", "version": "0.12", "vulns": [{"id": "PYSEC-2018-66"}]}
SAFE = {"name": "numpy", "version": "2.4", "vulns": []}
LOST = {"name": "flask", "skip_reason": "Dependency not found on PyPI"}
BROKEN = {
    "name": "pillow",
    "version": "9.0",
    "vulns": [{"id": "GHSA-1", "aliases": ["CVE-2022-1"], "fix_versions": ["9.1"]}],
}


def pretend(audit: Any, monkeypatch: pytest.MonkeyPatch, *reports: Any) -> list[str]:
    """Let pip-audit print these reports, one after the other; returns what it is asked for."""
    asked: list[str] = []
    left = iter(reports)

    def run(command: list[str], **_: object) -> Any:
        if "piplicenses" in command:
            return SimpleNamespace(stdout=json.dumps([package("a", "MIT")]))
        asked.append(Path(command[command.index("--requirement") + 1]).read_text())
        report = next(left)
        return SimpleNamespace(stdout=report if isinstance(report, str) else json.dumps(report))

    monkeypatch.setattr(audit, "subprocess", SimpleNamespace(run=run))
    return asked


def report(*packages: dict[str, Any]) -> dict[str, Any]:
    return {"dependencies": list(packages), "fixes": []}


def test_nothing_is_known(
    audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = pretend(audit, monkeypatch, report(CANARY), report(SAFE, CANARY))
    assert audit.main([]) == 0
    assert "numpy==" in asked[1]
    told = capsys.readouterr()
    assert "Licences: 1 packages, all allowed. Proprietary and of extras: none." in told.out
    assert "Vulnerabilities: none known in 1 packages; 0 accepted." in told.out
    assert "NOT CHECKED" not in told.out


@pytest.mark.parametrize(
    "reports",
    [
        ["Traceback: no network"],
        [""],
        [report(LOST)],
        [report(CANARY | {"vulns": []})],
        [report()],
        [report(CANARY), "Traceback: no network"],
        [report(CANARY), report(SAFE, LOST)],
    ],
)
def test_a_database_that_does_not_answer_is_said(
    audit: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reports: list[Any],
) -> None:
    pretend(audit, monkeypatch, *reports)
    assert audit.main([]) == 0
    told = capsys.readouterr().out
    assert "VULNERABILITIES WERE NOT CHECKED" in told
    assert "none known" not in told


def test_packages_that_the_database_lacks_are_named(
    audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}
    pretend(audit, monkeypatch, report(CANARY), report(SAFE, lost, CANARY))
    assert audit.main([]) == 0
    told = capsys.readouterr().out
    assert "none known in 1 packages" in told
    assert "VULNERABILITIES WERE NOT CHECKED of torch." in told


def test_a_vulnerability_fails(
    audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(audit, monkeypatch, report(CANARY), report(SAFE, BROKEN, CANARY))
    assert audit.main([]) == 1
    told = capsys.readouterr()
    assert "pillow 9.0: GHSA-1, CVE-2022-1; mended in 9.1" in told.err
    assert "none known" not in told.out


@pytest.mark.parametrize("name", ["GHSA-1", "CVE-2022-1"])
def test_a_vulnerability_that_is_accepted_passes(
    audit: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(audit.ACCEPTED, name, "cannot be reached")
    pretend(audit, monkeypatch, report(CANARY), report(BROKEN, CANARY))
    assert audit.main([]) == 0


def test_the_tools_are_pinned() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^pip-audit==", pinned, re.M)
    assert re.search(r"^pip-licenses==", pinned, re.M)
    made = subprocess.run(["make", "-n", "audit"], cwd=ROOT, capture_output=True, text=True)
    assert ".ci/audit.py" in made.stdout
    assert "make audit" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
