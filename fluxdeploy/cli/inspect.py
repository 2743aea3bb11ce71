"""`fluxdeploy inspect`: what a bundle or a picture holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxdeploy.cli.options import PathType
from fluxdeploy.errors import FluxDeployError, UsageError
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say_json, show

if TYPE_CHECKING:
    from rich.table import Table

    from fluxdeploy.bundle import Bundle
    from fluxdeploy.bundle.manifest import ComponentRecord, DimensionRange, Manifest

_SYMBOLS = {
    "B": "prompts or pictures",
    "S": "text tokens",
    "L": "image tokens",
    "T": "text and image tokens",
    "V": "tokens of pictures for an IP-Adapter",
    "N": "steps",
    "H": "pixels, height",
    "W": "pixels, width",
    "h": "latents, height",
    "w": "latents, width",
    "R": "rank of LoRAs",
}
"""What the dimensions of tensors are called, in the order in which they are shown."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@click.command()
@click.argument("path", type=PathType(), default="bundle")
@click.option("--check", is_flag=True, help="Compare every file with its recorded SHA-256.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: Path, check: bool, as_json: bool) -> None:
    """Show what a bundle or a picture holds.

    PATH is a bundle (`bundle` where it is not given) or a PNG that `generate` wrote. Of a bundle it
    shows each component with its precision, size, engines and the dimensions they accept, then
    the constants that a host needs and where the bundle came from, and of one for several runtimes
    which edition runs here; of a picture the prompt, seed
    and steps that made it.

    \b
    Examples:
      fluxdeploy inspect
      fluxdeploy inspect flux-dev --check
      fluxdeploy inspect image.png --json | jq .metadata.seed
    """
    if path.suffix.lower() == ".png" and not path.exists():
        raise FluxDeployError(f"There is no picture at {path}. Check the path.")
    if path.is_file():
        _inspect_picture(path, check=check, as_json=as_json)
    else:
        _inspect_bundle(path, check=check, as_json=as_json)


def _inspect_picture(path: Path, *, check: bool, as_json: bool) -> None:
    from fluxdeploy.host.pictures import read_metadata

    with path.open("rb") as file:
        if file.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
            raise UsageError(f"{path} is neither a bundle's folder nor a PNG.")
    if check:
        raise UsageError("--check is for bundles: a picture has no recorded hash.")
    metadata = asdict(read_metadata(path))
    if as_json:
        report = {"path": str(path), "metadata": metadata}
        say_json(report, indent=2)
        return
    table = _make_grid()
    for key, value in metadata.items():
        if value is not None:
            table.add_row(key, str(value))
    show(table)


def _inspect_bundle(path: Path, *, check: bool, as_json: bool) -> None:
    from fluxdeploy.bundle import open_bundle
    from fluxdeploy.bundle.manifest_json import to_json

    bundle = open_bundle(path)
    if check:
        sizes = {record.path: record.size for _, record in bundle.manifest.files()}
        with Progress(quiet=as_json) as progress:
            task = progress.task("Checking every file", total=sum(sizes.values()))
            bundle = open_bundle(path, check="all", on_bytes=task.advance)
            task.finish()
    if as_json:
        report = {
            "path": str(bundle.root),
            "content_hash": bundle.content_hash,
            "checked": "all" if check else "small",
            "manifest": json.loads(to_json(bundle.manifest)),
        }
        say_json(report, indent=2)
        return
    editions = bundle.manifest.each()
    for edition in editions:
        if len(editions) > 1:
            show(f"Edition for {_where(edition)}", "")
        show(_tabulate_components(edition), "", *_recipes(edition))
        show(_tabulate_dimensions(edition), "")
    show(_tabulate_constants(bundle, check=check))


def _where(edition: Manifest) -> str:
    """What an edition is for, and whether this machine runs it."""
    from engines import edition_runs_here

    targets = {e.target: None for r in edition.components.values() for e in r.engines}
    here = "runs here" if edition_runs_here(edition) else "does not run here"
    return f"{edition.runtime} on {', '.join(targets)}, {here}"


def _recipes(edition: Manifest) -> Iterator[str]:
    """What quantized components leave in wider numbers, and what they keep of their quality."""
    from fluxdeploy.build.quality import tell_recipe

    components = edition.components
    lines = [
        line
        for name, record in components.items()
        if record.recipe is not None
        for line in tell_recipe(name, record.recipe, record.compute)
    ]
    yield from lines
    if lines:
        yield ""


def _tabulate_components(edition: Manifest) -> Table:
    table = _make_table("component", "precision", "size", "engine")
    for name, component in edition.components.items():
        first = (name, component.precision, _format_size(_total_size(component)))
        engines = [f"{e.runtime} {e.runtime_version} {e.target}" for e in component.engines]
        for row, engine in enumerate(engines or ["none"]):
            table.add_row(*(first if row == 0 else ("", "", "")), engine)
    return table


def _tabulate_dimensions(edition: Manifest) -> Table:
    """What engines take: a row for each range of a size, with the components that have it."""
    rows: dict[tuple[str, DimensionRange], dict[str, None]] = {}
    for name, component in edition.components.items():
        differ = any(e.dimensions != component.engines[0].dimensions for e in component.engines)
        for engine in component.engines:
            who = f"{name} on {engine.target}" if differ else name
            for symbol, size in engine.dimensions.items():
                rows.setdefault((symbol, size), {})[who] = None
    table = _make_table("engines take", "least", "usual", "most", "for")
    order = list(_SYMBOLS)
    for (symbol, size), names in sorted(
        rows.items(), key=lambda row: order.index(row[0][0]) if row[0][0] in order else len(order)
    ):
        words = f"{symbol}  {_SYMBOLS.get(symbol, '')}".rstrip()
        who = "all" if names.keys() == edition.components.keys() else ", ".join(names)
        table.add_row(words, str(size.min), str(size.opt), str(size.max), who)
    return table


def _tabulate_constants(bundle: Bundle, *, check: bool) -> Table:
    manifest = bundle.manifest
    latents, rope, schedule = manifest.latents, manifest.rope, manifest.schedule
    defaults = manifest.defaults
    table = _make_grid()
    table.add_row("bundle", str(bundle.root))
    table.add_row("hash", bundle.content_hash)
    if manifest.editions:
        table.add_row("size", _sizes(manifest))
    table.add_row("files", "every SHA-256 matches" if check else "not hashed; --check does")
    guidance = "with" if manifest.guidance_embedding else "without"
    table.add_row("model", f"{manifest.family} {manifest.variant}, {guidance} guidance embedding")
    table.add_row("tasks", ", ".join(manifest.tasks))
    for controlnet in manifest.controlnets:
        kinds = f"{controlnet.modes} kinds" if controlnet.modes else "one kind"
        table.add_row(controlnet.component, f"{kinds} of control")
    if manifest.ip_adapter is not None:
        blocks, _, tokens, _ = manifest.components["ip_adapter"].outputs[0].shape
        table.add_row("ip_adapter", f"{tokens} tokens of a picture for {blocks} blocks")
    if manifest.redux is not None:
        height, width = manifest.redux.size
        table.add_row("redux", f"reads pictures as {width} x {height} pixels")
    table.add_row(
        "defaults",
        f"{defaults.width} x {defaults.height}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale:g}, {defaults.max_sequence_length} text tokens, "
        f"strength {defaults.strength:g}",
    )
    table.add_row(
        "latents",
        f"{latents.channels} channels, 1/{latents.spatial_factor} of the picture, "
        f"patch {latents.patch_size}, scale {latents.scaling_factor:g}, "
        f"shift {latents.shift_factor:g}",
    )
    table.add_row("rope", f"axes {' + '.join(map(str, rope.axes_dims))}, theta {rope.theta:g}")
    if schedule.use_dynamic_shifting:
        shift = (
            f"{schedule.time_shift_type} shift {schedule.base_shift:g} at "
            f"{schedule.base_image_seq_len} tokens to {schedule.max_shift:g} at "
            f"{schedule.max_image_seq_len}"
        )
    else:
        shift = f"shift {schedule.shift:g}"
    if schedule.spacing is not None:
        shift += f", {schedule.spacing} spacing"
    table.add_row("schedule", shift)
    for record in manifest.skips:
        table.add_row(
            "skips",
            f"{', '.join(map(str, record.steps))} of {record.num_inference_steps} steps of "
            f"{record.sampler}, order {record.order}: {record.psnr:.1f} dB at "
            f"{record.width} x {record.height}",
        )
    for name, tokenizer in manifest.tokenizers.items():
        table.add_row(name, f"{tokenizer.path}, at most {tokenizer.max_length} tokens")
    for key, value in manifest.provenance.items():
        table.add_row(key, _plain(value))
    return table


def _sizes(manifest: Manifest) -> str:
    """Of all files, each counted once, and what one edition would take by itself."""

    def size(of: Manifest) -> str:
        return _format_size(sum({r.path: r.size for _, r in of.files()}.values()))

    alone = ", ".join(f"{each.runtime} {size(each)}" for each in manifest.each())
    return f"{size(manifest)}; alone: {alone}"


def _total_size(component: ComponentRecord) -> int:
    return sum(file.size for file in component.files)


def _format_size(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _make_table(*headings: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        number = heading in ("size", "least", "usual", "most")
        table.add_column(heading, overflow="fold", justify="right" if number else "left")
    return table


def _make_grid() -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
