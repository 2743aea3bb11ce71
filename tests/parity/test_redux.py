"""Redux against diffusers' FluxPriorReduxPipeline before a FluxPipeline, float32, by pixels.

In most tests the Redux runs in PyTorch, stage by stage as it is exported; the last ones build one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from engines import open_engine
from fluxdeploy.batch.jobs import Job, alike
from fluxdeploy.batch.order import Order
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import ComponentRecord, EngineRecord
from fluxdeploy.bundle.manifest_json import from_json, to_json
from fluxdeploy.cli import main
from fluxdeploy.errors import BundleError, UnusedArgumentWarning, UsageError
from fluxdeploy.host import making
from fluxdeploy.host.cancel import CancelToken
from fluxdeploy.host.examples import example_variation
from fluxdeploy.host.input_images import to_pictures
from fluxdeploy.host.pictures import read_metadata
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.host.prompts import PromptEncoder
from fluxdeploy.host.redux import Redux, read_redux
from fluxdeploy.host.texts import Prompts
from fluxdeploy.text import load_tokenizers
from tests.parity.test_image_to_image import FOX, ROBOT, TENTH, TOLERANCE, floats, photograph

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

USUAL: dict[str, Any] = {"num_inference_steps": 2, "height": 48, "width": 32}
TEXT = 512
"""Tokens of a prompt in diffusers' prior, whatever is asked for."""

HOLE = Image.new("L", (32, 48))
HOLE.paste(255, (6, 10, 24, 40))

# The checkpoint, what the prior is given, and what the pipeline after it.
CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one": ("dev", {"image": photograph(48, 32), "prompt": FOX}, {}),
    "two with weights": (
        "schnell",
        {
            "image": [photograph(40, 90, 1), photograph(77, 31, 2)],
            "prompt": FOX,
            "prompt_embeds_scale": [0.7, -0.4],
            "pooled_prompt_embeds_scale": [1.4, -0.2],
        },
        {"width": 80},
    ),
    "no words": (
        "dev",
        {"image": photograph(48, 32, 1), "prompt_embeds_scale": 1.5},
        {"num_images_per_prompt": 2},
    ),
    "negative prompt": (
        "dev",
        {"image": photograph(64, 64, 2), "prompt": ROBOT, "prompt_embeds_scale": 0.8},
        {"negative_prompt": "blurred", "true_cfg_scale": 2.0},
    ),
    "image to image": (
        "dev",
        {"image": photograph(48, 32, 2), "prompt": FOX},
        {"image": photograph(48, 32), "strength": 0.5, "num_inference_steps": 4},
    ),
    "fill": (
        "fill",
        {"image": photograph(40, 40, 1), "prompt": FOX, "prompt_embeds_scale": 0.9},
        {"image": photograph(48, 32), "mask_image": HOLE, "guidance_scale": 30.0},
    ),
}
AFTER = {"image to image": "FluxImg2ImgPipeline", "fill": "FluxFillPipeline"}
"""Calls of other pipelines than FluxPipeline."""


def with_room(record: ComponentRecord) -> ComponentRecord:
    """A component whose engines take the text of pictures too."""

    def longer(engine: EngineRecord) -> EngineRecord:
        sizes = {
            symbol: replace(size, max=size.max + 16) if symbol in "ST" else size
            for symbol, size in engine.dimensions.items()
        }
        return replace(engine, dimensions=sizes)

    return replace(record, engines=tuple(map(longer, record.engines)))


@pytest.fixture(scope="session")
def open_redux(
    bundle: Callable[[str], Path],
    checkpoint: Callable[[str], Path],
    redux_folder: Callable[[str], Path],
) -> Callable[[str], FluxPipeline]:
    """`open_redux(name)`: ours, with the chain of a Redux in PyTorch beside the checkpoint's."""
    from exporters.checkpoint import open_checkpoint
    from exporters.checkpoint.redux import with_redux
    from exporters.components.redux import REDUX_COMPONENT
    from tests.support.chain_engines import ChainEngine

    def make(name: str) -> FluxPipeline:
        plain = open_bundle(bundle(name))
        opened = with_redux(open_checkpoint(checkpoint(name)), redux_folder(name))
        engine = ChainEngine(*REDUX_COMPONENT.source(opened, "fp32"))
        record = ComponentRecord("", "fp32", "fp32", engine.inputs, engine.outputs, (), (), None)
        assert opened.redux is not None
        known = plain.manifest.components
        longer = {name: with_room(known[name]) for name in ("conditioner", "transformer")}
        manifest = replace(
            plain.manifest,
            components={**known, **longer, "redux": record},
            redux=opened.redux.pixels,
        )
        changed = replace(plain, manifest=manifest)

        def open_component(component: str) -> Any:
            return engine if component == "redux" else open_engine(changed, component)

        return FluxPipeline(changed, load_tokenizers(plain), open_component)

    return functools.cache(make)


