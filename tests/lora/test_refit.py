"""`refit`: what a build with other LoRAs makes, without tracing, in a bundle that is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exporters.checkpoint.checkpoint import LoraRecord
from fluxdeploy.build.refit import _require_same_calibration, refit
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import MANIFEST_NAME
from fluxdeploy.bundle.manifest_json import to_json
from fluxdeploy.errors import UsageError
from fluxdeploy.lora import LoraFile
from fluxdeploy.progress import Progress
from tests.support.small_bundle import small_files, small_manifest, write_small_bundle


def test_refitting_makes_what_a_build_makes_and_gives_the_base_back(
    checkpoint: Callable[..., Path],
    bundle: Callable[..., Path],
    merged_bundle: Path,
    lora: LoraFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = bundle("dev")
    path = tmp_path / "bundle"
    shutil.copytree(base, path)
    vae = (path / "onnx" / "vae_decoder.onnx").stat().st_ino
    monkeypatch.setattr("exporters.export.trace_chain", None)
    quiet = Progress(quiet=True)
    made = refit(path, str(checkpoint("dev")), [lora], quiet)
    assert made.manifest == open_bundle(merged_bundle).manifest
    assert (path / "onnx" / "vae_decoder.onnx").stat().st_ino == vae
    open_bundle(path, check="all")
    back = refit(path, str(checkpoint("dev")), [], quiet)
    assert back.manifest == open_bundle(base).manifest
    open_bundle(path, check="all")


def test_another_checkpoint_and_none_are_refused(
    checkpoint: Callable[..., Path], bundle: Callable[..., Path], lora: LoraFile
) -> None:
    quiet = Progress(quiet=True)
    with pytest.raises(UsageError, match="is not the checkpoint"):
        refit(bundle("dev"), str(checkpoint("dev", "bfl")), [], quiet)
    with pytest.raises(UsageError, match="takes --checkpoint"):
        refit(bundle("dev"), None, [lora], quiet)


def test_a_control_lora_stays_what_the_bundle_was_built_with(
    checkpoint: Callable[..., Path], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    wide = {
        "transformer.x_embedder.lora_A.weight": torch.ones(2, 128),
        "transformer.x_embedder.lora_B.weight": torch.ones(96, 2),
    }
    save_file(wide, tmp_path / "canny.safetensors")
    lora = LoraFile(tmp_path / "canny.safetensors", 0.5)
    with pytest.raises(UsageError, match=r"reads 64 .* it would read 128"):
        refit(bundle("dev"), str(checkpoint("dev")), [lora], Progress(quiet=True))
    found: Any = SimpleNamespace(root="b", manifest=SimpleNamespace(provenance={}))
    record = LoraRecord("canny.safetensors", "0" * 64, 0.5)
    opened = SimpleNamespace(unmerged=SimpleNamespace(loras=(record,)))
    for quantized in (False, True):
        part = SimpleNamespace(quantized=quantized)
        run: Any = SimpleNamespace(spec=SimpleNamespace(checkpoint=opened, components=(part,)))
        found.manifest.provenance = {"loras": [{**asdict(record), "name": "renamed"}]}
        _require_same_calibration(run, found)
        found.manifest.provenance = {"loras": [{**asdict(record), "scale": 1.0}]}
        if quantized:
            with pytest.raises(UsageError, match="was calibrated with another LoRA than canny"):
                _require_same_calibration(run, found)
        else:
            _require_same_calibration(run, found)


def test_engines_that_hold_weights_and_graphs_of_other_versions_are_refused(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    files = small_files()
    manifest = small_manifest(files)
    record = manifest.components["t5"]
    engine = replace(record.engines[0], runtime="tensorrt-rtx")
    components = {**manifest.components, "t5": replace(record, engines=(engine,))}
    root = write_small_bundle(tmp_path / "b", files, replace(manifest, components=components))
    with pytest.raises(UsageError, match=r"t5 .* tensorrt-rtx.*fluxdeploy build"):
        refit(root, None, [], Progress(quiet=True))
    old = tmp_path / "old"
    shutil.copytree(bundle("dev"), old)
    found = open_bundle(old).manifest
    tools = {**found.provenance["tools"], "onnx": "1.0"}  # type: ignore[dict-item]
    provenance = {**found.provenance, "tools": tools}
    (old / MANIFEST_NAME).write_text(to_json(replace(found, provenance=provenance)))
    with pytest.raises(UsageError, match=r"built with onnx 1\.0"):
        refit(old, None, [], Progress(quiet=True))
