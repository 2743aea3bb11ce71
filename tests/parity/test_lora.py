"""LoRAs that come with a call against diffusers with the same LoRAs merged, float32."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fluxdeploy.build.resolve import BuildRequest
from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.cli import main
from fluxdeploy.errors import CheckpointError, UnusedArgumentWarning, UsageError
from fluxdeploy.host.loras import check_loras
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline
from tests.conftest import build_bundle
from tests.parity.bounds import PROMISE
from tests.support.shared_folder import SharedFolder

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

RANK = 4
CALL: dict[str, Any] = {
    "prompt": "A red fox on a sandy beach",
    "height": 48,
    "width": 64,
    "num_inference_steps": 3,
    "max_sequence_length": 16,
    "output_type": "np",
}
Pairs = dict[str, tuple[Any, Any]]


@pytest.fixture(scope="session")
def build_ranked(
    shared_folder: SharedFolder, checkpoint: Callable[[str], Path], remembered_traces: Path
) -> Callable[[str], Path]:
    """`build_ranked(precision)`: a bundle of the smallest checkpoint with side paths of rank 4."""

    def make(precision: str) -> Path:
        request = BuildRequest(
            str(checkpoint("schnell")), precision, promise=Promise(), lora_rank=RANK
        )
        return shared_folder.entry(
            f"bundle-schnell-rank-{precision}", lambda folder: build_bundle(request, folder)
        )

    return make


@pytest.fixture(scope="session")
def ranked(build_ranked: Callable[[str], Path]) -> Iterator[FluxPipeline]:
    with FluxPipeline.from_bundle(build_ranked("fp32")) as pipe:
        yield pipe


@pytest.fixture(scope="session")
def pairs(open_reference: Callable[[str], Any]) -> Callable[[int], Pairs]:
    """`pairs(seed)`: factors of rank 2 for every linear of diffusers' transformer."""

    def make(seed: int) -> Pairs:
        draw = torch.Generator().manual_seed(seed)
        found: Pairs = {}
        for name, module in open_reference("schnell").transformer.named_modules():
            if isinstance(module, torch.nn.Linear):
                rows, columns = module.weight.shape
                size = 0.2 * module.weight.std()
                up = size * torch.randn(rows, 2, generator=draw)
                found[name] = torch.randn(2, columns, generator=draw), up
        return found

    return make


def write(path: Path, pairs: Pairs, **others: Any) -> Path:
    """A LoRA as PEFT writes it; alpha is twice the rank."""
    from safetensors.torch import save_file

    tensors = dict(others)
    for name, (down, up) in pairs.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    adapter = {"transformer.lora_alpha": 4, "transformer.r": 2}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(adapter)})
    return path


@contextmanager
def merged(pipe: Any, loras: Sequence[tuple[Pairs, float]]) -> Iterator[None]:
    """diffusers' pipeline with changed weights."""
    weights = {name: module.weight for name, module in pipe.transformer.named_modules()
               if isinstance(module, torch.nn.Linear)}  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for pairs, strength in loras:
            for name, (down, up) in pairs.items():
                weights[name] += strength * 2 * (up @ down)
        yield
        for name, weight in weights.items():
            weight.copy_(before[name])


def draw(pipe: FluxPipeline, **options: Any) -> np.ndarray:
    return np.asarray(pipe(**{**CALL, "seed": 3, **options}).images)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def test_without_a_lora_pictures_are_those_of_the_base_bundle(
    ranked: FluxPipeline, open_pipeline: Callable[[str], FluxPipeline]
) -> None:
    assert distance(draw(ranked), draw(open_pipeline("schnell"))) < PROMISE / 100


@pytest.mark.parametrize("strengths", [(1.0,), (0.7, -0.5)])
def test_pictures_equal_those_of_merged_weights(
    strengths: tuple[float, ...],
    ranked: FluxPipeline,
    open_reference: Callable[[str], Any],
    pairs: Callable[[int], Pairs],
    tmp_path: Path,
) -> None:
    loras = [(pairs(seed), strength) for seed, strength in enumerate(strengths)]
    files = [
        (write(tmp_path / f"{seed}.safetensors", found), strength)
        for seed, (found, strength) in enumerate(loras)
    ]
    reference = open_reference("schnell")
    with merged(reference, loras):
        generator = torch.Generator("cpu").manual_seed(3)
        expected = reference(**CALL, guidance_scale=0.0, generator=generator).images
    pictures = draw(ranked, lora=files)
    assert distance(pictures, draw(ranked)) > 20 * PROMISE
    assert distance(pictures, expected) < PROMISE