@pytest.fixture(scope="session")
def open_prior(
    open_reference: Callable[[str], Any], redux_folder: Callable[[str], Path]
) -> Callable[[str], Any]:
    """diffusers' prior, with the checkpoint's text encoders."""
    import diffusers
    import transformers
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    @functools.cache
    def make(name: str) -> Any:
        folder = redux_folder(name)
        parts = open_reference(name).components
        texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return diffusers.FluxPriorReduxPipeline(
            image_encoder=transformers.SiglipVisionModel.from_pretrained(folder / "image_encoder"),
            image_embedder=ReduxImageEncoder.from_pretrained(folder / "image_embedder"),
            feature_extractor=transformers.SiglipImageProcessorPil.from_pretrained(
                folder / "feature_extractor"
            ),
            **{text: parts[text] for text in texts},
        )

    return make


def draw(pipe: FluxPipeline, prior: dict[str, Any], call: dict[str, Any]) -> np.ndarray:
    given = {"redux_image" if key == "image" else key: value for key, value in prior.items()}
    merged = {**USUAL, **given, **call, "max_sequence_length": TEXT}
    return np.asarray(pipe(**merged, seed=5, output_type="np").images)


def reference(case: str, prior: Any, pipe: Any) -> np.ndarray:
    """diffusers' pictures. Without encoders, its prior has zeros of FLUX.1's own widths."""
    _, given, call = CALLS[case]
    if "prompt" not in given:
        widths = (pipe.text_encoder_2.config.d_model, pipe.text_encoder.config.hidden_size)
        words = {
            "prompt_embeds": torch.zeros(1, TEXT, widths[0]),
            "pooled_prompt_embeds": torch.zeros(1, widths[1]),
        }
        given = {**given, **words}
    text = prior(**given)
    if case in AFTER:
        import diffusers

        parts = {k: v for k, v in pipe.components.items() if v is not None}
        pipe = getattr(diffusers, AFTER[case])(**parts)
        pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    merged = {"guidance_scale": 3.5, **USUAL, **call, **text}
    pictures = pipe(**merged, generator=generator, output_type="np").images
    return np.asarray(pictures)


@pytest.mark.parametrize("case", CALLS)
def test_pictures_equal_diffusers(
    case: str,
    open_redux: Callable[[str], FluxPipeline],
    open_prior: Callable[[str], Any],
    open_reference: Callable[[str], Any],
) -> None:
    name, given, call = CALLS[case]
    expected = reference(case, open_prior(name), open_reference(name))
    pictures = draw(open_redux(name), given, call)
    assert pictures.shape == expected.shape
    assert np.mean((expected > 0) & (expected < 1)) > 0.5, "clipped pixels would hide a difference"
    worst = np.abs(pictures - expected).max()
    assert worst < TOLERANCE, f"off by {worst * 255:.3g}/255"


