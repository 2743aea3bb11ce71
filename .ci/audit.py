"""Licences and known vulnerabilities of the dependencies: `make audit`.

pip-licenses says which licence each installed package has, and pip-audit which vulnerabilities are
known of the versions in constraints.txt. Exits with 1 for a licence that is not allowed, and for a
vulnerability that is not accepted. A database of vulnerabilities that does not answer is no
failure, but is said: pip-audit alone would take packages that it finds nowhere for safe ones.

Arguments are given to pip-audit, to ask another database: `--vulnerability-service osv`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = {
    "0bsd",
    "3-clause bsd license",
    "apache 2.0",
    "apache 2.0 license",
    "apache license 2.0",
    "apache software license",
    "apache-2.0",
    "apache-2.0 with llvm-exception",
    "bsd license",
    "bsd-2-clause",
    "bsd-3-clause",
    "bsl-1.0",
    "cc0-1.0",
    "cnri-python",
    "isc",
    "isc license (iscl)",
    "mit",
    "mit license",
    "mit-cmu",
    # Copyleft for its own files alone, which are used as they are.
    "mozilla public license 2.0 (mpl 2.0)",
    "mpl-2.0",
    "psf-2.0",
    "python software foundation license",
    "unlicense",
    "zlib",
}
"""Licences that go with Apache-2.0, as packages write them, in lower case."""

PROPRIETARY = (
    # Runtimes and libraries of NVIDIA, which only extras bring, and PyTorch for GPUs.
    "cuda-bindings",
    "cuda-toolkit",
    "nvidia-*",
    "tensorrt",
    "tensorrt-cu1?",
    "tensorrt-cu1?-*",
    "tensorrt-rtx",
    "tensorrt-rtx-cu1?",
    "tensorrt-rtx-cu1?-*",
)
"""Packages under a licence of their own, which nobody has to install."""

ACCEPTED: dict[str, str] = {
    # "CVE-2030-12345": "why it cannot be reached from here, and until when",
}
"""Vulnerabilities that are known and lived with."""

CANARY = "flask==0.12"
"""A version with vulnerabilities that every database has: it tells whether one answers."""


def licence_problems(packages: Iterable[dict[str, str]]) -> list[str]:
    """What is not allowed among the packages, as `pip-licenses --format json` lists them.

    Every part of an expression must be allowed, on both sides of an OR too.
    """
    return [
        f"{package['Name']} {package['Version']}: the licence {licence} is not allowed"
        for package in packages
        for licence in not_allowed(package)
        if not is_proprietary(package)
    ]


def not_allowed(package: dict[str, str]) -> list[str]:
    return [kind for kind in _licences(package["License"]) if kind.lower() not in ALLOWED]


def is_proprietary(package: dict[str, str]) -> bool:
    name = re.sub(r"[-_.]+", "-", package["Name"]).lower()
    return any(fnmatch(name, pattern) for pattern in PROPRIETARY)


def _licences(text: str) -> list[str]:
    """The single licences in what a package says: `A; B`, and `A AND (B OR C)`."""
    single: list[str] = []
    for clause in map(str.strip, text.split(";")):
        if clause.lower() in ALLOWED:  # some have brackets in their names
            single.append(clause)
        else:
            single += [part.strip("() ") for part in re.split(r"\s+(?:AND|OR)\s+", clause)]
    return single


def vulnerability_problems(report: dict[str, Any]) -> list[str]:
    """The vulnerabilities in a report of pip-audit, without the canary's and the accepted ones."""
    problems = []
    for package in report["dependencies"]:
        if _is_canary(package):
            continue
        for found in package.get("vulns", ()):
            names = [found["id"], *found.get("aliases", ())]
            if not ACCEPTED.keys() & set(names):
                fixed = ", ".join(found.get("fix_versions", ())) or "no version yet"
                problems.append(
                    f"{package['name']} {package['version']}: {', '.join(names)}; mended in {fixed}"
                )
    return problems


def answers(report: dict[str, Any] | None) -> bool:
    """Whether the database of a report knows what every one knows."""
    packages = report["dependencies"] if report else []
    return any(_is_canary(package) and package.get("vulns") for package in packages)


def unknown(report: dict[str, Any]) -> list[str]:
    """The packages that the database has nothing of."""
    return [package["name"] for package in report["dependencies"] if "skip_reason" in package]


def _is_canary(package: dict[str, Any]) -> bool:
    return bool(package["name"].lower() == CANARY.partition("==")[0])


def ask(requirements: str, options: Sequence[str]) -> dict[str, Any] | None:
    """pip-audit's report for pinned requirements, None where it has none to give."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirements.txt")
        file.write_text(requirements, encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(file), "--no-deps"]
        command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
        command += ["--timeout", "5", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:  # it ends with a traceback where it cannot connect
        return None
    return report


def check_licences() -> list[str]:
    command = [sys.executable, "-m", "piplicenses", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    packages = json.loads(done.stdout)
    problems = licence_problems(packages)
    if not problems:
        known = [package["Name"] for package in packages if not_allowed(package)]
        print(
            f"Licences: {len(packages) - len(known)} packages, all allowed. Proprietary and of "
            f"extras: {', '.join(known) or 'none'}."
        )
    return problems


def check_vulnerabilities(options: Sequence[str]) -> list[str]:
    if not answers(ask(f"{CANARY}\n", options)):
        print("VULNERABILITIES WERE NOT CHECKED: no database of them answers from this machine.")
        return []
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    report = ask(f"{pinned}\n{CANARY}\n", options)
    if report is None or not answers(report):
        print("VULNERABILITIES WERE NOT CHECKED: their database stopped answering.")
        return []
    problems = vulnerability_problems(report)
    if not problems:
        known = len(report["dependencies"]) - 1 - len(unknown(report))
        print(f"Vulnerabilities: none known in {known} packages; {len(ACCEPTED)} accepted.")
    if unknown(report):
        print(f"VULNERABILITIES WERE NOT CHECKED of {', '.join(unknown(report))}.")
    return problems


def main(options: Sequence[str]) -> int:
    problems = [*check_licences(), *check_vulnerabilities(options)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
