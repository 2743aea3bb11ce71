"""The host against diffusers' FluxPipeline, with diffusers' own small modules as the engines."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.base import Array
from fluxdeploy.bundle.manifest import LatentSpec, Manifest, RopeSpec, ScheduleSpec
from fluxdeploy.host.pipeline import FluxPipeline
from tests.host.conftest import CharacterTokenizers
from tests.parity.bounds import PICTURE, assert_as_exact

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

AXES = (4, 6, 14)
CLIP_WIDTH, T5_WIDTH = 8, 20


class TorchTokenizer:
    """The stand-in tokenizer of conftest.py, called as diffusers calls its own."""

    model_max_length = 77

    def __init__(self, tokenizers: Any) -> None:
        self.encode = tokenizers.t5

    def tokenize(self, prompt: str) -> list[str]:
        """For diffusers' search for textual inversions: there are none."""
        return []

    def __call__(self, prompts: Sequence[str], **options: Any) -> SimpleNamespace:
        return SimpleNamespace(
            input_ids=torch.from_numpy(self.encode(prompts, options.get("max_length", 1)))
        )


def make_modules(guidance: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    modules = {
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=sum(AXES),
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=AXES,
        ),
        "vae": diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8, 8, 8, 8],
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=1000,
                hidden_size=CLIP_WIDTH,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                eos_token_id=999,
            )
        ),
        "text_encoder_2": transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=1000, d_model=T5_WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2
            )
        ),
    }
    for module in modules.values():
        module.eval().requires_grad_(False)
    # At their initial size, the weights would let a wrong prompt, id or timestep go unnoticed.
    for name, values in modules["transformer"].named_parameters():
        if name.endswith("weight") and values.ndim == 2:
            values.mul_(2.5)
    return modules


def use_modules(engines: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    """Let the engines compute with diffusers' modules, cut where the components are cut.

    `context` carries the text embeddings as they are; `modulation` carries what the modulation is
    made of, in one row: pooled embedding, timestep and guidance.
    """
    transformer = modules["transformer"]

    def tensor(values: Array) -> Any:
        return torch.from_numpy(np.array(values))

    def clip(inputs: Mapping[str, Array]) -> dict[str, Array]:
        pooled = modules["text_encoder"](tensor(inputs["input_ids"])).pooler_output
        return {"pooled_embeddings": pooled.numpy()}

    def t5(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {
            "text_embeddings": modules["text_encoder_2"](tensor(inputs["input_ids"]))[0].numpy()
        }

    def conditioner(inputs: Mapping[str, Array]) -> dict[str, Array]:
        pooled, timestep = inputs["pooled_embeddings"], inputs["timestep"]
        guidance = inputs.get("guidance", np.zeros(len(pooled), np.float32))
        modulation = np.empty((len(timestep), len(pooled), 1, CLIP_WIDTH + 2), np.float32)
        modulation[:, :, 0, :-2] = pooled
        modulation[:, :, 0, -2] = timestep[:, None]
        modulation[:, :, 0, -1] = guidance
        return {"context": inputs["text_embeddings"], "modulation": modulation}

    def step(inputs: Mapping[str, Array]) -> dict[str, Array]:
        row = tensor(inputs["modulation"])[:, 0]
        rope = tensor(inputs["rope_cos"]), tensor(inputs["rope_sin"])
        hook = transformer.pos_embed.register_forward_hook(lambda *arguments: rope)
        try:
            velocity = transformer(
                hidden_states=tensor(inputs["hidden_states"]),
                encoder_hidden_states=tensor(inputs["context"]),
                pooled_projections=row[:, :-2],
                timestep=row[:, -2],
                guidance=row[:, -1] if transformer.config.guidance_embeds else None,
                img_ids=torch.zeros(1, 3),
                txt_ids=torch.zeros(1, 3),
                return_dict=False,
            )[0]
        finally:
            hook.remove()
        return {"velocity": velocity.numpy()}

    def vae_decoder(inputs: Mapping[str, Array]) -> dict[str, Array]:
        images = modules["vae"].decode(tensor(inputs["latents"]), return_dict=False)[0]
        return {"images": images.numpy()}

    for compute in (clip, t5, conditioner, vae_decoder):
        engines[compute.__name__].compute = compute
    engines["transformer"].compute = step


@dataclasses.dataclass(frozen=True)
class Pair:
    """Our pipeline and diffusers' on the same modules, and diffusers' on them in float64."""

    ours: FluxPipeline
    theirs: Any
    exact: Any

    def assert_equal_pictures(self, seed: int, **options: Any) -> None:
        from tests.support.float64 import exact_arithmetic

        options = {"max_sequence_length": 24, "num_inference_steps": 3, **options}
        ours = self.ours(seed=seed, output_type="np", **options)

        def draw(pipe: Any) -> Any:
            generator = torch.Generator("cpu").manual_seed(seed)
            return pipe(generator=generator, output_type="np", **options).images

        theirs = draw(self.theirs)
        with exact_arithmetic():
            exact = draw(self.exact)
        assert isinstance(ours.images, np.ndarray)
        assert theirs.std() > 0.05
        assert_as_exact(ours.images, theirs, exact, PICTURE)
        in_8_bits = [np.asarray(image) for image in self.ours(seed=seed, **options).images]
        assert np.abs(np.array(in_8_bits) - np.rint(theirs * 255)).max() <= 1


@pytest.fixture(autouse=True)
def _pinned_angles() -> Iterator[None]:
    """All three compute with diffusers' modules."""
    from tests.support.float64 import pinned_angles

    with pinned_angles():
        yield


@pytest.fixture(params=["dev", "schnell"])
def pair(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    manifest: Manifest,
    latent_spec: LatentSpec,
    schedule_spec: ScheduleSpec,
    engines: dict[str, Any],
    make_pipeline: Callable[[Manifest], FluxPipeline],
) -> Pair:
    dev = request.param == "dev"
    schedule = schedule_spec
    if not dev:
        schedule = dataclasses.replace(schedule, use_dynamic_shifting=False, shift=1.0)
    modules = make_modules(guidance=dev)
    use_modules(engines, modules)
    ours = make_pipeline(
        dataclasses.replace(
            manifest,
            guidance_embedding=dev,
            schedule=schedule,
            rope=RopeSpec(axes_dims=AXES, theta=10000.0),
        )
    )

    settings = dataclasses.asdict(schedule)
    assert settings.pop("spacing") is None

    def reference(modules: dict[str, Any]) -> Any:
        pipe = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**settings),
            tokenizer=None,
            tokenizer_2=None,
            **modules,
        )
        pipe.tokenizer = pipe.tokenizer_2 = TorchTokenizer(CharacterTokenizers())
        pipe.tokenizer_max_length = 77
        pipe.set_progress_bar_config(disable=True)
        return pipe

    wide = {name: copy.deepcopy(module).double() for name, module in modules.items()}
    return Pair(ours, reference(modules), reference(wide))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (16, 80)])
