"""Options that several commands share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from fluxdeploy.bundle.recipe import Promise
from fluxdeploy.errors import UsageError
from fluxdeploy.lora import parse_lora
from fluxdeploy.precision import DEFAULT_PRECISION, PRECISIONS

__all__ = [
    "AS_JSON",
    "BASE",
    "BUNDLE",
    "CALIBRATION",
    "CHECKPOINT",
    "CHECKPOINT_NAME",
    "COMPONENT_PRECISION",
    "DEVICE",
    "FILE",
    "FOLDER",
    "MAX_BATCH",
    "MAX_SIZE",
    "MIN_SIZE",
    "OPT_SIZE",
    "PRECISION",
    "PROMPTS",
    "QUALITY",
    "QUALITY_TYPE",
    "REPLACE",
    "REPORT",
    "RUNTIME",
    "RUNTIMES",
    "SIZE",
    "STRICT",
    "TARGETS",
    "THREADS",
    "WEIGHT_STREAMING",
    "WORKSPACE",
    "PathType",
    "complete_component",
    "complete_peer",
    "component_precisions",
]

_COMPONENTS = ("clip", "t5", "conditioner", "transformer", "vae_decoder", "vae_encoder")
"""For completion alone: the registry of components takes seconds to import."""


class PathType(click.Path):
    """A path, in which `~` is the user's home: shells leave it alone in `--out=~/bundle`.

    folder: completion offers folders, and no files.
    """

    def __init__(self, *, folder: bool = False, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)
        self._folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir" if self._folder else "file")]


FOLDER = PathType(folder=True)
"""A folder of ours, such as a bundle. Whether it is one is said by what opens or makes it."""

FILE = PathType(dir_okay=False)


class _CheckpointType(click.ParamType):  # type: ignore[type-arg]
    """A path, a hub id, or the name of a checkpoint that comes with the package."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return os.path.expanduser(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from fluxdeploy.demo import DEMO_CHECKPOINTS

        files = CompletionItem(incomplete, type="file")
        return [*_beginning(incomplete, DEMO_CHECKPOINTS), files]


class _LoraType(click.ParamType):  # type: ignore[type-arg]
    """FILE or FILE:SCALE, or a name of `DEMO_LORAS` for the file; gives a `LoraFile`."""

    name = "lora"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from fluxdeploy.demo import DEMO_LORAS

        def place(name: str) -> Path:
            return DEMO_LORAS.get(name, Path(os.path.expanduser(name)))

        try:
            found = parse_lora(value, place)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        if value.startswith("demo:") and str(found.path) == value and not found.path.exists():
            names = " and ".join(DEMO_LORAS)
            self.fail(f"There is no LoRA {value!r}. The package comes with {names}.", param, ctx)
        return found

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from fluxdeploy.demo import DEMO_LORAS

        files = CompletionItem(incomplete, type="file")
        return [*_beginning(incomplete, DEMO_LORAS), files]


class _SizeType(click.ParamType):  # type: ignore[type-arg]
    """WIDTHxHEIGHT in pixels, or one number for a square; gives (height, width)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", value.strip().lower())
        if found is None:
            self.fail(
                f"{value!r} is not WIDTHxHEIGHT in pixels, such as 1024x768, or 512 for a square.",
                param,
                ctx,
            )
        return int(found[2] or found[1]), int(found[1])


class _QualityType(click.ParamType):  # type: ignore[type-arg]
    """What pictures have to keep: a PSNR in dB, `cosine=X`, or `none`; gives a `Promise`."""

    name = "quality"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = value.strip().lower()
        if text == "none":
            return Promise()
        kind, separator, number = text.rpartition("=")
        try:
            found = float(number)
        except ValueError:
            found = math.nan
        if kind == "cosine" and 0 < found < 1:
            return Promise(cosine=found)
        if separator or not 1 <= found <= _MOST_DECIBELS:
            self.fail(
                f"{value!r} is neither a PSNR from 1 to {_MOST_DECIBELS} dB, such as 30, nor a "
                "cosine between 0 and 1, such as cosine=0.995, nor none.",
                param,
                ctx,
            )
        return Promise(psnr=found)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return _beginning(incomplete, ("none", "cosine="))


_MOST_DECIBELS = 100
QUALITY_TYPE = _QualityType()


def _beginning(incomplete: str, words: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _complete_runtime(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from engines import AUTO, runtime_names

    return _beginning(incomplete, (AUTO, *runtime_names()))


def _complete_target(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The targets of the runtime that is named before, else of all."""
    from engines import AUTO, runtime_names, runtimes

    named = ctx.params.get("runtime", AUTO)
    known = runtimes(named if named in runtime_names() else AUTO)
    return _beginning(incomplete, dict.fromkeys(t for r in known for t in r.targets))