@pytest.mark.parametrize("mistake", [False, True])
def test_words_come_before_pictures(
    mistake: bool,
    open_redux: Callable[[str], FluxPipeline],
    open_prior: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In a picture their order does not show, since all of them have the same ids.
    name, given, _ = CALLS["two with weights"]
    pipe = open_redux(name)
    if mistake:
        pictures_first(monkeypatch)
    expected = open_prior(name)(**given)
    scales = given["prompt_embeds_scale"], given["pooled_prompt_embeds_scale"]
    redux = read_redux(pipe.bundle.manifest, given["image"], *scales)
    assert redux is not None
    run: Any = functools.partial(pipe._components.run, CancelToken())
    words = pipe._encoder.encode(Prompts((FOX,), (FOX,)), 1, TEXT, run)
    found = pipe._encoder.with_pictures(words, redux, run)
    for ours, theirs in (
        (found.text, expected.prompt_embeds.numpy()),
        (found.pooled, expected.pooled_prompt_embeds.numpy()),
    ):
        assert ours.shape == theirs.shape
        off = np.abs(ours - theirs).max() / np.abs(theirs).max()
        moved = mistake and ours.ndim == 3
        assert off > TENTH if moved else off < 1e-4


def test_another_picture_and_another_prompt_draw_something_else(
    open_redux: Callable[[str], FluxPipeline],
) -> None:
    name, given, call = CALLS["one"]
    pipe = open_redux(name)
    first = draw(pipe, given, call)
    for change in ({"image": photograph(48, 32, 2)}, {"prompt": ROBOT}):
        assert np.abs(draw(pipe, {**given, **change}, call) - first).max() > TENTH


def pictures_first(patch: pytest.MonkeyPatch) -> None:
    def joined(self: Redux, text: Any, embeddings: Any) -> Any:
        whole = usual(self, text, embeddings)
        return np.roll(whole, self.tokens, axis=1)

    usual = Redux.joined
    patch.setattr(Redux, "joined", joined)


def words_once(patch: pytest.MonkeyPatch) -> None:
    def joined(self: Redux, text: Any, embeddings: Any) -> Any:
        whole = usual(self, text, embeddings)
        whole[:, : text.shape[1]] = text
        return whole

    usual = Redux.joined
    patch.setattr(Redux, "joined", joined)


def pooled_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Redux, "pooled", lambda self, pooled: pooled)


def mean_of_pictures(patch: pytest.MonkeyPatch) -> None:
    def joined(self: Redux, text: Any, embeddings: Any) -> Any:
        return usual(self, text, np.repeat(embeddings.mean(0, keepdims=True), len(embeddings), 0))

    usual = Redux.joined
    patch.setattr(Redux, "joined", joined)


def also_behind_negative_prompts(patch: pytest.MonkeyPatch) -> None:
    def texts(task: Any, encoder: PromptEncoder, run: Any) -> Any:
        first, second = usual(task, encoder, run)
        return [first, encoder.with_pictures(second, task.request.redux, run)]

    usual = making._texts
    patch.setattr(making, "_texts", texts)


