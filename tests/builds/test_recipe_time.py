"""What a build tells of the time that a recipe costs."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from engines.onnxruntime import OnnxRuntime
from exporters import export
from exporters.quality.layers import Layers, Smoothing
from fluxdeploy.build.recipe_time import tell_time
from fluxdeploy.build.resolve import list_engines
from fluxdeploy.bundle.manifest import GoldenRecord
from fluxdeploy.bundle.recipe import NOTHING, WEIGHTS, Recipe
from fluxdeploy.bundle.tensorfile import TensorFileWriter
from fluxdeploy.precision import Quantization
from fluxdeploy.progress import Progress
from tests.engines.conftest import RANGES

GOLDEN = GoldenRecord("golden.safetensors", 1.0, 0.0)
SHAPES = {"a": (8, 64), "odd": (9, 64)}
SMOOTHING = {"a": Smoothing(np.ones(64, np.float32), 1.0)}
RECIPE = Recipe({"a": NOTHING, "odd": NOTHING, "x.attn": NOTHING}, {"a": 0.5})
SMALL = 1 << 20


class Engine:
    """Notes what it is run with."""

    def __init__(self, ran: list[str], root: Path) -> None:
        self._ran, self._root = ran, root

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, inputs: dict[str, Any]) -> None:
        assert inputs["x"].tolist() == [1.0, 2.0]
        self._ran.append(self._root.name)


class Pretended(OnnxRuntime):
    def __init__(self) -> None:
        self.ran: list[str] = []

    def open(self, component: str, made: Any, engine: Any, root: Path, options: Any) -> Any:
        return Engine(self.ran, root)


class Build:
    """A component with a recipe; `made` are the layers that were exported without it."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, precision: str
    ) -> None:
        self.runtime, self.said, self.made = Pretended(), io.StringIO(), list[Layers]()
        self._root, self._precision = root, precision
        with TensorFileWriter(root / GOLDEN.path, [("input.x", "F32", (2,))]) as writer:
            writer.write(np.array([1, 2], np.float32))
        monkeypatch.setattr(export, "export_component", self._export)
        placements = [
            SimpleNamespace(name=f"{name}.weight", stored=SimpleNamespace(shape=shape))
            for name, shape in SHAPES.items()
        ]
        layers = Layers(Quantization("int4"), recipe, smoothing=SMOOTHING)
        spec = SimpleNamespace(layers=layers, placements=placements, with_layers=lambda made: made)
        self._component: Any = SimpleNamespace(
            name="tiny", stem="tiny.x", runtime=self.runtime, export=spec, fused=False
        )

    def _export(self, layers: Layers, *_: object, stem: str) -> None:
        assert stem == "tiny.x", "its engine is looked for under that name"
        self.made.append(layers)

    def tell(self, weight_bytes: int = SMALL, run_here: bool = True) -> str:
        (engine,) = list_engines(self.runtime, ("cpu",), "tiny", RANGES)
        made: Any = SimpleNamespace(golden=GOLDEN, precision=self._precision, engines=(engine,))
        exported: Any = SimpleNamespace(weight_bytes=weight_bytes)
        run: Any = SimpleNamespace(
            progress=Progress(stream=self.said),
            staging=SimpleNamespace(root=self._root, scratch=lambda name: self._root / name),
        )
        tell_time(self._component, exported, made, engine if run_here else None, run)
        return self.said.getvalue()


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(recipe: Recipe = RECIPE, precision: str = "int4-weights") -> Build:
        return Build(tmp_path, monkeypatch, recipe, precision)

    return make


def test_a_recipe_is_timed_against_what_the_format_can_have(build: Any, tmp_path: Path) -> None:
    made = build()
    said = made.tell()
    assert "tiny: on the golden inputs it takes" in said
    assert "with its recipe" in said
    (plain,) = made.made
    assert plain.recipe == Recipe({"odd": NOTHING}), "INT4 has no linear of 9 rows"
    assert plain.smoothing == {}
    ran = made.runtime.ran
    assert ran == [tmp_path.name] * (len(ran) // 2) + ["tiny.plain"] * (len(ran) // 2)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe({"odd": NOTHING})])
def test_nothing_is_told_without_a_choice(build: Any, recipe: Recipe) -> None:
    made = build(recipe)
    assert made.tell() == ""
    assert not made.made


@pytest.mark.parametrize(
    ("precision", "how", "why"),
    [
        ("int4-weights", {"run_here": False}, "its engine was not run"),
        ("fp8", {}, "only has the numbers of fp8"),
        ("int4-weights", {"weight_bytes": 3 << 30}, "3.0 GiB of weights"),
    ],
)
def test_what_is_not_timed_is_told_with_its_reason(
    build: Any, precision: str, how: dict[str, Any], why: str
) -> None:
    made = build(Recipe({"a": WEIGHTS}), precision)
    assert why in made.tell(**how)
    assert not made.made


def test_an_engine_that_has_to_be_built_is_not_built_twice(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build()
    monkeypatch.setattr(made.runtime, "builds", True, raising=False)
    assert "would have to build a second engine" in made.tell()
