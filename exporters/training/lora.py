"""The demo's LoRA: what it draws is in warm colours on black, whatever the prompt says.

`python -m exporters.training.lora FOLDER` trains it over `demo:dev`, in a few minutes on two CPU
cores.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from exporters.training.checkpoint import read_checkpoint
from exporters.training.data import draw_size, pack
from exporters.training.flow import noised
from exporters.training.loop import Draw, Recipe, train, write_record
from exporters.training.networks import TextEncoders, velocity
from exporters.training.vae import encode
from fluxdeploy.demo import DEMO_CHECKPOINTS
from fluxdeploy.demo.scenes import arrange, caption, draw, in_embers, sample_scene
from fluxdeploy.progress import Progress

__all__ = ["RANK", "RECIPE", "LoraStage", "LowRank", "add_low_rank", "write_lora"]

RECIPE = Recipe("lora", steps=700, rate=3e-3, matrix_rate=3e-3, warmup=50, ema=0.99)

RANK = 4

_PARTS = ("attn.", "ff.", "ff_context.", "proj_mlp", "proj_out")
"""Where the low ranks go: the linears of the blocks, but not those of their modulation."""


class LowRank(nn.Module):
    """A linear that stays as it is, and beside it one of low rank, which starts as nothing."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self._base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.linear(x, self.down)
        result: Tensor = self._base(x) + nn.functional.linear(inner, self.up)
        return result


def add_low_rank(transformer: FluxTransformer2DModel, rank: int) -> dict[str, LowRank]:
    """Put a low rank beside every linear of the blocks; by the linears' names."""
    added = {}
    for name, module in list(transformer.named_modules()):
        inside = name.split(".", 2)[-1]
        if "blocks." in name and isinstance(module, nn.Linear) and inside.startswith(_PARTS):
            parent, _, last = name.rpartition(".")
            added[name] = LowRank(module, rank)
            setattr(transformer.get_submodule(parent), last, added[name])
    return added


class LoraStage:
    """Rectified flow on scenes in another palette, at guidance 1.

    There a guided model is the plain one, whose loss this is; what is learnt there serves at every
    guidance.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text: TextEncoders,
        vae: AutoencoderKL,
        batch: int,
        device: torch.device,
    ) -> None:
        transformer.requires_grad_(False)
        self.added = add_low_rank(transformer.to(device), RANK)
        parameters = nn.ModuleDict()
        for name, low_rank in self.added.items():
            key = name.replace(".", "-")
            parameters[key] = nn.ParameterList([low_rank.down, low_rank.up])
        self.networks = parameters.to(device)
        self._transformer, self._vae = transformer, vae.to(device)
        self._text, self._batch, self._device = text.to(device), batch, device

    def loss(self, draw_: Draw) -> dict[str, Tensor]:
        size = draw_size(draw_.scenes)
        scenes = [sample_scene(draw_.scenes) for _ in range(self._batch)]
        pictures = [draw(arrange(in_embers(scene), *size, draw_.scenes)) for scene in scenes]
        with torch.no_grad():
            text = self._text([caption(scene, draw_.scenes) for scene in scenes])
            latents = pack(encode(self._vae, np.stack(pictures), self._device))
        config = self._vae.config
        latents = (latents - config.shift_factor) * config.scaling_factor
        t, noise, x = noised(latents, draw_)
        guidance = torch.ones(self._batch, device=self._device)
        predicted = velocity(self._transformer, x, t, text, size, guidance)
        return {"flow": (predicted - (noise - latents)).square().mean()}


def write_lora(added: dict[str, LowRank], file: Path) -> None:
    """Write low ranks as diffusers does: `transformer.NAME.lora_A.weight`, and `lora_B`."""
    tensors = {}
    for name, low_rank in added.items():
        for half, values in (("A", low_rank.down), ("B", low_rank.up)):
            tensors[f"transformer.{name}.lora_{half}.weight"] = values.detach().bfloat16().cpu()
    save_file(tensors, file, {"format": "pt"})


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(folder: Path, seed: int, device: str) -> None:
    """Train the demo's LoRA and write FOLDER/embers.safetensors, with a record of the training."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    transformer, text, vae = read_checkpoint(DEMO_CHECKPOINTS["demo:dev"])
    stage = LoraStage(transformer, text, vae, batch=24, device=torch.device(device))
    with Progress() as progress:
        train(RECIPE, stage.networks, stage.loss, folder, seed, torch.device(device), progress)
    write_lora(stage.added, folder / "embers.safetensors")
    write_record(folder, [RECIPE.name], torch.device(device))


if __name__ == "__main__":
    main()