def test_calls_with_other_loras_go_on_between_the_steps_of_one(
    ranked: FluxPipeline, pairs: Callable[[int], Pairs], tmp_path: Path
) -> None:
    one, two = (write(tmp_path / f"{seed}.safetensors", pairs(seed)) for seed in (0, 1))
    apart = [draw(ranked, lora=lora) for lora in (one, [two, one], None)]
    between: list[np.ndarray] = []

    def callback(pipe: FluxPipeline, step: int, *_: object) -> None:
        between.append(draw(pipe, lora=[[two, one], None][step % 2]))

    whole = draw(ranked, lora=one, callback_on_step_end=callback)
    for found, expected in zip((whole, *between[:2]), apart, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_file_that_was_written_anew_is_read_anew(
    ranked: FluxPipeline, pairs: Callable[[int], Pairs], tmp_path: Path
) -> None:
    path = write(tmp_path / "x.safetensors", pairs(0))
    first = draw(ranked, lora=path)
    write(path, pairs(1))
    os.utime(path, ns=(1, 1))
    assert distance(draw(ranked, lora=path), first) > PROMISE


def test_ranks_add_up_at_each_linear_and_not_past_the_bundles(
    ranked: FluxPipeline, pairs: Callable[[int], Pairs], tmp_path: Path
) -> None:
    found = pairs(0)
    path = write(tmp_path / "x.safetensors", found)
    with pytest.raises(UsageError, match=r"need rank 6, at .*rank 4\. .*--lora-rank 6"):
        draw(ranked, lora=[path] * 3)
    parts: list[Path] = []
    for part in range(3):
        some = dict(list(found.items())[part::3])
        parts.append(write(tmp_path / f"{part}.safetensors", some))
    assert distance(draw(ranked, lora=parts), draw(ranked, lora=path)) < PROMISE / 100


def test_text_encoders_are_left_out_with_a_notice(
    ranked: FluxPipeline, pairs: Callable[[int], Pairs], tmp_path: Path
) -> None:
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    clip = {
        f"{module}.lora_A.weight": torch.ones(2, 56),
        f"{module}.lora_B.weight": torch.ones(56, 2),
    }
    whole = write(tmp_path / "whole.safetensors", pairs(0), **clip)
    with pytest.warns(UnusedArgumentWarning, match="leaves out what .*whole.* changes in CLIP"):
        output = ranked(**CALL, seed=3, lora=whole)
    assert "CLIP" in output.notices[0]
    alone = write(tmp_path / "alone.safetensors", pairs(0))
    np.testing.assert_array_equal(output.images, draw(ranked, lora=alone))
    with pytest.raises(CheckpointError, match="changes the text encoder CLIP alone"):
        draw(ranked, lora=write(tmp_path / "clip.safetensors", {}, **clip))


def test_what_cannot_be_used_is_refused_by_name(
    ranked: FluxPipeline,
    open_pipeline: Callable[[str], FluxPipeline],
    pairs: Callable[[int], Pairs],
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "x.safetensors", pairs(0))
    with pytest.raises(UsageError, match="fluxdeploy build --lora-rank R"):
        draw(open_pipeline("schnell"), lora=path)
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        draw(ranked, lora=tmp_path / "nothing.safetensors")
    name, (down, up) = next(iter(pairs(0).items()))
    other = write(tmp_path / "wide.safetensors", {name: (torch.randn(2, 3072), up)})
    with pytest.raises(CheckpointError, match=f"{name}.* of another model"):
        draw(ranked, lora=other)
    huge = write(tmp_path / "huge.safetensors", {name: (down, up * 1e37)})
    with pytest.raises(UsageError, match=r"huge\.safetensors times 10000 is past"):
        draw(ranked, lora=(huge, 1e4))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        ([], []),
        ("a", [("a", 1.0)]),
        (("a", 0.5), [("a", 0.5)]),
        (("a", "b"), [("a", 1.0), ("b", 1.0)]),
        ([Path("a"), ("b", 2)], [("a", 1.0), ("b", 2.0)]),
        (("a", ("b", 2)), [("a", 1.0), ("b", 2.0)]),
        ([["a", 2]], [("a", 2.0)]),
    ],
)
def test_a_lora_is_a_path_a_pair_or_a_list(given: Any, expected: list[tuple[str, float]]) -> None:
    assert [(str(file.path), file.strength) for file in check_loras(given)] == expected


@pytest.mark.parametrize(
    "given",
    [3, [3], ("a", None), ("a", True), ("a", float("nan")), [("a", 1, 2)], {"a": 1}, "a\0b", b"a",
     [("a", "b")], [[]], ("a", 1e9)],
)  # fmt: skip
def test_what_is_no_lora_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="`lora`"):
        check_loras(given)


def test_a_quantized_bundle_is_moved_as_the_float32_one_is(
    build_ranked: Callable[[str], Path],
    ranked: FluxPipeline,
    pairs: Callable[[int], Pairs],
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "x.safetensors", pairs(0))
    exact = [draw(ranked, lora=lora) for lora in (None, path)]
    with FluxPipeline.from_bundle(build_ranked("fp8-weights")) as pipe:
        found = [draw(pipe, lora=lora) for lora in (None, path)]
    own = np.sqrt(np.mean((found[0] - exact[0]) ** 2))
    moved = np.sqrt(np.mean(((found[1] - found[0]) - (exact[1] - exact[0])) ** 2))
    assert 0 < moved < 2 * own
    assert np.sqrt(np.mean((exact[1] - exact[0]) ** 2)) > 3 * moved


def test_the_command_draws_with_loras_and_tells_them_in_the_picture(
    build_ranked: Callable[[str], Path],
    ranked: FluxPipeline,
    pairs: Callable[[int], Pairs],
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "x.safetensors", pairs(0))
    out = tmp_path / "out.png"
    sizes = ["--height", "48", "--width", "64", "--steps", "3", "--max-sequence-length", "16"]
    bundle = ["--bundle", str(build_ranked("fp32")), "--out", str(out), "--seed", "3"]
    command = ["generate", CALL["prompt"], *bundle, *sizes, "--lora", f"{path}:0.5"]
    result = CliRunner().invoke(main, command, prog_name="fluxdeploy")
    assert result.exit_code == 0, result.stderr
    (expected,) = draw(ranked, lora=(path, 0.5))
    with Image.open(out) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.rint(expected * 255))
    named = read_metadata(out).loras
    assert named is not None
    assert named.startswith("x.safetensors:0.5 ")
