"""The pictures of a bundle against those of diffusers' FluxPipeline, pixel by pixel.

Both are held against diffusers in float64; see tests/parity/bounds.py and tests/support/float64.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fluxdeploy.host.pipeline import FluxPipeline
from tests.parity.bounds import PICTURE, PROMISE, assert_as_exact

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

FOX = "A red fox on a sandy beach at sunset"
ROBOT = "A huge wooden robot inside a library, at night"
LONG = ", ".join([FOX, ROBOT] * 30)


@dataclass(frozen=True)
class Case:
    """A call of both pipelines. `latents` draws the starting noise outside of them."""

    name: str
    height: int
    width: int
    num_inference_steps: int
    max_sequence_length: int
    prompt: str | list[str] = FOX
    num_images_per_prompt: int = 1
    guidance_scale: float = 3.5
    true_cfg_scale: float = 1.0
    negative_prompt: str | list[str] | None = None
    seed: int = 0
    latents: bool = False

    def arguments(self) -> dict[str, Any]:
        """The arguments that both pipelines take under one name."""
        return {k: v for k, v in vars(self).items() if k not in ("name", "seed", "latents")}


CASES = (
    Case("one step", 32, 48, 1, 16),
    Case("one image token", 16, 16, 6, 24, seed=1),
    Case("two pictures of a prompt", 64, 64, 4, 64, num_images_per_prompt=2, seed=2),
    Case("two prompts, tall", 96, 32, 3, 40, prompt=[FOX, ROBOT], seed=3),
    Case("long text", 128, 80, 2, 512, prompt=LONG, seed=4),
    Case("low guidance", 160, 96, 5, 77, prompt=ROBOT, guidance_scale=1.0, seed=2**32 + 5),
    Case("no guidance, empty prompt", 48, 80, 3, 32, prompt="", guidance_scale=0.0, seed=6),
    Case("the same prompt twice", 32, 32, 2, 20, prompt=[ROBOT, FOX, ROBOT], seed=7),
    Case(
        "negative prompt for all",
        64,
        112,
        3,
        48,
        prompt=[FOX, ROBOT],
        num_images_per_prompt=2,
        true_cfg_scale=2.0,
        negative_prompt="blurred, dark",
        seed=8,
    ),
    Case(
        "a negative prompt each",
        80,
        48,
        4,
        32,
        prompt=[FOX, ROBOT],
        true_cfg_scale=1.5,
        negative_prompt=["an old castle", ""],
        seed=9,
    ),
    Case("empty negative prompt", 48, 48, 2, 32, true_cfg_scale=2.0, negative_prompt="", seed=10),
    Case("negative prompt unused", 48, 64, 2, 32, negative_prompt=ROBOT, seed=11),
    Case("own latents", 112, 64, 3, 32, num_images_per_prompt=2, seed=12, latents=True),
    Case("wide", 32, 256, 2, 128, seed=13),
)


def generate(pipe: FluxPipeline, case: Case) -> np.ndarray:
    """Our pictures, float32 [B, H, W, 3]."""
    start: dict[str, Any] = {"seed": case.seed}
    if case.latents:
        start = {"latents": own_latents(case)}
    return np.asarray(pipe(**case.arguments(), **start, output_type="np").images)


def generate_reference(pipe: Any, case: Case) -> np.ndarray:
    """diffusers' pictures."""
    start: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(case.seed)}
    if case.latents:
        start = {"latents": torch.from_numpy(own_latents(case))}
    arguments = case.arguments()
    if isinstance(case.prompt, list) and isinstance(case.negative_prompt, str):
        # It takes one for all as well, but then miscounts the pictures.
        arguments["negative_prompt"] = [case.negative_prompt] * len(case.prompt)
    pictures: np.ndarray = pipe(**arguments, **start, output_type="np").images
    return pictures


def generate_exact(pipe: Any, case: Case) -> np.ndarray:
    """The pictures of diffusers' pipeline in float64."""
    from tests.support.float64 import exact_arithmetic

    with exact_arithmetic():
        return generate_reference(pipe, case)


def own_latents(case: Case) -> np.ndarray:
    prompts = 1 if isinstance(case.prompt, str) else len(case.prompt)
    batch = prompts * case.num_images_per_prompt
    tokens = case.height * case.width // 256
    values = np.random.default_rng(case.seed).standard_normal((batch, tokens, 64))
    return values.astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["dev", "schnell", "constant", "wide"])
def test_pictures_equal_diffusers(
    name: str,
    case: Case,
    open_pipeline: Callable[..., FluxPipeline],
    open_reference: Callable[..., Any],
) -> None:
    from tests.support.float64 import pinned_angles

    with pinned_angles():
        float32 = generate_reference(open_reference(name), case)
        exact = generate_exact(open_reference(name, torch.float64), case)
    pictures = generate(open_pipeline(name), case)
    inside = np.mean((exact > 0) & (exact < 1))
    assert inside > 0.5, "clipped pixels would hide a difference"
    assert_as_exact(pictures, float32, exact, PICTURE)
    assert np.abs(pictures - exact).max() < PROMISE


@pytest.mark.parametrize("name", ["dev", "schnell", "constant", "wide"])
def test_the_promise_holds_with_exact_angles_too(
    name: str, open_pipeline: Callable[..., FluxPipeline], open_reference: Callable[..., Any]
) -> None:
    """Where rounding shows most: float32's angles move some of these pixels by 0.8/255."""
    (case,) = (case for case in CASES if case.name == "negative prompt for all")
    exact = generate_exact(open_reference(name, torch.float64), case)
    assert np.abs(generate(open_pipeline(name), case) - exact).max() < PROMISE


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(
    threads: int,
    open_pipeline: Callable[..., FluxPipeline],
    open_reference: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.support.float64 import pinned_angles

    monkeypatch.setattr("engines.base.usable_cpus", lambda: 3)
    case = Case("many tokens", 128, 160, 2, 256, prompt=LONG, seed=5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pinned_angles():
            float32 = generate_reference(open_reference("dev"), case)
            exact = generate_exact(open_reference("dev", torch.float64), case)
    finally:
        torch.set_num_threads(before)
    pictures = generate(open_pipeline("dev", threads=threads), case)
    assert_as_exact(pictures, float32, exact, PICTURE)
