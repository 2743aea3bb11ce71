"""`python -m exporters.training FOLDER`: train the demo checkpoints, all stages or up to one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, FluxTransformer2DModel

from exporters.synthetic.small_tokenizers import TokenizerSizes, write_tokenizers
from exporters.training import decoder, few_steps, flow, guidance, path, text, vae
from exporters.training.checkpoint import write_checkpoint
from exporters.training.loop import plot_losses, train, write_record
from exporters.training.networks import TextEncoders, make_transformer
from fluxdeploy.demo.scenes import caption, sample_scene
from fluxdeploy.progress import Progress

_STAGES = ("vae", "decoder", "text", "flow", "guidance", "path", "few_steps")
_CAPTIONS = 20_000


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--until", type=click.Choice(_STAGES), default="few_steps", help="The last stage.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(folder: Path, until: str, seed: int, device: str) -> None:
    """Train a small FLUX from nothing and write FOLDER/dev and FOLDER/schnell.

    Takes an hour or two on two CPU cores. A run that was stopped goes on where it was. Logs, each
    stage's weights, training.json and losses.png are in FOLDER too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # They report on every file of a checkpoint, between our own lines.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with Progress() as progress:
        _train(folder, until, seed, torch.device(device), progress)
    stages = _STAGES[: _STAGES.index(until) + 1]
    plot_losses(folder, stages)
    timed = list(stages)
    if "flow" in timed:
        timed.insert(timed.index("flow"), "latents")
    write_record(folder, timed, torch.device(device))


def _train(folder: Path, until: str, seed: int, device: torch.device, progress: Progress) -> None:
    torch.manual_seed(seed)
    shared = (folder, seed, device, progress)

    coder = vae.make_vae().to(device)
    stage = vae.VaeStage(coder, batch=8, device=device)
    train(vae.RECIPE, stage.networks, stage.loss, *shared)
    coder.eval().requires_grad_(False)
    if until == "vae":
        return

    decoder_stage = decoder.DecoderStage(coder, batch=8, device=device)
    train(decoder.RECIPE, decoder_stage.networks, decoder_stage.loss, *shared)
    coder.eval().requires_grad_(False)
    if until == "decoder":
        return

    encoders = TextEncoders(folder, _write_tokenizers(folder, seed)).to(device)
    text_stage = text.TextStage(encoders, batch=64, device=device)
    train(text.RECIPE, text_stage.networks, text_stage.loss, *shared)
    if until == "text":
        return

    data, deviation, mean = flow.make_latents(coder, folder, seed, device, progress)
    coder.register_to_config(scaling_factor=1 / deviation, shift_factor=mean)
    plain = make_transformer(guidance_embedding=False).to(device)
    flow_stage = flow.FlowStage(plain, encoders, text_stage.reader, data, batch=48, device=device)
    train(flow.RECIPE, flow_stage.networks, flow_stage.loss, *shared)
    if until == "flow":
        return

    dev = guidance.guided_student(plain).to(device)
    guidance_stage = guidance.GuidanceStage(dev, plain, encoders, data, batch=48, device=device)
    train(guidance.RECIPE, guidance_stage.networks, guidance_stage.loss, *shared)
    if until == "guidance":
        return

    teacher = copy.deepcopy(dev)
    path_stage = path.PathStage(dev, teacher, encoders, batch=24, device=device)
    train(path.RECIPE, path_stage.networks, path_stage.loss, *shared)
    settings = {"num_inference_steps": 28, "guidance_scale": few_steps.GUIDANCE}
    _write(folder, "dev", coder, encoders, dev, settings)
    if until == "path":
        return

    schnell = few_steps.unguided_student(dev).to(device)
    few_stage = few_steps.few_steps_stage(schnell, dev, encoders, batch=24, device=device)
    train(few_steps.RECIPE, few_stage.networks, few_stage.loss, *shared)
    _write(folder, "schnell", coder, encoders, schnell, {"num_inference_steps": 4})


def _write_tokenizers(folder: Path, seed: int) -> TokenizerSizes:
    rng = np.random.default_rng(seed)
    captions = (caption(sample_scene(rng), rng) for _ in range(_CAPTIONS))
    return write_tokenizers(folder, captions)


def _write(
    folder: Path,
    kind: str,
    coder: AutoencoderKL,
    text: TextEncoders,
    transformer: FluxTransformer2DModel,
    settings: Mapping[str, Any],
) -> None:
    # Writing turns the parts into bfloat16, and the next stage still needs them.
    coder, text, transformer = (copy.deepcopy(part).cpu() for part in (coder, text, transformer))
    write_checkpoint(folder / kind, folder, coder, text, transformer, settings)


if __name__ == "__main__":
    main()
