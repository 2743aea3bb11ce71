"""Whatever is passed to a pipeline is taken, or refused with `UsageError` before anything runs."""

from __future__ import annotations

import enum
import io
import warnings
from collections import UserList
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.base import EngineOptions
from fluxdeploy.arguments import check_integer, check_number, check_path, shown
from fluxdeploy.bundle.manifest import ComponentRecord, DimensionRange, EngineRecord, Manifest
from fluxdeploy.errors import CutPromptWarning, EngineError, NumericError, UsageError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.machine import usable_cpus
from fluxdeploy.sampling.latents import check_size
from fluxdeploy.sampling.noise import check_seed
from fluxdeploy.sampling.sampler import load_sampler
from tests.host.conftest import MemoryEngine

Engines = dict[str, MemoryEngine]


class Level(enum.IntEnum):
    LOW = 2


class Text(str):
    """A subclass that says other things than the text that it is."""

    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError


class Unspeakable:
    """Fails in every way that it is asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise RuntimeError("no")

    def __bool__(self) -> bool:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # type: ignore[assignment]


VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "numpy true": np.True_,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus inf": -np.float32("inf"),
    "30 digits": 10**30,
    "minus 30 digits": -(10**30),
    "5000 digits": 10**5000,
    "zero": 0,
    "minus one": -1,
    "a fraction": 0.5,
    "large": 1e300,
    "longdouble": np.longdouble(3),
    "numpy integer": np.int64(16),
    "numpy unsigned": np.uint8(200),
    "half": np.float16(2),
    "enum": Level.LOW,
    "complex": 1j,
    "0-d": np.array(16),
    "0-d float": np.array(0.5),
    "empty array": np.array([]),
    "one number": np.array([16]),
    "floats": np.zeros((2, 3), np.float64),
    "complexes": np.zeros((1, 6, 64), np.complex64),
    "objects": np.array([None, 1], object),
    "texts": np.array(["pil", "np"]),
    "structured": np.zeros(3, [("a", "f4")]),
    "dates": np.array(["2020-01-01"], "M8[D]"),
    "numpy text": np.str_("a fox"),
    "subclass": Text("a fox"),
    "empty text": "",
    "digits": "16",
    "a known word": "pil",
    "a surrogate": "half \ud83d",
    "a null": "a\0b",
    "bytes": b"a fox",
    "path": Path("a"),
    "generator": (n for n in [1]),
    "range": range(2),
    "dict": {"a": 1},
    "set": {1},
    "empty list": [],
    "empty tuple": (),
    "nested": [["a"], ["b"]],
    "ragged": [[1.0, 2.0], [3.0]],
    "none inside": ["a", None],
    "mixed": ["a", 1, b"c"],
    "user list": UserList(["a"]),
    "numbers": [1, 2],
    "a type": int,
    "a function": len,
    "a module": np,
    "an object": object(),
    "unspeakable": Unspeakable(),
    "no pixels": Image.new("RGB", (0, 4)),
    "no pixel array": np.zeros((0, 4, 3), np.uint8),
    "a priority": "low",
    "a decoder of previews": "vae",
    "a picture": Image.new("L", (5, 4)),
    "a mode": Image.new("F", (5, 4)),
    "pixels": np.full((4, 5, 3), 7, np.uint8),
    "batches of pixels": np.full((2, 4, 5, 3), 0.5, np.float16),
    "signed pixels": np.zeros((4, 5, 3), np.int8),
    "not a number of pixels": np.full((4, 5, 3), np.nan, np.float32),
}

PARAMETERS = [
    *("prompt", "negative_prompt", "true_cfg_scale", "height", "width", "num_inference_steps"),
    *("guidance_scale", "num_images_per_prompt", "seed", "latents", "image", "mask_image"),
    *("strength", "padding_mask_crop", "max_sequence_length", "callback_on_step_end"),
    *("num_previews", "callback_on_preview", "preview_decoder"),
    *("cancel", "priority", "output_type"),
]


def usage_error(call: Callable[[], object]) -> str | None:
    """What the call is refused with, or None where it is not. Other errors pass."""
    try:
        call()
    except UsageError as error:
        return str(error)
    return None


def ranges(manifest: Manifest, encoder: bool = True) -> Manifest:
    """The manifest with engines' ranges as a build writes them, for components in memory."""
    sizes = {symbol: DimensionRange(1, 1, 80) for symbol in "BSLNTHWhw"}
    engine = EngineRecord("memory", "1", "cpu", "", sizes)
    record = ComponentRecord("", "fp32", "fp32", (), (), (), (engine,), None)
    names = ("clip", "t5", "conditioner", "transformer", "vae_decoder")
    components = dict.fromkeys((*names, *(("vae_encoder",) if encoder else ())), record)
    defaults = replace(manifest.defaults, max_sequence_length=16)
    return replace(manifest, components=components, defaults=defaults)