def test_pictures_of_every_shape(pair: Pair, height: int, width: int) -> None:
    pair.assert_equal_pictures(5, prompt="a fox", height=height, width=width, guidance_scale=2.0)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_step_counts(pair: Pair, steps: int) -> None:
    pair.assert_equal_pictures(
        2**40 + 1, prompt="", height=32, width=48, num_inference_steps=steps, guidance_scale=3.5
    )


def test_batches_and_several_pictures_of_a_prompt(pair: Pair) -> None:
    pair.assert_equal_pictures(
        0,
        prompt=["a fox", "a hen", "a fox"],
        num_images_per_prompt=2,
        height=32,
        width=48,
        guidance_scale=3.5,
    )


@pytest.mark.parametrize("negative", [["fog", ""], ["fog", "fog"]])
def test_true_cfg(pair: Pair, negative: list[str]) -> None:
    pair.assert_equal_pictures(
        9,
        prompt=["a fox", "a hen"],
        negative_prompt=negative,
        true_cfg_scale=2.5,
        num_images_per_prompt=2,
        height=48,
        width=32,
        guidance_scale=1.5,
    )


def test_own_latents_and_a_callback(pair: Pair) -> None:
    from tests.support.float64 import exact_arithmetic

    noise = torch.randn(1, 6, 64, generator=torch.Generator("cpu").manual_seed(3))
    options = {"prompt": "a hen", "height": 32, "width": 48, "num_inference_steps": 3}
    seen: dict[str, list[Any]] = {field.name: [] for field in dataclasses.fields(pair)}

    def record(pipe: object, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        latents = np.asarray(state["latents"]).copy()
        (name,) = (name for name, value in vars(pair).items() if value is pipe)
        seen[name].append((step, float(timestep), latents))
        return {"latents": state["latents"] * 0.5}

    options |= {"callback_on_step_end": record, "guidance_scale": 3.0, "output_type": "np"}
    ours = pair.ours(latents=noise.numpy(), max_sequence_length=24, **options)
    theirs = pair.theirs(latents=noise, max_sequence_length=24, **options)
    with exact_arithmetic():
        exact = pair.exact(latents=noise.double(), max_sequence_length=24, **options)
    assert_as_exact(np.asarray(ours.images), theirs.images, exact.images, PICTURE)
    for mine, other, wide in zip(seen["ours"], seen["theirs"], seen["exact"], strict=True):
        assert mine[:2] == other[:2]
        assert_as_exact(mine[2], other[2], wide[2], PICTURE)
