"""IP-Adapters against diffusers' pipelines with `load_ip_adapter`, float32, pixel by pixel.

The transformer, the IP-Adapter and its encoder run in PyTorch, stage by stage as they are exported:
no trace is made. tests/builds/test_ip_adapter.py builds one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import open_engine
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import (
    ComponentRecord,
    DimensionRange,
    EngineRecord,
    IpAdapterRecord,
)
from fluxdeploy.errors import UnusedArgumentWarning, UsageError
from fluxdeploy.host import ip_adapter
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.text import load_tokenizers
from tests.parity.test_image_to_image import FOX, ROBOT, TENTH, TOLERANCE, photograph

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

USUAL: dict[str, Any] = {
    "prompt": FOX,
    "num_inference_steps": 3,
    "max_sequence_length": 16,
    "height": 48,
    "width": 32,
}
ONE, TWO = photograph(48, 32, 1), photograph(50, 67, 2)
NEGATIVE: dict[str, Any] = {"negative_prompt": "blurred", "true_cfg_scale": 2.0}


def embeds(count: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((1, count, 28)).astype(np.float32)


# By name, the checkpoint and the call; scales are set otherwise in diffusers.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "a picture": ("dev", {"ip_adapter_image": ONE}),
    "no guidance, another size, several pictures": (
        "schnell",
        {"height": 32, "width": 80, "ip_adapter_image": TWO, "num_images_per_prompt": 2},
    ),
    "a scale": ("dev", {"ip_adapter_image": ONE, "ip_adapter_scale": 0.4}),
    "a scale for each block": (
        "constant",
        {"ip_adapter_image": ONE, "ip_adapter_scale": [0.2, 1.5, -0.6]},
    ),
    "two together, for two prompts": (
        "dev",
        {"prompt": [FOX, ROBOT], "ip_adapter_image": [[ONE, TWO]]},
    ),
    "embeddings": ("dev", {"ip_adapter_image_embeds": [embeds(1)]}),
    "three embeddings together": ("schnell", {"ip_adapter_image_embeds": [embeds(3)]}),
    "black for the negative prompt": ("dev", {**NEGATIVE, "ip_adapter_image": ONE}),
    "a picture for each side": (
        "dev",
        {
            **NEGATIVE,
            "ip_adapter_image": ONE,
            "negative_ip_adapter_image": TWO,
            "ip_adapter_scale": 0.7,
        },
    ),
    "black for the prompt": ("dev", {**NEGATIVE, "negative_ip_adapter_image": TWO}),
}


@pytest.fixture(scope="session")
def open_adapted(
    bundle: Callable[[str], Path],
    checkpoint: Callable[[str], Path],
    ip_adapter_folder: Callable[[str], Path],
) -> Callable[..., FluxPipeline]:
    """`open_adapted(name, most=64)`: ours, whose transformer takes so many pictures at once."""
    from exporters.checkpoint import open_checkpoint
    from exporters.checkpoint.ip_adapter import adapter_pixels, with_ip_adapter
    from exporters.components.registry import components_of
    from tests.support.chain_engines import ChainEngine

    def make(name: str, most: int = 64) -> FluxPipeline:
        plain = open_bundle(bundle(name))
        opened = with_ip_adapter(open_checkpoint(checkpoint(name)), ip_adapter_folder(name))
        engines = {
            each.name: ChainEngine(*each.source(opened, "fp32"))
            for each in components_of(opened).values()
            if each.name == "transformer" or each.part.startswith("ip_adapter")
        }
        engines["transformer"].dimensions = {"B": DimensionRange(1, 1, most)}
        records = {
            each: ComponentRecord("", "fp32", "fp32", e.inputs, e.outputs, (), _engines(), None)
            for each, e in engines.items()
        }
        assert opened.ip_adapter_encoder is not None
        manifest = replace(
            plain.manifest,
            components={**plain.manifest.components, **records},
            ip_adapter=IpAdapterRecord(adapter_pixels(opened.ip_adapter_encoder)),
        )
        changed = replace(plain, manifest=manifest)

        def open_component(component: str) -> Any:
            return engines.get(component) or open_engine(changed, component)

        return FluxPipeline(changed, load_tokenizers(plain), open_component)

    return functools.cache(make)


def _engines() -> tuple[EngineRecord, ...]:
    return (EngineRecord("onnxruntime", "", "cpu", "", {}),)


def draw(pipe: FluxPipeline, call: dict[str, Any]) -> np.ndarray:
    return np.asarray(pipe(**{**USUAL, **call}, seed=5, output_type="np").images)


def draw_with_diffusers(reference: Any, pipe: FluxPipeline, call: dict[str, Any]) -> np.ndarray:
    call = {"guidance_scale": pipe.bundle.manifest.defaults.guidance_scale, **USUAL, **call}
    reference.set_ip_adapter_scale(call.pop("ip_adapter_scale", 1.0))
    for name in ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds"):
        if name in call:
            call[name] = [torch.from_numpy(each) for each in call[name]]
    generator = torch.Generator("cpu").manual_seed(5)
    return np.asarray(reference(**call, generator=generator, output_type="np").images)


@pytest.mark.parametrize("name", CALLS)
def test_pictures_equal_diffusers(
    name: str,
    open_adapted: Callable[[str], FluxPipeline],
    open_reference_adapted: Callable[[str], Any],
) -> None:
    case, call = CALLS[name]
    pipe = open_adapted(case)
    expected = draw_with_diffusers(open_reference_adapted(case), pipe, call)
    pictures = draw(pipe, call)
    assert pictures.shape == expected.shape
    assert np.mean((expected > 0) & (expected < 1)) > 0.5, "clipped pixels would hide a difference"
    worst = np.abs(pictures - expected).max()
    assert worst < TOLERANCE, f"off by {worst * 255:.3g}/255"


@pytest.mark.parametrize(
    ("name", "kind", "call", "own", "theirs"),
    [
        ("dev", "FluxImg2ImgPipeline", {"strength": 0.5}, {}, {}),
        (
            "kontext",
            "FluxKontextPipeline",
            {"max_area": 48 * 32},
            {"auto_resize": False},
            {"_auto_resize": False},
        ),
    ],
)
def test_other_tasks_see_a_picture_too(
    name: str,
    kind: str,
    call: dict[str, Any],
    own: dict[str, Any],
    theirs: dict[str, Any],
    open_adapted: Callable[[str], FluxPipeline],
    open_reference_adapted: Callable[..., Any],
) -> None:
    call = {**call, "image": photograph(48, 32), "ip_adapter_image": TWO}
    pipe, reference = open_adapted(name), open_reference_adapted(name, kind)
    found = draw(pipe, {**call, **own})
    worst = np.abs(found - draw_with_diffusers(reference, pipe, {**call, **theirs})).max()
    assert worst < TOLERANCE, f"off by {worst * 255:.3g}/255"


def test_without_a_picture_the_plain_model_draws(
    open_adapted: Callable[[str], FluxPipeline], open_pipeline: Callable[[str], FluxPipeline]
) -> None:
    pipe = open_adapted("dev")
    plain = draw(pipe, {})
    assert np.abs(plain - draw(open_pipeline("dev"), {})).max() < TOLERANCE
    none = draw(pipe, {"ip_adapter_image": ONE, "ip_adapter_scale": 0.0})
    np.testing.assert_array_equal(none, plain)
    assert np.abs(plain - draw(pipe, {"ip_adapter_image": ONE})).max() > TENTH


def test_each_picture_sees_its_own_in_whatever_parts_they_are_drawn(
    open_adapted: Callable[..., FluxPipeline],
) -> None:
    pipe = open_adapted("dev")
    both = {"prompt": [FOX, ROBOT], "num_images_per_prompt": 2, "seed": [1, 2, 3, 4]}

    def pictures(pipe: FluxPipeline, call: dict[str, Any]) -> np.ndarray:
        usual = {**USUAL, "num_inference_steps": 1, "output_type": "np"}
        return np.asarray(pipe(**{**usual, **call}).images)

    found = pictures(pipe, {**both, "ip_adapter_image": [ONE, TWO]})
    alone = [
        pictures(pipe, {"prompt": prompt, "seed": seed, "ip_adapter_image": seen})[0]
        for prompt, seed, seen in ((FOX, 1, ONE), (FOX, 2, ONE), (ROBOT, 3, TWO), (ROBOT, 4, TWO))
    ]
    np.testing.assert_allclose(found, alone, atol=TOLERANCE)
    for given, most in (([ONE, TWO], 3), ([ONE, ONE, TWO, TWO], 1), ([[ONE], [TWO]], 2)):
        parted = pictures(open_adapted("dev", most), {**both, "ip_adapter_image": given})
        np.testing.assert_allclose(parted, found, atol=TOLERANCE)


def query_after_rope(patch: pytest.MonkeyPatch) -> None:
    from exporters.models import mmdit

    def forward(self: Any, hidden: Any, context: Any, cos: Any, sin: Any) -> Any:
        *streams, query = usual(self, hidden, context, cos, sin)
        text = context.shape[1]
        return *streams, mmdit.rotate(query, cos[text:], sin[text:])

    usual = mmdit.JointAttention.forward
    patch.setattr(mmdit.JointAttention, "forward", forward)


def query_without_its_norm(patch: pytest.MonkeyPatch) -> None:
    from exporters.models import mmdit

    def forward(self: Any, hidden: Any, context: Any, cos: Any, sin: Any) -> Any:
        *streams, _ = usual(self, hidden, context, cos, sin)
        return *streams, mmdit.split_heads(self.to_q(hidden), self.head_dim)

    usual = mmdit.JointAttention.forward
    patch.setattr(mmdit.JointAttention, "forward", forward)


def tokens_without_their_norm(patch: pytest.MonkeyPatch) -> None:
    from exporters.models.ip_adapter import PictureTokens

    def forward(self: Any, image_embeds: Any) -> Any:
        return self.proj(image_embeds).unflatten(-1, (self.tokens, -1))

    patch.setattr(PictureTokens, "forward", forward)


def blocks_in_another_order(patch: pytest.MonkeyPatch) -> None:
    from exporters.models.ip_adapter import StackSeen

    patch.setattr(StackSeen, "forward", lambda self, *blocks: torch.stack(blocks[::-1]))


def scaled_scores(patch: pytest.MonkeyPatch) -> None:
    from exporters.models import mmdit

    def attend(query: Any, key: Any, value: Any, scale: float) -> Any:
        return usual(query, key, value, 0.01 * scale)

    usual = mmdit.few_keys_attention
    patch.setattr(mmdit, "few_keys_attention", attend)


def scaled_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ip_adapter, "SEEN", ip_adapter.SEEN[::-1])


def nothing_for_the_negative_prompt(patch: pytest.MonkeyPatch) -> None:
    def encode(self: Any, run: Any) -> Any:
        return [usual(self, run)[0], None]

    usual = ip_adapter.AdapterInputs.encode
    patch.setattr(ip_adapter.AdapterInputs, "encode", encode)


MISTAKES: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    query_after_rope: "a picture",
    query_without_its_norm: "a picture",
    tokens_without_their_norm: "a picture",
    blocks_in_another_order: "a scale for each block",
    scaled_scores: "a picture",
    scaled_keys: "a scale",
    nothing_for_the_negative_prompt: "black for the negative prompt",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_wrong_formulas_move_the_picture(
    mistake: Callable[[pytest.MonkeyPatch], None],
    open_adapted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, call = CALLS[MISTAKES[mistake]]
    expected = draw(open_adapted(case), call)
    mistake(monkeypatch)
    # Opened anew, for formulas are part of the graph.
    worst = np.abs(draw(open_adapted.__wrapped__(case), call) - expected).max()
    assert worst > TENTH, f"moved by {worst:.3g}"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ip_adapter_image": "a.png"}, "`ip_adapter_image` holds"),
    ({"ip_adapter_image": [ONE, TWO]}, "has 2 entries for 1 prompts and 1 pictures to draw"),
    ({"ip_adapter_image": [[ONE], [ONE, TWO]]}, "has lists of 1 and 2 pictures"),
    ({"ip_adapter_image": ONE, "ip_adapter_image_embeds": embeds(1)}, "are both given"),
    ({"ip_adapter_image_embeds": np.zeros((1, 1, 27))}, r"must be \[U, k, 28\]"),
    ({"ip_adapter_image_embeds": np.zeros((1, 28))}, r"must be \[U, k, 28\]"),
    ({"ip_adapter_image_embeds": np.full((1, 1, 28), np.nan)}, "NaN or infinity"),
    ({"ip_adapter_image": ONE, "ip_adapter_scale": [1.0]}, "has 1 entries"),
    ({"ip_adapter_image": ONE, "ip_adapter_scale": "much"}, "ip_adapter_scale"),
    ({"ip_adapter_image": ONE, "ip_adapter_scale": float("inf")}, "ip_adapter_scale"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    call: dict[str, Any], said: str, open_adapted: Callable[[str], FluxPipeline]
) -> None:
    with pytest.raises(UsageError, match=said):
        draw(open_adapted("dev"), call)


def test_a_bundle_without_one_says_how_to_get_one(
    open_pipeline: Callable[[str], FluxPipeline],
) -> None:
    pipe = open_pipeline("dev")
    with pytest.raises(UsageError, match="`negative_ip_adapter_image` is for an IP-Adapter"):
        draw(pipe, {"negative_ip_adapter_image": ONE})
    with pytest.warns(UnusedArgumentWarning, match="does nothing without a picture"):
        draw(pipe, {"ip_adapter_scale": 0.5})


def test_a_negative_picture_without_guidance_does_nothing(
    open_adapted: Callable[[str], FluxPipeline],
) -> None:
    pipe = open_adapted("dev")
    with pytest.warns(UnusedArgumentWarning, match="`negative_ip_adapter_image` does nothing"):
        found = draw(pipe, {"negative_ip_adapter_image": ONE})
    np.testing.assert_array_equal(found, draw(pipe, {}))