def gelu_between(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("exporters.models.redux.F.silu", torch.nn.functional.gelu)


MISTAKES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], float]] = {
    "weight of words": ("two with weights", words_once, TENTH),
    "weight of pooled": ("two with weights", pooled_once, TENTH),
    "weights of pictures": ("two with weights", mean_of_pictures, TENTH),
    "negative prompts": ("negative prompt", also_behind_negative_prompts, TENTH),
    "activation": ("one", gelu_between, TENTH / 4),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_formulas_move_the_picture(
    mistake: str,
    open_redux: Callable[[str], FluxPipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, make, least = MISTAKES[mistake]
    name, given, call = CALLS[case]
    pipe = open_redux(name)
    expected = draw(pipe, given, call)
    make(monkeypatch)
    # Or features that were kept would be taken.
    pipe._encoder.forget()
    worst = np.abs(draw(pipe, given, call) - expected).max()
    pipe._encoder.forget()
    assert worst > least, f"moved by {worst:.3g}"


def test_what_was_read_of_a_picture_is_kept(open_redux: Callable[[str], FluxPipeline]) -> None:
    name, given, call = CALLS["one"]
    pipe = open_redux(name)
    engine: Any = pipe._components.engine("redux")
    draw(pipe, given, call)
    before = engine.runs
    draw(pipe, {**given, "image": [given["image"], floats(20, 20)]}, call)
    assert engine.runs == before + 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"redux_image": []}, "`redux_image` is an empty list"),
    ({"redux_image": "house.png"}, "`redux_image` holds"),
    ({"prompt_embeds_scale": [1.0, 2.0]}, "has 2 entries for 1 pictures of `redux_image`"),
    ({"pooled_prompt_embeds_scale": "much"}, "pooled_prompt_embeds_scale"),
    ({"prompt_embeds_scale": float("nan")}, "prompt_embeds_scale"),
    ({"prompt": FOX, "prompt_embeds": np.zeros((1, 9, 48))}, "are both given"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    call: dict[str, Any], said: str, open_redux: Callable[[str], FluxPipeline]
) -> None:
    with pytest.raises(UsageError, match=said):
        open_redux("dev")(**{**USUAL, "redux_image": photograph(9, 9), "seed": 1, **call})


def test_a_bundle_without_a_redux_says_so(open_pipeline: Callable[[str], FluxPipeline]) -> None:
    with pytest.raises(UsageError, match=r"has no Redux.*Build it again with --redux"):
        open_pipeline("dev")(FOX, redux_image=photograph(9, 9))
    with pytest.warns(UnusedArgumentWarning, match="does nothing without `redux_image`"):
        open_pipeline("dev")(FOX, prompt_embeds_scale=2.0, **USUAL)


def test_a_built_bundle_draws_the_same(
    redux_bundle: Path, open_redux: Callable[[str], FluxPipeline]
) -> None:
    name, given, call = CALLS["negative prompt"]
    with FluxPipeline.from_bundle(redux_bundle) as pipe:
        found = draw(pipe, given, call)
        plain = np.asarray(pipe(FOX, **USUAL, seed=1, output_type="np").images)
        example = example_variation(pipe.bundle.manifest, 48, 32)
    assert np.abs(found - draw(open_redux(name), given, call)).max() < TOLERANCE
    usual = open_redux(name)(FOX, **USUAL, seed=1, output_type="np").images
    assert np.abs(plain - np.asarray(usual)).max() < TOLERANCE
    assert to_pictures(example["redux_image"])[0].size == (32, 48)


def test_the_command_draws_and_the_picture_says_how(redux_bundle: Path, tmp_path: Path) -> None:
    photograph(60, 40).save(tmp_path / "a.png")
    photograph(30, 40, 1).save(tmp_path / "b.png")
    common = f"--bundle {redux_bundle} --width 32 --height 48 --steps 1 --seed 3 --json".split()
    options = (
        f"--redux-image {tmp_path}/a.png --redux-image {tmp_path}/b.png --redux-scale 0.6 "
        "--redux-scale 0.4 --redux-pooled-scale 0.5"
    ).split()
    out = tmp_path / "one.png"
    result = CliRunner().invoke(main, ["generate", FOX, *options, *common, "--out", str(out)])
    assert result.exit_code == 0, result.output
    metadata = read_metadata(out)
    assert metadata.redux_sha256 is not None
    assert metadata.redux_sha256.count(",") == 1
    assert metadata.prompt_embeds_scale == "0.6,0.4"
    assert metadata.pooled_prompt_embeds_scale == "0.5"
    line = {
        "prompt": FOX,
        "redux_image": ["a.png", "b.png"],
        "redux_scale": "0.6,0.4",
        "pooled_prompt_embeds_scale": 0.5,
        "out": "two.png",
    }
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    again = ["--prompts", str(tmp_path / "lines.jsonl"), "--out", str(tmp_path / "x.png")]
    result = CliRunner().invoke(main, ["generate", *again, *common])
    assert result.exit_code == 0, result.output
    (made,) = tmp_path.glob("two*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(made)), np.asarray(Image.open(out)))


@pytest.mark.parametrize("redux_image", [(), (Path("a.png"),)])
def test_pictures_with_others_behind_their_words_are_drawn_alone(
    redux_image: tuple[Path, ...],
) -> None:
    order = Order(FOX, redux_image=redux_image)
    groups = list(alike([Job(order, "", (), "")] * 2, lambda job: 100))
    assert [len(group) for group in groups] == ([1, 1] if redux_image else [2])


def test_inspect_and_verify_know_it(redux_bundle: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(redux_bundle)])
    assert "reads pictures as 31 x 31 pixels" in result.output
    result = CliRunner().invoke(main, ["verify", "--bundle", str(redux_bundle), "--json"])
    assert result.exit_code == 0, result.output
    assert "redux" in {each["name"] for each in json.loads(result.output)["components"]}


def test_a_manifest_that_could_not_be_run_is_refused(redux_bundle: Path) -> None:
    manifest = open_bundle(redux_bundle).manifest
    assert from_json(to_json(manifest), "it") == manifest
    assert manifest.redux is not None
    wrong = replace(manifest.redux, resize=(30, 31))
    for changes, said in (
        ({"redux": None}, "redux must be there where components has redux"),
        ({"redux": wrong}, "gives 31 for the rows of its pixels, and redux makes that 30"),
        ({"redux": replace(manifest.redux, std=(0.5, 0.5, 0.0))}, r"redux\.std is 0"),
    ):
        with pytest.raises(BundleError, match=said):
            from_json(to_json(replace(manifest, **changes)), "it")
