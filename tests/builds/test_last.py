"""A build that has nothing to do finds that out by itself, and only where it is so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engines import choose_runtime
from fluxdeploy.build import last as module
from fluxdeploy.build.last import LastBuild
from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest_json import to_json
from tests.support.small_bundle import small_files, small_manifest, write_small_bundle

ROOT = Path(__file__).parents[2]
LONG_AGO = 10**18
RUNTIME, TARGETS = choose_runtime("onnxruntime", ("cpu",))


class Place:
    """A checkpoint's folder, a calibration, and a bundle that is said to be made of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bundle = root / "bundle"
        self.write("checkpoint/vae/weights", "weights")
        self.write("checkpoint/config.json", "{}")
        self.write("prompts.txt", "a fox")
        self.request = BuildRequest(
            str(root / "checkpoint"),
            runtimes=("onnxruntime",),
            targets=("cpu",),
            calibration=root / "prompts.txt",
        )
        write_small_bundle(self.bundle, small_files(), small_manifest(small_files()))

    def write(self, path: str, text: str, modified: int = LONG_AGO) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        os.utime(file, ns=(modified, modified))
        return file

    def last(self) -> LastBuild:
        return LastBuild(self.request, self.bundle, [(RUNTIME, TARGETS)])

    def remember(self) -> None:
        self.last().remember(open_bundle(self.bundle), [])

    def found(self) -> bool:
        return self.last().find() is not None


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_was_built_is_found(place: Place) -> None:
    assert not place.found()
    place.remember()
    assert place.found()
    assert place.last().find() == open_bundle(place.bundle)


def _manifest(place: Place) -> None:
    manifest = small_manifest(small_files())
    (place.bundle / "fluxdeploy.json").write_text(to_json(replace(manifest, variant="schnell")))


CHANGES: dict[str, Callable[[Place], object]] = {
    "weights": lambda place: place.write("checkpoint/vae/weights", "WEIGHTS", LONG_AGO + 1),
    # The time that it had is set again: its change time tells.
    "secretly": lambda place: place.write("checkpoint/vae/weights", "WEIGHTS"),
    "a config": lambda place: place.write("checkpoint/config.json", "[]"),
    "another file": lambda place: place.write("checkpoint/vae/more", ""),
    "one less": lambda place: (place.root / "checkpoint/config.json").unlink(),
    "another name": lambda place: (place.root / "checkpoint/config.json").rename(
        place.root / "checkpoint/configs.json"
    ),
    "prompts": lambda place: place.write("prompts.txt", "a hen"),
    "a graph of the bundle": lambda place: place.write("bundle/onnx/t5.onnx", "A GRAPH"),
    "no graph": lambda place: (place.bundle / "onnx/t5.onnx").unlink(),
    "another bundle": _manifest,
    "no bundle": lambda place: place.bundle.rename(place.root / "elsewhere"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_seen(place: Place, change: str) -> None:
    place.remember()
    CHANGES[change](place)
    assert not place.found()


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "fp32"},
        {"component_precision": {"t5": "fp32"}},
        {"weight_streaming": True},
        {"checkpoint": None},
        {"calibration": None},
    ],
    ids=str,
)
def test_another_request_is_another_build(place: Place, changed: dict[str, object]) -> None:
    place.remember()
    place.request = replace(place.request, **changed)  # type: ignore[arg-type]
    assert not place.found()


@pytest.mark.parametrize("what", ["sources_digest", "tool_versions"])
def test_other_code_makes_other_files(
    place: Place, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    place.remember()
    monkeypatch.setattr(module, what, lambda: {"torch": "0.1"})
    assert not place.found()


def test_another_target_is_another_build(place: Place) -> None:
    place.remember()
    assert LastBuild(place.request, place.bundle, [(RUNTIME, ("cuda",))]).find() is None


def test_what_was_changed_while_it_was_read_is_not_remembered(place: Place) -> None:
    last = place.last()
    place.write("checkpoint/config.json", "[]")
    last.remember(open_bundle(place.bundle), [])
    assert not place.found()


def test_a_file_may_be_changed_again_without_a_new_time_where_it_is_fresh(place: Place) -> None:
    (place.root / "checkpoint/config.json").write_text("[]")
    place.remember()
    assert not place.found()


def test_a_build_s_own_links_are_no_change(place: Place) -> None:
    last, weights = place.last(), place.root / "checkpoint/vae/weights"
    os.link(weights, place.root / "linked")
    last.remember(open_bundle(place.bundle), [weights])
    assert place.found()
    (place.root / "linked").unlink()  # as where another bundle of the checkpoint is removed
    assert not place.found(), "it is looked at anew, which costs time alone"


def test_a_folder_of_many_files_and_a_hub_are_looked_at_anew(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.request = replace(place.request, checkpoint="somebody/flux")
    place.remember()
    assert not place.found()
    place.request = replace(place.request, checkpoint=str(place.root / "checkpoint/config.json"))
    place.remember()
    assert place.found(), "a file, by all that lies beside it"
    monkeypatch.setattr(module, "_MOST_FILES", 2)
    assert not place.found()


def test_a_build_with_nothing_to_do_loads_no_pytorch(place: Place) -> None:
    place.remember()
    code = (
        "import sys\n"
        "from fluxdeploy.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    )
    options = ("--runtime", "onnxruntime", "--calibration", place.root / "prompts.txt")
    checkpoint = place.root / "checkpoint"
    command = [sys.executable, "-c", code, "build", checkpoint, "--out", place.bundle, *options]
    done = subprocess.run(
        [*map(str, command), "--target", "cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert "AssertionError" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert f"{place.bundle} is ready" in done.stdout
    assert "t5: unchanged" in done.stderr
