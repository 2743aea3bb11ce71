"""A verification as one HTML page: what was compared, and the pictures side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluxdeploy.bundle import Bundle
from fluxdeploy.bundle.files import write_atomic
from fluxdeploy.errors import UsageError
from fluxdeploy.host.pictures import to_pil
from fluxdeploy.machine import describe_cpu

if TYPE_CHECKING:
    from fluxdeploy.verify.pictures import PicturesReport
    from fluxdeploy.verify.verify import VerifyReport

__all__ = ["check_page", "write_page"]

_GAIN = 8
"""How many times the difference of two pictures is shown: eight-bit screens hide it otherwise."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem;
  padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd;
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.failed { color: #b00020; font-weight: 600; } .note { color: #555; }
figure { margin: 1.2rem 0; } figcaption { margin-bottom: .4rem; }
.row { display: flex; gap: 1rem; flex-wrap: wrap; }
.row div { flex: 1 1 12rem; max-width: 24rem; }
.row img { width: 100%; image-rendering: auto; border: 1px solid #ccc; }
"""


def check_page(path: Path) -> None:
    """Say what will keep a page from being written, before the long work that leads to it.

    Raises `UsageError` for a path that cannot be.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--report {path} cannot be written: give a file in a folder that exists.")


def write_page(report: VerifyReport, bundle: Bundle, path: Path) -> None:
    """Write the page, with all that it shows in it.

    Raises `BundleError` where the disk refuses.
    """
    write_atomic(path, "\n".join(_page(report, bundle)) + "\n")


def _page(report: VerifyReport, bundle: Bundle) -> Iterator[str]:
    transformer = bundle.manifest.components["transformer"].precision
    title = f"{bundle.root.name}: {transformer} against PyTorch float32"
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{escape(title)}</h1>"
    verdict = "All is within its gate." if report.passed else "Not all is within its gate."
    yield f'<p class="{"note" if report.passed else "failed"}">{verdict}</p>'
    yield f'<p class="note">{escape(_circumstances(report, bundle))}</p>'
    yield from _components(report)
    yield from _recipes(bundle)
    if report.pictures is not None:
        yield from _pictures(report.pictures)
    yield "</body></html>"


def _circumstances(report: VerifyReport, bundle: Bundle) -> str:
    engines = dict.fromkeys(
        f"{engine.runtime} {engine.runtime_version} on {engine.target}"
        for record in bundle.manifest.components.values()
        for engine in record.engines
    )
    words = [f"Engines: {', '.join(engines)}."]
    if report.emulated:
        names = ", ".join(report.emulated)
        words.append(
            f"Emulated on this machine: {names}; the numbers are theirs, the seconds are not."
        )
    words.append(f"Measured on {describe_cpu()['name']}.")
    words.append(f"Bundle {report.bundle_hash[:12]}.")
    return " ".join(words)


def _components(report: VerifyReport) -> Iterator[str]:
    seconds = {} if report.pictures is None else report.pictures.seconds
    yield "<h2>Components</h2><table><tr><th>component</th><th>precision</th>"
    for heading in ("max error", "cosine", "PSNR", "size", "seconds a picture"):
        yield f'<th class="number">{heading}</th>'
    yield "<th></th></tr>"
    for row in report.components:
        taken = f"{seconds[row.name]:.3g}" if row.name in seconds else ""
        yield f"<tr><td>{escape(row.name)}</td><td>{escape(row.precision)}</td>"
        for cell in (
            f"{row.deviation.max_error:.1e}",
            f"{row.deviation.cosine:.6f}",
            f"{row.deviation.psnr:.0f} dB",
            f"{row.size / 2**20:.1f} MiB",
            taken,
        ):
            yield f'<td class="number">{cell}</td>'
        yield f"<td>{_verdict(row.passed)}</td></tr>"
    yield "</table>"


def _recipes(bundle: Bundle) -> Iterator[str]:
    from fluxdeploy.build.quality import tell_recipe

    lines = [
        line.strip()
        for name, record in bundle.manifest.components.items()
        if record.recipe is not None
        for line in tell_recipe(name, record.recipe, record.compute)
    ]
    if lines:
        yield "<h2>Recipes</h2><ul>"
        yield from (f"<li>{escape(line)}</li>" for line in lines)
        yield "</ul>"


def _pictures(report: PicturesReport) -> Iterator[str]:
    yield (
        f"<h2>{len(report.pictures)} pictures of {report.width}x{report.height} in {report.steps} "
        "steps</h2>"
    )
    yield (
        f"<p>PSNR: median {report.psnr:.1f} dB, {report.gate.min_psnr:g} required "
        f"{_verdict(report.psnr_passed)}. SSIM: median {report.ssim:.3f}, "
        f"{report.gate.min_ssim:g} required {_verdict(report.ssim_passed)}.</p>"
    )
    for picture, drawn, expected in zip(
        report.pictures, report.drawn, report.expected, strict=True
    ):
        words = f"{picture.psnr:.1f} dB, SSIM {picture.ssim:.3f}, seed {picture.seed}"
        prompt = escape(picture.prompt) or "<em>no prompt</em>"
        yield f"<figure><figcaption>{prompt} <span class=note>({words})</span></figcaption>"
        difference = np.clip(_GAIN * np.abs(drawn - expected), 0, 1)
        yield '<div class="row">'
        for what, image in (
            ("PyTorch float32", expected),
            ("bundle", drawn),
            (f"difference, {_GAIN} times", difference),
        ):
            yield f'<div><img alt="{what}" src="{_data(image)}"><br>{what}</div>'
        yield "</div></figure>"


def _verdict(passed: bool) -> str:
    return "passed" if passed else '<span class="failed">FAILED</span>'


def _data(picture: NDArray[np.float32]) -> str:
    """A picture [H, W, 3] in 0..1 as the address of itself."""
    (image,) = to_pil(picture[None])
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
