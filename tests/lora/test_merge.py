"""A bundle that a LoRA is merged into: its pictures, its components, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from fluxdeploy.bundle import open_bundle
from fluxdeploy.cli import main
from fluxdeploy.demo import DEMO_LORAS
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.lora import LoraFile
from tests.support.checkpoints import load_diffusers
from tests.support.loras import MODULES, add_lora

PROMPT = "A red fox on a sandy beach at sunset"


def _picture(bundle: Path, latents: np.ndarray) -> np.ndarray:
    with FluxPipeline.from_bundle(bundle) as pipe:
        found = pipe(
            PROMPT,
            height=48,
            width=64,
            num_inference_steps=2,
            max_sequence_length=24,
            latents=latents,
            output_type="np",
        ).images
    return np.asarray(found)


def test_pictures_are_those_of_diffusers_with_the_lora(
    checkpoint: Callable[..., Path],
    bundle: Callable[..., Path],
    merged_bundle: Path,
    lora: LoraFile,
) -> None:
    latents = np.random.default_rng(5).standard_normal((1, 12, 64)).astype(np.float32)
    reference = load_diffusers(checkpoint("dev"))
    add_lora(reference.transformer, lora.path, lora.strength)
    expected = reference(
        PROMPT,
        height=48,
        width=64,
        num_inference_steps=2,
        max_sequence_length=24,
        latents=torch.from_numpy(latents),
        output_type="np",
    ).images
    assert np.abs(_picture(merged_bundle, latents) - expected).max() < 1 / 255
    assert np.abs(_picture(bundle("dev"), latents) - expected).max() > 20 / 255


def test_components_that_a_lora_does_not_touch_are_those_of_the_base(
    bundle: Callable[..., Path], merged_bundle: Path, lora: LoraFile
) -> None:
    merged = open_bundle(merged_bundle).manifest
    base = open_bundle(bundle("dev")).manifest.components
    changed = {name for name, record in merged.components.items() if record.key != base[name].key}
    assert changed == {"conditioner", "transformer"}
    (record,) = merged.provenance["loras"]  # type: ignore[misc]
    assert (record["name"], record["scale"]) == (lora.path.name, lora.strength)


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda key: key.replace("blocks.0", "blocks.31"), "transformer_blocks.31.attn.to_q"),
        (lambda key: key.replace("lora_A", "lokr_w1"), "LoKr"),
    ],
)
def test_the_command_line_names_file_and_key(
    rename: Callable[[str], str], words: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    name, (out, width) = next(iter(MODULES.items()))
    shapes = {f"{name}.lora_A.weight": (2, width), f"{name}.lora_B.weight": (out, 2)}
    path = tmp_path / "broken.safetensors"
    save_file({rename(key): torch.ones(shape) for key, shape in shapes.items()}, path)
    result = CliRunner().invoke(main, ["plan", str(checkpoint("dev")), "--lora", f"{path}:0.5"])
    assert result.exit_code == 1
    assert str(path) in result.output
    assert words in result.output


def test_the_lora_of_the_package_has_a_name() -> None:
    from fluxdeploy.cli.options import LORAS

    @LORAS
    def command() -> None: ...

    (option,) = command.__click_params__  # type: ignore[attr-defined]
    assert option.type.convert("demo:embers", None, None) == LoraFile(DEMO_LORAS["demo:embers"])
    assert option.type.convert("demo:embers:-1", None, None).strength == -1
    result = CliRunner().invoke(main, ["plan", "--lora", "demo:ember"])
    assert result.exit_code == 2
    assert "demo:embers" in result.output