@pytest.fixture
def bounded(
    make_pipeline: Callable[[Manifest], FluxPipeline], manifest: Manifest, engines: Engines
) -> FluxPipeline:
    def vae_encoder(inputs: Any) -> dict[str, Any]:
        batch, _, height, width = inputs["images"].shape
        latents = np.zeros((batch, 16, height // 8, width // 8), np.float32)
        return {"mean": latents, "logvar": latents}

    engines["vae_encoder"] = MemoryEngine("vae_encoder", vae_encoder)
    return make_pipeline(ranges(manifest))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parameter", PARAMETERS)
def test_any_value_of_any_argument_is_taken_or_refused(
    bounded: FluxPipeline, engines: Engines, parameter: str
) -> None:
    taken = 0
    for name, value in VALUES.items():
        if parameter == "callback_on_step_end" and callable(value):
            continue  # it is called, and fails as itself
        for engine in engines.values():
            engine.runs.clear()
        usual = {"prompt": "a fox", "num_inference_steps": 1, "output_type": "np", "seed": 1}
        error = usage_error(lambda: bounded(**{**usual, parameter: value}))  # noqa: B023
        if error is None:
            taken += 1
            continue
        assert len(error) < 600, name
        assert error.isprintable(), name
        assert not any(engine.runs for engine in engines.values()), name
    assert taken >= 1


HUGE = {
    "height": [10**9, 1 << 40, 10**5000],
    "width": [2**31, 10**30 * 16],
    "num_inference_steps": [10**9, 81],
    "num_images_per_prompt": [10**9, 1001, 10**40],
    "max_sequence_length": [10**9, 513],
    "prompt": [["a"] * 50_000, "a" * 100_001],
    "negative_prompt": ["b" * 2_000_000, ["b"] * 50_000],
    "guidance_scale": [1e300, -1e7, 10**400],
    "true_cfg_scale": [1e300, 10**400],
    "seed": [2**64, 10**5000],
}


@pytest.mark.parametrize(
    ("parameter", "value"),
    [(name, value) for name, values in HUGE.items() for value in values],
    ids=[f"{name}-{index}" for name, values in HUGE.items() for index in range(len(values))],
)
@pytest.mark.parametrize("latents", [None, np.zeros((1, 6, 64), np.float32)], ids=["", "latents"])
def test_what_no_engine_takes_is_refused_before_memory_is_asked_for_it(
    bounded: FluxPipeline, engines: Engines, parameter: str, value: Any, latents: Any
) -> None:
    image = Image.new("RGB", (8, 8)) if latents is None else None
    options = {"prompt": "a fox", "latents": latents, "image": image, parameter: value}
    with pytest.raises(UsageError) as caught:
        bounded(**options)
    assert len(str(caught.value)) < 400
    assert not any(engine.runs for engine in engines.values())


def broken_picture() -> Image.Image:
    data = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(data, "PNG")
    return Image.open(io.BytesIO(data.getvalue()[:400]))


def closed_picture() -> Image.Image:
    image = Image.new("RGB", (4, 4))
    image.close()
    return image


@pytest.mark.parametrize("make", [broken_picture, closed_picture])
def test_a_picture_that_cannot_be_read_is_refused(
    bounded: FluxPipeline, make: Callable[[], Image.Image]
) -> None:
    with pytest.raises(UsageError, match="`image` holds a picture that cannot be read"):
        bounded("a fox", image=make())


class Tensor:
    """Numbers of another library, as PyTorch has them; some cannot be taken from it."""

    def __init__(self, values: np.ndarray, free: bool = True) -> None:
        self.values, self.free = values, free

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        if not self.free:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        return self.values


def test_another_librarys_numbers_are_taken_as_latents(bounded: FluxPipeline) -> None:
    given = np.full((1, 6, 64), 0.5, np.float32)
    expected = bounded("a fox", latents=given, output_type="np").images
    for same in (Tensor(given), given.tolist(), given.astype(np.longdouble), given[:, ::-1]):
        np.testing.assert_array_equal(
            bounded("a fox", latents=same, output_type="np").images, expected
        )
    with pytest.raises(UsageError, match="must be an array of numbers"):
        bounded("a fox", latents=Tensor(given, free=False))


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return lambda latents: {"latents": np.zeros(shape or latents.shape, dtype)}


def freeze(latents: np.ndarray) -> None:
    latents.flags.writeable = False


def reshape(latents: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latents.shape = (latents.size,)


def numbers(values: list[Any]) -> Iterator[Any]:
    yield from values


ANSWERS: dict[str, tuple[Callable[[np.ndarray], Any], type[Exception] | None]] = {
    "nothing": (lambda latents: None, None),
    "an empty dictionary": (lambda latents: {}, None),
    "none inside": (lambda latents: {"latents": None}, None),
    "the same": (lambda latents: {"latents": latents}, None),
    "another mapping": (lambda latents: MappingProxyType({"latents": latents + 1}), None),
    "doubles": (zeros(dtype=np.float64), None),
    "integers": (zeros(dtype=np.int8), None),
    "a list": (lambda latents: {"latents": latents.tolist()}, None),
    "a read-only array": (freeze, None),
    "another shape in place": (reshape, None),
    "complexes": (zeros(dtype=np.complex64), UsageError),
    "objects": (zeros(dtype=object), UsageError),
    "texts": (lambda latents: {"latents": latents.astype(str)}, UsageError),
    "booleans": (zeros(dtype=bool), UsageError),
    "a ragged list": (lambda latents: {"latents": [[1.0, 2.0], [3.0]]}, UsageError),
    "none in a list": (lambda latents: {"latents": [None]}, UsageError),
    "another shape": (zeros(1, 6), UsageError),
    "one number": (lambda latents: {"latents": 1.0}, UsageError),
    "a generator inside": (lambda latents: {"latents": numbers([1.0])}, UsageError),
    "unspeakable latents": (lambda latents: {"latents": Unspeakable()}, UsageError),
    "a generator": (lambda latents: numbers([latents]), UsageError),
    "latents alone": (lambda latents: latents, UsageError),
    "a list of pairs": (lambda latents: [("latents", latents)], UsageError),
    "text": (lambda latents: "latents", UsageError),
    "false": (lambda latents: False, UsageError),
    "diffusers' embeddings": (
        lambda latents: {"latents": latents, "prompt_embeds": latents},
        UsageError,
    ),
    "a number as a key": (lambda latents: {1: latents}, UsageError),
    "an upper-case key": (lambda latents: {"Latents": latents}, UsageError),
    "nan": (lambda latents: {"latents": latents * np.nan}, NumericError),
    "too large": (lambda latents: {"latents": np.full(latents.shape, 1e300)}, NumericError),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_any_answer_of_a_callback_is_taken_or_refused(bounded: FluxPipeline, name: str) -> None:
    answer, error = ANSWERS[name]
    options = {"prompt": "a fox", "seed": 2, "output_type": "np"}
    before = bounded(**options).images

    def callback(pipe: FluxPipeline, step: int, timestep: float, state: dict[str, Any]) -> Any:
        return answer(state.pop("latents"))

    if error is None:
        assert np.isfinite(bounded(**options, callback_on_step_end=callback).images).all()
    else:
        with pytest.raises(error, match="callback_on_step_end"):
            bounded(**options, callback_on_step_end=callback)
    np.testing.assert_array_equal(bounded(**options).images, before)


def test_what_a_callback_returns_besides_latents_is_named(bounded: FluxPipeline) -> None:
    with pytest.raises(UsageError, match=r"returned 'prompt_embeds'\. Only 'latents'"):
        bounded("a fox", callback_on_step_end=lambda *_: {"prompt_embeds": None})


@pytest.mark.parametrize("error", [KeyError("mine"), SystemExit(3), StopIteration(), OSError(28)])
def test_a_callbacks_own_error_passes_and_leaves_the_pipeline(
    bounded: FluxPipeline, error: BaseException
) -> None:
    def callback(*_: object) -> None:
        raise error

    before = bounded("a fox", seed=1, output_type="np").images
    with pytest.raises(type(error)) as caught:
        bounded("a fox", callback_on_step_end=callback)
    assert caught.value is error
    np.testing.assert_array_equal(bounded("a fox", seed=1, output_type="np").images, before)


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_a_component_of_other_sizes_than_the_manifests_is_told(
    bounded: FluxPipeline, engines: Engines, component: str
) -> None:
    compute = engines[component].compute

    def smaller(inputs: Any) -> dict[str, Any]:
        outputs = compute(inputs)
        return {name: values[..., :-1] for name, values in outputs.items()}

    engines[component].compute = smaller
    with pytest.raises(EngineError, match=f"The {component} gave"):
        bounded("a fox", image=Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("path", [5, None, b"bundle", ["bundle"], 1.5, "a\0b", "\ud800", object()])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(UsageError, match="`path`"):
        FluxPipeline.from_bundle(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runtime": 5}, "There is no runtime 5"),
        ({"runtime": ["auto"]}, "There is no runtime"),
        ({"runtime": None}, "There is no runtime None"),
        ({"runtime": "tensorflow"}, "There is no runtime 'tensorflow'"),
        ({"runtime": Unspeakable()}, "There is no runtime a value of the type Unspeakable"),
        ({"options": {"threads": 2}}, "`options` must be EngineOptions"),
        ({"options": 4}, "`options` must be EngineOptions"),
        ({"low_vram": "yes"}, "`low_vram` must be True or False, not 'yes'"),
        ({"low_vram": None}, "`low_vram` must be True or False"),
        ({"low_vram": 1}, "`low_vram` must be True or False"),
    ],
    ids=range(10),
)
def test_arguments_of_opening_are_checked_before_the_bundle_is(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        FluxPipeline.from_bundle("no such bundle", **options)
    assert words in str(caught.value)


@pytest.mark.parametrize("kept", [-1, 1.5, "many", None, True])
def test_a_pipeline_of_other_things_than_a_bundle_is_refused(pipe: FluxPipeline, kept: Any) -> None:
    with pytest.raises(UsageError, match=r"FluxPipeline\.from_bundle"):
        FluxPipeline("bundle", None, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`kept_text_bytes`"):
        FluxPipeline(pipe.bundle, pipe._encoder._tokenizers, print, kept_text_bytes=kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, -1, 10_000, 10**30, "4", 2.0, True, [2], float("nan")])
def test_threads_are_bounded_by_the_machine(threads: Any) -> None:
    with pytest.raises(UsageError, match=r"`threads`"):
        EngineOptions(threads=threads)
    with pytest.raises(UsageError, match=r"`threads` is 10000; .* logical CPUs that this process"):
        EngineOptions(threads=10_000)


@pytest.mark.parametrize("device", [-1, None, "0", 0.0, False, 2**31, 10**30])
def test_a_device_is_a_number(device: Any) -> None:
    with pytest.raises(UsageError, match="`device`"):
        EngineOptions(device=device)


def test_numbers_of_numpy_are_python_numbers_afterwards() -> None:
    options = EngineOptions(np.int64(usable_cpus()), np.uint8(1))  # type: ignore[arg-type]
    assert (type(options.threads), type(options.device)) == (int, int)


@pytest.mark.parametrize("name", VALUES)
def test_checks_fail_with_usage_errors_alone(manifest: Manifest, name: str) -> None:
    value = VALUES[name]
    checks: list[Callable[[], object]] = [
        lambda: check_integer("x", value, 1, 9, "things"),
        lambda: check_number("x", value, 0, 1),
        lambda: check_path("x", value),
        lambda: check_seed(value),
        lambda: check_size(value, 16, manifest.latents),
        lambda: check_size(16, value, manifest.latents),
        lambda: load_sampler(value),
    ]
    for check in checks:
        assert len(usage_error(check) or "") < 400
    assert len(shown(value)) <= 60


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "a" * 16}, "The prompt is cut: T5 reads 16 of its 17 tokens. Raise `max_seq"),
        ({"prompt": "a" * 80}, "T5 reads 16 of its 81 tokens, and CLIP reads 77 of its 81 tokens."),
        ({"prompt": "a" * 80, "max_sequence_length": 64}, "T5 reads 64 of its 81 tokens, and"),
        ({"prompt": ["a", "a" * 20]}, "The prompt 2 of 2 is cut: T5 reads 16 of its 21 tokens."),
        (
            {"prompt": "a", "negative_prompt": "b" * 30, "true_cfg_scale": 2.0},
            "The negative prompt is cut: T5 reads 16 of its 31 tokens.",
        ),
    ],
)
def test_a_prompt_that_is_cut_says_so(
    bounded: FluxPipeline, options: dict[str, Any], words: str
) -> None:
    with pytest.warns(CutPromptWarning) as told:
        bounded(**options, num_inference_steps=1)
    (warning,) = [each for each in told if each.category is CutPromptWarning]
    assert words in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.filterwarnings("error::fluxdeploy.errors.CutPromptWarning")
def test_a_prompt_that_fits_says_nothing(bounded: FluxPipeline) -> None:
    bounded("a" * 15, num_inference_steps=1)
    bounded(["a" * 15, ""], negative_prompt="b" * 99, num_inference_steps=1)