def complete_component(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The components, by name."""
    return _beginning(incomplete, _COMPONENTS)


def _complete_component_precision(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """NAME=, and then the precisions."""
    name, separator, _ = incomplete.partition("=")
    ends = PRECISIONS if separator else ("",)
    names = [name] if separator else _COMPONENTS
    return _beginning(incomplete, (f"{name}={end}" for name in names for end in ends))


def complete_sampler(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The samplers, by name."""
    from fluxdeploy.sampling.sampler import sampler_names

    return _beginning(incomplete, sampler_names())


def complete_peer(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The peer after the last comma."""
    from fluxdeploy.bench.job import PEERS

    before, comma, _ = incomplete.rpartition(",")
    return _beginning(incomplete, (f"{before}{comma}{peer}" for peer in PEERS))


CHECKPOINT_NAME = _CheckpointType()
SIZE = _SizeType()

CHECKPOINT = click.argument("checkpoint", required=False, type=CHECKPOINT_NAME)

BASE = click.option(
    "--base",
    type=FOLDER,
    help="A folder with what a checkpoint of a single file lacks: tokenizer/ and tokenizer_2/, and "
    "any of text_encoder/, text_encoder_2/, vae/ and scheduler/, as in diffusers layout.",
)

TASK = click.option(
    "--task",
    type=click.Choice(["kontext"]),
    help="What a checkpoint is for that does not tell: a file of FLUX.1 Kontext has the tensors of "
    "FLUX.1-dev.",
)

PRECISION = click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default=DEFAULT_PRECISION,
    help="What the transformer computes in; the other components follow.",
)

CALIBRATION = click.option(
    "--calibration",
    type=PathType(exists=True, dir_okay=False),
    help="For static scales: a text file with a prompt a line to measure activations with, or the "
    "calibration.json of an earlier build of the same checkpoint.  [default: prompts of our own]",
)

CONTROLNETS = click.option(
    "--controlnet",
    "controlnets",
    multiple=True,
    type=FOLDER,
    metavar="FOLDER",
    help="Put this ControlNet into the bundle: a folder in diffusers layout. May be given several "
    "times; what they add is summed.",
)


def _one_adapter(
    context: click.Context, option: click.Parameter, given: tuple[Path, ...]
) -> Path | None:
    if len(given) > 1:
        raise UsageError(f"There are {len(given)} IP-Adapters. A bundle has one: give one.")
    return given[0] if given else None


IP_ADAPTER = click.option(
    "--ip-adapter",
    type=PathType(),
    multiple=True,
    callback=_one_adapter,
    metavar="PATH",
    help="Put this IP-Adapter into the bundle: XLabs' ip_adapter.safetensors, or its folder.",
)

IMAGE_ENCODER = click.option(
    "--image-encoder",
    type=FOLDER,
    metavar="FOLDER",
    help="The CLIP vision encoder of --ip-adapter.  [default: image_encoder/ beside its file]",
)

REDUX = click.option(
    "--redux",
    type=FOLDER,
    help="Put this FLUX.1 Redux into the bundle, which makes text of pictures: a folder in "
    "diffusers layout, with its SigLIP.",
)

LORAS = click.option(
    "--lora",
    "loras",
    multiple=True,
    type=_LoraType(),
    metavar="FILE[:SCALE]",
    help="Merge this LoRA into the weights, with this strength (1 where none is given): a file, or "
    "demo:embers, which comes with the package. May be given several times.",
)

LORA_RANK = click.option(
    "--lora-rank",
    type=int,
    default=0,
    metavar="R",
    help="Leave room beside every linear of the transformer for LoRAs that come with a call, whose "
    "ranks add up to R: `generate --lora`.",
)

CALL_LORAS = click.option(
    "--lora",
    "loras",
    multiple=True,
    type=_LoraType(),
    metavar="FILE[:SCALE]",
    help="Draw with this LoRA, with this strength (1 where none is given), in a bundle that was "
    "built with --lora-rank. May be given several times.",
)

BUNDLE = click.option(
    "--bundle",
    type=FOLDER,
    default="bundle",
    help="The folder that `build` wrote.",
)

RUNTIME = click.option(
    "--runtime",
    default="auto",
    shell_complete=_complete_runtime,
    help="What runs the engines; `doctor` lists what this machine has.",
)

RUNTIMES = click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    default=("auto",),
    shell_complete=_complete_runtime,
    help="What will run the engines; `doctor` lists what this machine has. May be given several "
    "times: the bundle then has an edition for each.  [default: the best one for the targets]",
)

TARGETS = click.option(
    "--target",
    "targets",
    multiple=True,
    shell_complete=_complete_target,
    help="What the engines are for: cpu, cuda, or a GPU's compute capability such as sm89. May be "
    "given several times.  [default: the best here]",
)

THREADS = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads, at most those of the machine.  [default: the runtime's choice]",
)

DEVICE = click.option(
    "--device",
    type=click.IntRange(min=0),
    default=0,
    help="Which GPU, by its number, where there are several.",
)


MIN_SIZE = click.option(
    "--min-size",
    type=SIZE,
    metavar="WxH",
    help="Tuned engines: the smallest picture.  [default: a quarter of --opt-size each way]",
)

OPT_SIZE = click.option(
    "--opt-size",
    type=SIZE,
    metavar="WxH",
    help="Tuned engines: the picture that they are best at.  [default: the checkpoint's]",
)

MAX_SIZE = click.option(
    "--max-size",
    type=SIZE,
    metavar="WxH",
    help="Tuned engines: the largest picture. Any proportions with as many pixels will "
    "do.  [default: twice --opt-size each way]",
)

MAX_BATCH = click.option(
    "--max-batch",
    type=click.IntRange(min=1, max=64),
    default=1,
    help="Tuned engines: pictures that one computes at once. Larger batches run in parts.",
)

WORKSPACE = click.option(
    "--workspace",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="TensorRT: limit of the scratch memory of a kernel.",
)

WEIGHT_STREAMING = click.option(
    "--weight-streaming",
    is_flag=True,
    help="TensorRT: engines that can run with weights that do not all fit on the GPU.",
)

QUALITY = click.option(
    "--quality",
    type=QUALITY_TYPE,
    metavar="DB|cosine=X|none",
    help="What pictures keep in few bits: PSNR against float32 in dB, or the cosine of a step's "
    "velocity. Layers stay in wider numbers until it is kept; `none` looks at nothing.  [default: "
    "what the precision promises]",
)

PROMPTS = click.option(
    "--prompts",
    type=PathType(exists=True, dir_okay=False),
    metavar="FILE",
    help="Draw these prompts, one a line, and compare their pictures with PyTorch's.",
)

REPORT = click.option(
    "--report",
    "page",
    type=FILE,
    metavar="FILE",
    help="Write what was compared, and the pictures side by side, into this HTML page.",
)

STRICT = click.option(
    "--strict",
    is_flag=True,
    help="Fail where a precision keeps its quality only with some layers in wider numbers, and "
    "where a runtime does not fuse an attention, or widens a layer.",
)

REPLACE = click.option(
    "--replace",
    is_flag=True,
    help="Keep nothing of the bundle that is there: neither its editions for other runtimes, nor "
    "that it runs on this machine.",
)

AS_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, and no progress."
)

COMPONENT_PRECISION = click.option(
    "--component-precision",
    multiple=True,
    metavar="NAME=PRECISION",
    shell_complete=_complete_component_precision,
    help="Override one component, such as t5=fp32. May be given several times.",
)


def component_precisions(values: tuple[str, ...]) -> dict[str, str]:
    """NAME=PRECISION pairs as a mapping. Raises `UsageError` for anything else."""
    pairs = {}
    for value in values:
        name, separator, precision = value.partition("=")
        if not separator or precision not in PRECISIONS:
            raise UsageError(
                f"--component-precision {value!r} is not NAME=PRECISION with one of "
                f"{', '.join(PRECISIONS)}."
            )
        pairs[name] = precision
    return pairs
