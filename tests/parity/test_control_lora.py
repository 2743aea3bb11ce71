"""BFL's control LoRAs over dev against diffusers' FluxControlPipeline, float32, pixel by pixel.

diffusers widens the transformer and loads the norms here; the low-rank changes, which it leaves to
PEFT, are added as PEFT adds them. The chains run in PyTorch, so that nothing is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import open_engine
from fluxdeploy.bundle import open_bundle
from fluxdeploy.bundle.manifest import ComponentRecord
from fluxdeploy.errors import CheckpointError
from fluxdeploy.host.pipeline import FluxPipeline
from fluxdeploy.lora import LoraFile, read_lora
from fluxdeploy.text import load_tokenizers
from tests.parity.test_image_to_image import FOX, TOLERANCE, photograph
from tests.support.loras import write_lora

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

CALL: dict[str, Any] = {
    "prompt": FOX,
    "num_inference_steps": 3,
    "guidance_scale": 10.0,
    "max_sequence_length": 16,
    "height": 48,
    "width": 32,
    "control_image": photograph(48, 32),
}
RANK, READS = 3, 128
MOVED = 10 / 255
Tensors = dict[str, Any]


class ControlLora:
    """A random control LoRA of a transformer: by diffusers' names, and as BFL writes it.

    downs, ups, biases: by the names of diffusers' linears. norms: by their weights' names.
    """

    def __init__(self, transformer: Any, seed: int, strength: float = 0.2) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.ups, self.biases, self.norms = {}, {}, {}
        for name, module in transformer.named_modules():
            if isinstance(module, torch.nn.Linear):
                # What is learned for the control picture's channels has to be seen.
                share = 5 * strength if name == "x_embedder" else strength
                size = share * module.weight.detach().std()
                self.ups[name] = size * torch.randn(len(module.weight), RANK, generator=draw)
                self.biases[name] = 0.1 * torch.randn(len(module.weight), generator=draw)
        for name, weight in transformer.named_parameters():
            if ".norm_" in name and weight.ndim == 1:
                self.norms[name] = weight.detach() * (
                    1 + 0.3 * torch.randn(len(weight), generator=draw)
                )
        self._config = dict(transformer.config)
        self._modules = self._find_modules(transformer)
        self.module_downs = {
            module: torch.randn(RANK, self._width(transformer, names[0]), generator=draw)
            for module, names in self._modules.items()
        }
        self.downs = {
            name: self.module_downs[module]
            for module, names in self._modules.items()
            for name in names
        }

    def _find_modules(self, transformer: Any) -> dict[str, list[str]]:
        """The linears that each of BFL's has in it, told by what its conversion puts together."""
        names = list(self.ups)
        marks = {f"{n}.weight": torch.full((2, 1), float(i)) for i, n in enumerate(names)}
        marks |= {f"{n}.bias": torch.zeros(2) for n in names} | self.norms
        found = {}
        for bfl, values in self._bfl(marks):
            if bfl.endswith(".weight"):
                indices = dict.fromkeys(int(v) for v in values.flatten())
                found[bfl.removesuffix(".weight")] = [names[i] for i in indices]
        return found

    def _bfl(self, tensors: Tensors) -> Any:
        from tests.support.checkpoints import _bfl_transformer

        return _bfl_transformer(tensors, self._config)

    @staticmethod
    def _width(transformer: Any, name: str) -> int:
        own = transformer.get_submodule(name).in_features
        return READS if name == "x_embedder" else own

    def write(self, path: Path) -> Path:
        """The file as BFL publishes it, in bfloat16 as its numbers are then."""
        from safetensors.torch import save_file

        tensors = {f"{name}.weight": up for name, up in self.ups.items()}
        tensors |= {f"{name}.bias": bias for name, bias in self.biases.items()}
        stored = {}
        for name, values in self._bfl({**tensors, **self.norms}):
            module, _, kind = name.rpartition(".")
            stored[name if kind == "scale" else f"{module}.lora_B.{kind}"] = values.contiguous()
        for module, down in self.module_downs.items():
            stored[f"{module}.lora_A.weight"] = down
        save_file(stored, path)
        return path

    def load_into(self, transformer: Any, strength: float) -> None:
        """What `load_lora_weights` does, and PEFT with that weight of the adapter."""
        from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

        state = {}
        for name, up in self.ups.items():
            state[f"transformer.{name}.lora_A.weight"] = self.downs[name]
            state[f"transformer.{name}.lora_B.weight"] = up
        norms = {f"transformer.{name}": values for name, values in self.norms.items()}
        assert FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_(
            transformer, state, norms
        )
        FluxLoraLoaderMixin._load_norm_into_transformer(norms, transformer)
        with torch.no_grad():
            for name, up in self.ups.items():
                linear = transformer.get_submodule(name)
                linear.weight += strength * up @ self.downs[name]
                linear.bias += strength * self.biases[name]


