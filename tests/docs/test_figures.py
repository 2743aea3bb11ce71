"""No figure in the pages is stale or made up."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.pages import PAGES, ROOT, name_of, section, tables

BUILD = ROOT / "docs" / "build.md"
PAGE = ROOT / "docs" / "components.md"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "figures", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


MACHINE = {
    "cpu": "A processor",
    "cores": 2,
    "memory_bytes": 24 << 30,
    "system": "Linux",
    "python": "3.11.2",
    "packages": {"torch": "2.13.0"},
}
EXPORT_SCALE = {
    "machine": MACHINE,
    "targets": {"seconds": 60.0, "peak_bytes": 10**9, "written_bytes": 64 * 10**6},
    "layouts": [
        {
            "layout": "diffusers",
            "seconds": 41.6,
            "peak_bytes": 812_345_678,
            "written_bytes": 8_100_000,
            "weight_bytes": 33_700_000_000,
        }
    ],
}


BLOCKS = (
    "export_scale",
    "large_pictures",
    "tile_quality",
    "export_family",
    "demo_scores",
    "demo_training",
    "quantization_quality",
    "quantize_scale",
    "recipes",
    "quality_size",
    "gpu_latency",
    "gpu_step",
    "gpu_step_kernels",
    "gpu_kernels",
    "ort_cuda_step",
    "latency",
    "host_step",
    "lora_step",
    "conditioner_split",
    "cost_curves",
    "samplers",
    "previews",
    "serving",
    "cpp_host",
)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_measured_figures_are_those_of_the_results(figures: ModuleType, name: str) -> None:
    block = figures.BLOCKS[name]
    text = block.render(json.loads(block.results.read_text()))
    for path in block.pages:
        page = path.read_text()
        assert figures.fill(page, name, text) == page, "the figures are stale: run `make docs`"


def test_every_block_is_checked_here(figures: ModuleType) -> None:
    assert set(figures.BLOCKS) == set(BLOCKS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_page_is_filled_there(figures: ModuleType, page: Path) -> None:
    marked = re.findall("<!-- (\\w+) -->", page.read_text())
    assert set(marked) == {name for name, block in figures.BLOCKS.items() if page in block.pages}


def test_a_report_becomes_a_table(figures: ModuleType) -> None:
    table = figures.BLOCKS["export_scale"].render(EXPORT_SCALE)
    assert "| time, imports included | 42 s | under 60 s |" in table
    assert "| peak resident memory | 812 MB | under 1,000 MB |" in table
    assert "| weights, linked and not read | 33.7 GB | |" in table
    assert "A processor" in table


def test_a_page_without_marks_is_refused(figures: ModuleType) -> None:
    with pytest.raises(ValueError, match="0 blocks"):
        figures.fill("no marks", "export_scale", "table")


def test_scores_become_a_table_with_their_targets(figures: ModuleType) -> None:
    dev = {
        "steps": 28,
        "guidance": 3.5,
        "size": "128x128",
        "objects": 0.967,
        "relation": 0.9,
        "place": 0.951,
        "parameters": 7_340_000,
        "training_minutes": 99.7,
        "pytorch": {"objects": 0.97, "relation": 0.897, "place": 0.88},
    }
    schnell = {**dev, "steps": 4, "guidance": None, "objects": 0.91}
    del schnell["pytorch"], schnell["training_minutes"]
    report = {
        "machine": MACHINE,
        "prompts": 300,
        "targets": {
            "dev": {"objects": 0.95, "relation": 0.85},
            "schnell": {"objects": 0.9, "relation": 0.75},
        },
        "checkpoints": {"dev": dev, "schnell": schnell},
    }
    text = figures.BLOCKS["demo_scores"].render(report)
    assert text.splitlines()[2:7] == [
        "| `demo:dev`, 28 steps, guidance 3.5 | 96.7% | 90.0% | 95.1% | 7.3 million | 100 min |",
        "| the same in PyTorch | 97.0% | 89.7% | 88.0% | | |",
        "| target | 95% | 85% | | | |",
        "| `demo:schnell`, 4 steps | 91.0% | 90.0% | 95.1% | 7.3 million | |",
        "| target | 90% | 75% | | | |",
    ]
    assert "300 prompts" in text
    assert "A processor" in text


def test_the_conditioner_takes_the_share_that_its_page_says() -> None:
    pytest.importorskip("torch")
    from exporters.components.pieces import COMPUTE_TYPES
    from exporters.components.registry import COMPONENTS
    from exporters.synthetic.sparse_checkpoint import FLUX_DEV

    conditioner, transformer = (
        sum(p.numel() for stage in chain.stages for p in stage.piece.module.parameters())
        for chain in (
            COMPONENTS[name].chain(FLUX_DEV, COMPUTE_TYPES["bf16"])
            for name in ("conditioner", "transformer")
        )
    )
    total = conditioner + transformer
    text = " ".join(PAGE.read_text().split())
    assert f"{conditioner / 1e9:.1f} of the {total / 1e9:.1f} billion parameters" in text
    assert f"the loop reads {conditioner / total:.0%} fewer weights" in text


def test_the_memory_that_a_session_takes_is_what_the_build_plans_with() -> None:
    from engines.base import CPU_SESSION

    text = " ".join(BUILD.read_text().split())
    (said,) = re.findall(r"about ([\d.]+) times its float32 weights", text)
    assert float(said) == CPU_SESSION


def test_the_precisions_are_those_that_a_build_chooses() -> None:
    pytest.importorskip("torch")
    from exporters.components.registry import COMPONENTS
    from fluxdeploy.precision import PRECISIONS

    (table,) = tables(section(BUILD, "## Precisions"))
    columns = ("transformer", "conditioner", "clip", "t5", "vae_decoder")
    assert {*columns, "vae_encoder"} == set(COMPONENTS)
    assert sorted(row[0].partition(" ")[0] for row in table) == sorted(PRECISIONS)
    for asked, *row in table:
        asked = asked.partition(" ")[0]
        said = [cell.partition(",")[0] for cell in row]
        assert said == [COMPONENTS[name].precision_beside(asked) for name in columns], asked
