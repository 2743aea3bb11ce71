"""A task is one module: dummy tasks use all that a start can have, and the engines get it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.base import Array
from fluxdeploy.bundle.manifest import DimensionRange, Manifest
from fluxdeploy.errors import UsageError
from fluxdeploy.host.components import Run
from fluxdeploy.host.options import CallOptions
from fluxdeploy.host.pipeline import TASKS, FluxPipeline
from fluxdeploy.host.request import GenerationRequest
from fluxdeploy.host.tasks.image_to_image import ImageToImage
from fluxdeploy.host.tasks.task import Start, Task, choose_task
from fluxdeploy.host.tasks.text_to_image import TextToImage
from fluxdeploy.sampling.latents import pack
from fluxdeploy.sampling.noise import standard_normal
from fluxdeploy.sampling.rope import joint_ids, rope_tables
from fluxdeploy.sampling.schedule import sigmas as schedule
from tests.host.conftest import MemoryEngine

L, STEPS, S = 6, 3, 16


def values(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@dataclass(frozen=True)
class DummyTask(Task):
    """Begins as text to image does, with one more thing, which it is given."""

    given: Any

    @classmethod
    def read(
        cls, request: GenerationRequest, manifest: Manifest, arguments: Mapping[str, Any]
    ) -> Task:
        return cls(request, manifest, arguments[cls.chosen_by[0]])

    def begin(self, sigmas: NDArray[np.float32]) -> NDArray[np.float32]:
        return pack(standard_normal((self.request.batch, 16, 4, 6), 3), self.manifest.latents)


class WithChannels(DummyTask):
    name: ClassVar[str] = "channels"
    chosen_by: ClassVar[tuple[str, ...]] = ("channels",)

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        return Start(self.begin(sigmas), sigmas, channels=self.given)


class WithTokens(DummyTask):
    name: ClassVar[str] = "tokens"
    chosen_by: ClassVar[tuple[str, ...]] = ("tokens",)
    ids: ClassVar[NDArray[np.float64]] = np.array([[1, 0, 0], [1, 0, 1], [1, 7, 2]], np.float64)

    def engine_sizes(self) -> Mapping[str, Mapping[str, int]]:
        return {"transformer": {"L": L + 3, "T": S + L + 3}}

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        return Start(self.begin(sigmas), sigmas, tokens=self.given, token_ids=self.ids)


class WithBlend(DummyTask):
    name: ClassVar[str] = "blend"
    chosen_by: ClassVar[tuple[str, ...]] = ("blend",)

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        return Start(self.begin(sigmas), sigmas, blend=self.given)


class WithComponent(WithBlend):
    name: ClassVar[str] = "component"
    chosen_by: ClassVar[tuple[str, ...]] = ("component",)
    components: ClassVar[tuple[str, ...]] = ("controlnet",)


class WithBoth(DummyTask):
    name: ClassVar[str] = "both"
    chosen_by: ClassVar[tuple[str, ...]] = ("both",)

    def prepare(self, sigmas: NDArray[np.float32], run: Run) -> Start:
        channels, tokens = self.given
        return Start(
            self.begin(sigmas), sigmas, channels=channels, tokens=tokens, token_ids=WithTokens.ids
        )


class Extended(FluxPipeline):
    """The pipeline with one argument more."""

    def draw(self, name: str, value: object, **options: Any) -> NDArray[np.float32]:
        usual = {
            "prompt": "a fox",
            "negative_prompt": None,
            "true_cfg_scale": 1.0,
            "height": 32,
            "width": 48,
            "num_inference_steps": STEPS,
            "guidance_scale": 2.0,
            "num_images_per_prompt": 1,
            "seed": 3,
            "latents": None,
            "max_sequence_length": S,
        }
        call = CallOptions(options.pop("callback", None), output_type="np")
        arguments = {"image": None, "strength": None, name: value}
        images = self._generate({**usual, **options}, arguments, call, (), {}, 1.0).images
        assert isinstance(images, np.ndarray)
        return images


class Recorder:
    """The transformer's inputs, copied; its velocity has a value for every element."""

    def __init__(self, engine: MemoryEngine) -> None:
        self.inputs: list[dict[str, Array]] = []
        self.arrays: list[Array] = []
        engine.compute = self.compute

    def compute(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.inputs.append({name: array.copy() for name, array in inputs.items()})
        self.arrays.append(inputs["hidden_states"])
        return {"velocity": self.velocity(self.inputs[-1])}

    @staticmethod
    def velocity(inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        hidden: Any = inputs["hidden_states"]
        context: Any = inputs["context"]
        total = hidden.sum(axis=-1, keepdims=True) / 64 + context.mean()
        return np.cos(hidden[..., :64] + total).astype(np.float32)


@pytest.fixture
def pipe(
    make_pipeline: Callable[[Manifest], FluxPipeline],
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> Extended:
    dummies = (WithChannels, WithTokens, WithBlend, WithComponent, WithBoth)
    able = (*manifest.tasks, *(task.name for task in dummies))
    made = make_pipeline(dataclasses.replace(manifest, tasks=able))
    made.__class__ = Extended
    monkeypatch.setattr("fluxdeploy.host.pipeline.TASKS", (*TASKS, *dummies))
    assert isinstance(made, Extended)
    return made


@pytest.fixture
def recorder(engines: dict[str, MemoryEngine]) -> Recorder:
    return Recorder(engines["transformer"])


def noise(batch: int, manifest: Manifest) -> NDArray[np.float32]:
    return pack(standard_normal((batch, 16, 4, 6), 3), manifest.latents)


def test_channels_are_beside_the_latents_in_every_step(
    pipe: Extended, recorder: Recorder, manifest: Manifest
) -> None:
    channels = values(2, L, 5)
    pipe.draw("channels", channels, num_images_per_prompt=2)
    latents, sigmas = noise(2, manifest), schedule(manifest.schedule, STEPS, L)
    assert len(recorder.inputs) == STEPS
    for step, inputs in enumerate(recorder.inputs):
        hidden = np.concatenate([latents, channels], axis=2)
        np.testing.assert_array_equal(inputs["hidden_states"], hidden)
        velocity = Recorder.velocity(inputs)
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
    assert len({array.ctypes.data for array in recorder.arrays}) == 1, "one buffer"


def test_tokens_are_behind_the_latents_and_their_velocity_is_cut_off(
    pipe: Extended, recorder: Recorder, manifest: Manifest
) -> None:
    tokens = values(1, 3, 64)
    seen: list[NDArray[np.float32]] = []

    def watch(pipe: object, step: int, timestep: float, state: dict[str, Any]) -> None:
        seen.append(state["latents"].copy())

    pipe.draw("tokens", tokens, callback=watch)
    latents, sigmas = noise(1, manifest), schedule(manifest.schedule, STEPS, L)
    cos, sin = rope_tables(np.concatenate([joint_ids(S, 2, 3, 3), WithTokens.ids]), manifest.rope)
    for step, inputs in enumerate(recorder.inputs):
        hidden = np.concatenate([latents, tokens], axis=1)
        np.testing.assert_array_equal(inputs["hidden_states"], hidden)
        np.testing.assert_array_equal(inputs["rope_cos"], cos)
        np.testing.assert_array_equal(inputs["rope_sin"], sin)
        velocity = Recorder.velocity(inputs)[:, :L]
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
        np.testing.assert_array_equal(seen[step], latents)


def test_channels_and_tokens_may_come_together(
    pipe: Extended, recorder: Recorder, manifest: Manifest
) -> None:
    channels, tokens = values(1, L, 5), values(1, 3, 69, seed=1)
    pipe.draw("both", (channels, tokens), negative_prompt="fog", true_cfg_scale=2.0)
    beside = np.concatenate([noise(1, manifest), channels], axis=2)
    hidden = np.concatenate([beside, tokens], axis=1)
    assert len(recorder.inputs) == 2 * STEPS
    for inputs in recorder.inputs[:2]:  # towards the prompt, and away from the other
        np.testing.assert_array_equal(inputs["hidden_states"], hidden)


def test_what_a_task_adds_is_divided_with_the_batch(
    pipe: Extended, engines: dict[str, MemoryEngine]
) -> None:
    given = (values(5, L, 5), values(5, 3, 69, seed=1))
    prompts = ["a fox", "a hen", "a fox", "a fox", "a hen"]
    compute = engines["transformer"].compute

    def cropped(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return compute({**inputs, "hidden_states": inputs["hidden_states"][..., :64]})

    engines["transformer"].compute = cropped
    whole = pipe.draw("both", given, prompt=prompts)
    pipe._encoder.forget()
    for engine in engines.values():
        engine.dimensions = {"B": DimensionRange(1, 1, 2)}
    np.testing.assert_array_equal(pipe.draw("both", given, prompt=prompts), whole)
    assert [run["hidden_states"][0] for run in engines["transformer"].runs[-3:]] == [2, 2, 1]


def test_a_blend_comes_after_every_step_and_before_the_callback(
    pipe: Extended, recorder: Recorder, manifest: Manifest
) -> None:
    blended: list[NDArray[np.float32]] = []

    def blend(step: int, latents: NDArray[np.float32]) -> None:
        assert step == len(blended)
        latents[:, ::2] = step
        blended.append(latents.copy())

    def watch(pipe: object, step: int, timestep: float, state: dict[str, Any]) -> None:
        np.testing.assert_array_equal(state["latents"], blended[step])

    pipe.draw("blend", blend, callback=watch)
    assert len(blended) == STEPS
    for before, inputs in zip(blended[:-1], recorder.inputs[1:], strict=True):
        np.testing.assert_array_equal(inputs["hidden_states"], before)


def test_a_task_says_what_it_asks_of_the_engines(
    pipe: Extended, engines: dict[str, MemoryEngine], recorder: Recorder
) -> None:
    engines["transformer"].dimensions = {"L": DimensionRange(1, L, L)}
    assert pipe.draw("channels", values(1, L, 5)).shape == (1, 32, 48, 3)
    runs = len(engines["clip"].runs)
    with pytest.raises(
        UsageError, match=rf"transformer takes 1 to {L} image tokens .* not {L + 3}"
    ):
        pipe.draw("tokens", values(1, 3, 64))
    assert len(engines["clip"].runs) == runs


def test_a_task_names_the_components_that_a_bundle_must_have(pipe: Extended) -> None:
    with pytest.raises(UsageError, match="This bundle has no controlnet, which component takes"):
        pipe.draw("component", 1)


def choose(**arguments: object) -> tuple[type[Task], tuple[str, ...]]:
    usual = {"image": None, "mask": None, "control": None, "strength": None, "blur": 0}
    tasks = (TextToImage, ImageToImage, Inpaint, Control)
    return choose_task((*tasks, Elsewhere), [task.name for task in tasks], {**usual, **arguments})


class Inpaint(DummyTask):
    name: ClassVar[str] = "inpainting"
    chosen_by: ClassVar[tuple[str, ...]] = ("image", "mask")
    options: ClassVar[Mapping[str, object]] = {"strength": None, "blur": 0}


class Control(DummyTask):
    name: ClassVar[str] = "control"
    chosen_by: ClassVar[tuple[str, ...]] = ("control",)


class Elsewhere(DummyTask):
    name: ClassVar[str] = "portraits"
    chosen_by: ClassVar[tuple[str, ...]] = ("face",)


def test_the_arguments_that_are_given_choose_the_task() -> None:
    picture = np.zeros((2, 2, 3), np.float32)
    assert choose() == (TextToImage, ())
    assert choose(image=picture) == (ImageToImage, ())
    assert choose(image=picture, strength=0.2) == (ImageToImage, ())
    assert choose(image=picture, mask=picture, blur=3, strength=np.float32(0.1)) == (Inpaint, ())
    assert choose(control=picture) == (Control, ())


def test_an_option_of_another_task_is_told() -> None:
    assert choose(strength=0.5)[1] == ("`strength` does nothing without `image`.",)
    assert choose(image=1, blur=2)[1] == ("`blur` does nothing without `image` and `mask`.",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": 1}, "`mask` has no place in text to image: inpainting takes `image` and `mask`"),
        ({"image": 1, "control": 1}, "has no place in"),
        ({"depth": 1}, "no task that takes `depth`"),
        (
            {"face": 1},
            "it is for portraits, and this bundle's model is one for text to im",
        ),
    ],
)
def test_what_no_task_takes_together_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(**arguments)


def test_a_bundle_that_takes_pictures_alone_says_what_it_takes() -> None:
    arguments = {"image": None, "mask": None, "control": None, "strength": None, "blur": 0}
    with pytest.raises(UsageError, match=r"for inpainting \(with `image` and `mask`\)\. Give"):
        choose_task((TextToImage, Inpaint), ["inpainting"], {**arguments, "image": 1})