@pytest.fixture(scope="module")
def control_lora(
    tmp_path_factory: pytest.TempPathFactory, open_reference: Callable[[str], Any]
) -> tuple[ControlLora, Path]:
    made = ControlLora(open_reference("dev").transformer, seed=1)
    return made, made.write(tmp_path_factory.mktemp("lora") / "canny.safetensors")


@pytest.fixture(scope="module")
def open_merged(
    bundle: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> Callable[..., FluxPipeline]:
    """`open_merged(*loras)`: ours, with the chains of `dev` with the LoRAs in PyTorch."""
    from exporters.checkpoint import open_checkpoint
    from exporters.checkpoint.lora import merge_loras
    from exporters.checkpoint.tasks import TASKS
    from exporters.components.registry import COMPONENTS
    from tests.support.chain_engines import ChainEngine

    def make(*loras: LoraFile) -> FluxPipeline:
        plain = open_bundle(bundle("dev"))
        merged = merge_loras(open_checkpoint(checkpoint("dev")), loras)
        engines = {
            name: ChainEngine(*COMPONENTS[name].source(merged, "fp32"))
            for name in ("transformer", "conditioner")
        }
        records = {
            name: ComponentRecord("", "fp32", "fp32", e.inputs, e.outputs, (), (), None)
            for name, e in engines.items()
        }
        manifest = replace(
            plain.manifest,
            components={**plain.manifest.components, **records},
            tasks=TASKS[merged.task],
            defaults=merged.defaults,
        )
        changed = replace(plain, manifest=manifest)

        def open_component(component: str) -> Any:
            return engines.get(component) or open_engine(changed, component)

        return FluxPipeline(changed, load_tokenizers(plain), open_component)

    return functools.cache(make)


def draw(pipe: FluxPipeline, **options: Any) -> np.ndarray:
    return np.asarray(pipe(**{**CALL, **options}, seed=5, output_type="np").images)


def draw_reference(checkpoint: Path, change: Callable[[Any], None]) -> np.ndarray:
    from diffusers import FluxControlPipeline

    from tests.support.checkpoints import load_diffusers

    parts = load_diffusers(checkpoint).components
    change(parts["transformer"])
    adapters = ("image_encoder", "feature_extractor")
    pipe = FluxControlPipeline(**{n: part for n, part in parts.items() if n not in adapters})
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(5)
    return np.asarray(pipe(**CALL, generator=generator, output_type="np").images)


@pytest.mark.parametrize("strength", [1.0, 0.85])
def test_pictures_equal_diffusers(
    strength: float,
    checkpoint: Callable[[str], Path],
    control_lora: tuple[ControlLora, Path],
    open_merged: Callable[..., FluxPipeline],
) -> None:
    made, path = control_lora
    pipe = open_merged(LoraFile(path, strength))
    assert pipe.bundle.manifest.tasks == ("control",)
    assert pipe.bundle.manifest.defaults.guidance_scale == 10.0
    expected = draw_reference(checkpoint("dev"), lambda t: made.load_into(t, strength))
    assert np.mean((expected > 0) & (expected < 1)) > 0.5, "clipped pixels would hide a difference"
    found = draw(pipe)
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(draw(pipe, control_image=photograph(48, 32, 2)) - found).max() > MOVED


def test_a_style_goes_before_a_control_lora(
    checkpoint: Callable[[str], Path],
    control_lora: tuple[ControlLora, Path],
    open_merged: Callable[..., FluxPipeline],
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    from tests.support.loras import add_lora

    made, path = control_lora
    style = write_lora(tmp_path / "style.safetensors")
    # As many styles do, it changes what the latents' channels alone become.
    first = {"A": torch.randn(2, 64), "B": 0.3 * torch.randn(96, 2)}
    keys = {f"transformer.x_embedder.lora_{k}.weight": v for k, v in first.items()}
    save_file({**load_file(style), **keys}, style)

    def change(transformer: Any) -> None:
        made.load_into(transformer, 1.0)
        add_lora(transformer, style, 0.7)
        with torch.no_grad():
            transformer.x_embedder.weight[:, :64] += 0.7 * first["B"] @ first["A"]

    expected = draw_reference(checkpoint("dev"), change)
    found = draw(open_merged(LoraFile(style, 0.7), LoraFile(path)))
    assert np.abs(found - expected).max() < TOLERANCE


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if pattern not in n}


@pytest.mark.parametrize("lost", [".query_norm.scale", ".lora_B.bias", "img_in."])
def test_what_no_other_lora_has_moves_the_picture(
    lost: str,
    control_lora: tuple[ControlLora, Path],
    open_merged: Callable[..., FluxPipeline],
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(control_lora[1])
    kept = {name: values for name, values in tensors.items() if lost not in name}
    if lost == "img_in.":  # it stays wider, and what is learned for it is gone
        kept |= {n: 0 * v if "lora_B" in n else v for n, v in tensors.items() if lost in n}
    assert kept.keys() != tensors.keys() or lost == "img_in."
    part = tmp_path / "part.safetensors"
    save_file(kept, part)
    other = draw(open_merged(LoraFile(part)))
    assert np.abs(other - draw(open_merged(LoraFile(control_lora[1])))).max() > MOVED


def test_rows_of_a_widened_weight_are_read_alike_however_they_are_cut(
    checkpoint: Callable[[str], Path], control_lora: tuple[ControlLora, Path]
) -> None:
    from exporters.checkpoint import open_checkpoint
    from exporters.checkpoint.lora import merge_loras

    base = open_checkpoint(checkpoint("dev"))
    merged = merge_loras(base, [LoraFile(control_lora[1], 0.5)])
    stored = merged.part("transformer").weights["x_embedder.weight"]
    whole = stored.read()
    assert stored.shape == (96, READS)
    made = control_lora[0]
    expected = 0.5 * (made.ups["x_embedder"] @ made.downs["x_embedder"]).numpy()
    expected[:, :64] += base.part("transformer").weights["x_embedder.weight"].read().reshape(96, 64)
    np.testing.assert_allclose(whole.reshape(96, READS), expected, atol=1e-6)
    for start, stop in ((0, 1), (63, 66), (127, 129), (1000, 3000)):
        np.testing.assert_array_equal(stored.read(start, stop), whole[start:stop])
    np.testing.assert_array_equal(stored.rows(5, 9).read(), whole[5 * READS : 9 * READS])
    assert not stored.as_stored


def test_what_is_calibrated_is_the_model_with_its_control_lora(
    checkpoint: Callable[[str], Path], control_lora: tuple[ControlLora, Path], tmp_path: Path
) -> None:
    from exporters.checkpoint import open_checkpoint
    from exporters.checkpoint.lora import merge_loras
    from fluxdeploy.build.checkpoint import CheckpointHashes, calibration_digest

    base = open_checkpoint(checkpoint("dev"))
    control = LoraFile(control_lora[1], 0.85)
    style = LoraFile(write_lora(tmp_path / "style.safetensors"))
    both = merge_loras(base, [style, control])
    assert [each.name for each in both.loras] == ["style.safetensors", "canny.safetensors"]
    assert both.unmerged.task == "control"
    assert [each.name for each in both.unmerged.loras] == ["canny.safetensors"]
    assert both.notices == base.notices
    hashes = CheckpointHashes({}, "0")
    digests = [
        calibration_digest(merge_loras(base, loras), hashes)
        for loras in ([], [style], [control], [style, control], [LoraFile(control.path, 1.0)])
    ]
    assert digests[0] == digests[1] == "0"
    assert digests[2] == digests[3]
    assert len({digests[0], digests[2], digests[4]}) == 3


def refuse(checkpoint: Path, loras: Sequence[Path], said: str) -> None:
    from exporters.checkpoint import open_checkpoint
    from exporters.checkpoint.lora import merge_loras

    with pytest.raises(CheckpointError, match=said) as caught:
        merge_loras(open_checkpoint(checkpoint), [LoraFile(path) for path in loras])
    assert str(loras[0]) in str(caught.value)


def test_what_cannot_be_merged_is_refused_by_name(
    checkpoint: Callable[[str], Path], control_lora: tuple[ControlLora, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    def variant(name: str, change: Callable[[Tensors], Tensors]) -> Path:
        save_file(change(load_file(path)), tmp_path / name)
        return tmp_path / name

    _, path = control_lora
    refuse(checkpoint("dev"), [path, path], "each make the model read more channels")
    norms = variant("norms.safetensors", lambda t: {n: v for n, v in t.items() if "norm" in n})
    refuse(checkpoint("dev"), [path, norms], "both bring their own transformer_blocks.0.attn.norm")
    refuse(checkpoint("fill"), [path], "more blocks|another model")
    refuse(checkpoint("kontext"), [path], "is one for kontext|more blocks|another model")
    odd = {"img_in.lora_A.weight": torch.ones(RANK, 100)}
    wide = variant("wide.safetensors", lambda t: t | odd)
    refuse(checkpoint("dev"), [wide], "read 100 channels; FLUX.1's read 64 for text")
    thin = {"img_in.lora_A.weight": torch.ones(RANK, 32)}
    refuse(checkpoint("dev"), [variant("thin", lambda t: t | thin)], r"\[96, 32\].* another model")
    key = "double_blocks.0.img_attn.norm.query_norm.scale"
    short = variant("short", lambda t: t | {key: torch.ones(7)})
    refuse(checkpoint("dev"), [short], r"query_norm.scale of .* has shape \[7\]")
    bias = variant("bias", lambda t: t | {"img_in.lora_B.bias": torch.ones(7)})
    refuse(checkpoint("dev"), [bias], r"img_in.lora_B.bias .* has shape \[7\]")
    lost = variant("lost", without("img_mlp.0.lora_A"))
    refuse(checkpoint("dev"), [lost], "lacks its factor `down`")


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ("_norm.scale", r"replaces norms, by its key \S+_norm.scale"),
        ("txt_in", "adds to biases, by its key txt_in.lora_B.bias"),
        ("img_in.lora_A", "takes tokens of 128 channels, by its key img_in.lora_A.weight"),
    ],
)
def test_with_a_call_a_control_lora_is_refused(
    kept: str, said: str, control_lora: tuple[ControlLora, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    made, path = control_lora
    linears = {n: (len(up), made.downs[n].shape[1]) for n, up in made.ups.items()}
    linears["x_embedder"] = (96, 64)
    part = {name: values for name, values in load_file(path).items() if kept in name}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=f"{said}, as control LoRAs do.*build --lora"):
        read_lora(tmp_path / "part.safetensors", {"transformer": linears})
