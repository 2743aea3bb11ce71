"""ControlNets are recognised by their config and tensors, and held against the transformer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines import runtimes
from fluxdeploy.build.checkpoint import find_checkpoint, hash_checkpoint
from fluxdeploy.build.resolve import _check_controlnets
from fluxdeploy.bundle.manifest import DimensionRange, TensorSpec
from fluxdeploy.errors import CheckpointError, UsageError
from fluxdeploy.progress import Progress
from tests.support.shared_folder import SharedFolder

pytest.importorskip("diffusers")

# By name, how its shape differs from that of `dev`, and its sizes.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"single": 1}),
    "pixels": ({}, {"hint": 16}),
    "coarse": ({}, {"hint": 4}),
    "narrow": ({"heads": 3}, {}),
    "axes": ({"axes_dims": (8, 8, 8)}, {}),
    "text": ({"text_width": 40}, {}),
    "pooled": ({"pooled_width": 44}, {}),
}


@pytest.fixture(scope="module")
def folder(shared_folder: SharedFolder) -> Callable[[str], Path]:
    """A ControlNet for `dev`, or one that is not."""
    from tests.support.checkpoints import SHAPES, make_controlnet

    def make(kind: str) -> Path:
        changes, sizes = KINDS[kind]
        shape = replace(SHAPES["dev"], **changes)
        return shared_folder.entry(
            f"controlnet-of-{kind}",
            lambda path: make_controlnet(path, shape, **{"double": 1, "single": 0, **sizes}),
        )

    return make


@pytest.fixture
def dev(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("dev"))


def copied(source: Path, target: Path, **config: Any) -> Path:
    """A ControlNet whose config says something else; None takes a key away."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).hardlink_to(file)
    said = json.loads((source / "config.json").read_text())
    said = {k: v for k, v in {**said, **config}.items() if v is not None}
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(said))
    return target


def test_a_controlnet_joins_and_leaves_the_checkpoint_what_it_is(
    dev: str, folder: Callable[[str], Path]
) -> None:
    plain, opened = (
        find_checkpoint(dev, controlnets=nets) for nets in ((), (folder("plain"), folder("plain")))
    )
    assert opened.controlnet_parts == ("controlnet", "controlnet_2")
    assert opened.controlnets[0].modulation_rows == 15
    with Progress(quiet=True) as progress:
        digests = {hash_checkpoint(each, progress).digest for each in (plain, opened)}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("narrow", "a width of 72, and the checkpoint 96"),
        ("axes", r"axes_dims_rope \[8, 8, 8\], and the checkpoint \[4, 8, 12\]"),
        ("text", "text embeddings of 40, and the checkpoint 48"),
        ("pooled", "pooled embeddings of 44, and the checkpoint 40"),
    ],
)
def test_one_that_does_not_fit_is_refused_with_both_sizes(
    kind: str, said: str, dev: str, folder: Callable[[str], Path]
) -> None:
    with pytest.raises(CheckpointError, match=said):
        find_checkpoint(dev, controlnets=(folder(kind),))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "one of a 'FluxTransformer2DModel'"),
        ({"num_layers": 2}, "says num_layers 2, and its tensors say 1"),
        ({"num_mode": 4}, "says num_mode 4"),
        ({"guidance_embeds": None}, "has a guidance embedding, and its config.json does not say"),
    ],
)
def test_a_config_that_the_tensors_contradict_is_refused(
    config: dict[str, Any], said: str, dev: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    other = copied(folder("plain"), tmp_path / "other", **config)
    with pytest.raises(CheckpointError, match=said):
        find_checkpoint(dev, controlnets=(other,))


def test_what_is_no_controlnet_is_refused(
    dev: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    weights = next(folder("plain").glob("*.safetensors"))
    (tmp_path / "bare").mkdir()
    for path, said in (
        (tmp_path / "none", "does not exist"),
        (weights, "is a file. Give the folder of one in diffusers' layout"),
        (Path(dev), "is a whole checkpoint"),
        (tmp_path / "bare", "has no config.json"),
        (Path(dev) / "transformer", "does not belong to a ControlNet|has a transformer|tensor"),
    ):
        with pytest.raises(CheckpointError, match=said):
            find_checkpoint(dev, controlnets=(path,))


def test_kinds_and_numbers_that_do_not_go_together_are_refused(
    dev: str, folder: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(CheckpointError, match="Some of the ControlNets take pixels"):
        find_checkpoint(dev, controlnets=(folder("plain"), folder("pixels")))
    with pytest.raises(CheckpointError, match="A bundle has 4 at most"):
        find_checkpoint(dev, controlnets=(folder("plain"),) * 5)
    with pytest.raises(CheckpointError, match="is one for fill, and ControlNets go with"):
        find_checkpoint(str(checkpoint("fill")), controlnets=(folder("plain"),))
    with pytest.raises(CheckpointError, match="says patch_size 2, and its tensors say 4"):
        find_checkpoint(dev, controlnets=(folder("coarse"),))


@pytest.mark.parametrize("blocks", [1, 2, 3, 19, 38])
@pytest.mark.parametrize("samples", [1, 2, 5, 6, 10, 19, 40])
def test_residuals_are_repeated_as_in_diffusers(blocks: int, samples: int) -> None:
    from exporters.checkpoint.controlnet_config import ControlNetConfig
    from exporters.components.residuals import residual_rows

    def config(hint: tuple[int, ...] = ()) -> ControlNetConfig:
        sizes = (64, 64, 96, 24, 384, samples, samples, 48, 40, True, (4, 8, 12))
        return ControlNetConfig(*sizes, hint_channels=hint)

    interval = math.ceil(blocks / samples)
    in_a_row = [block // interval for block in range(blocks)]
    assert residual_rows([config()], "double", blocks) == in_a_row
    assert residual_rows([config((16, 16))], "single", blocks) == in_a_row
    assert residual_rows([config((16, 16))], "double", blocks) == [
        block % samples for block in range(blocks)
    ]


def test_several_add_up_as_many_residuals_as_each_has() -> None:
    from exporters.checkpoint.controlnet_config import ControlNetConfig
    from exporters.components.residuals import residual_count

    def config(double: int, single: int) -> ControlNetConfig:
        return ControlNetConfig(64, 64, 96, 24, 384, double, single, 48, 40, True, (4, 8, 12))

    assert residual_count([], "double") == 0
    assert residual_count([config(5, 10), config(6, 0)], "double") == 5
    assert residual_count([config(5, 10), config(6, 0)], "single") == 10
    # As in diffusers, where the first has none the others' do not count.
    assert residual_count([config(6, 0), config(5, 10)], "single") == 0


def test_what_has_no_room_for_them_is_refused() -> None:
    native, onnxruntime = (runtimes(name)[0] for name in ("native", "onnxruntime"))
    _check_controlnets(onnxruntime, 0)
    with pytest.raises(UsageError, match="native has no inputs for what ControlNets add"):
        _check_controlnets(native, 0)
    with pytest.raises(UsageError, match="A bundle with --controlnet has no --lora-rank"):
        _check_controlnets(onnxruntime, 4)


def test_golden_residuals_are_as_many_as_the_transformer_takes(dev: str) -> None:
    from exporters.check.golden import golden_inputs

    opened = find_checkpoint(dev)
    shape = (1, "B", "L", 8)
    chain: Any = SimpleNamespace(inputs=(TensorSpec("double_residuals", "float32", shape),))
    given = np.arange(2 * 2 * 24 * 8, dtype=np.float32).reshape(2, 2, 24, 8)
    constants = (opened.latents, opened.rope, opened.schedule)
    ranges = {"B": DimensionRange(1, 1, 1)}
    found = golden_inputs(chain, None, *constants, ranges, {"double_residuals": given})
    np.testing.assert_array_equal(found["double_residuals"], given[:1, :1])


def test_a_transformer_with_controlnets_is_measured_as_the_plain_one(
    dev: str, folder: Callable[[str], Path]
) -> None:
    from exporters.calibrate.trajectory import Calibration, start_samples, take_step
    from exporters.components.registry import COMPONENTS

    calibration = Calibration(("a fox",), 0, ((32, 48),), 2, 3.5)
    ends = []
    for nets in ((), (folder("plain"),)):
        opened = find_checkpoint(dev, controlnets=nets)
        (sample,) = start_samples(opened, calibration, Progress(quiet=True))
        assert ("single_residuals" in sample.inputs(0)) == bool(nets)
        take_step(*COMPONENTS["transformer"].source(opened, "fp32"), [sample], 0)
        ends.append(sample.latents)
    np.testing.assert_array_equal(*ends)


def test_the_weights_of_two_lie_side_by_side(
    dev: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from exporters.weights.bind import WeightFolder
    from fluxdeploy.build.run import _files_beside

    nets = (folder("plain"), copied(folder("pixels"), tmp_path / "other"), folder("plain"))
    opened = find_checkpoint(dev, controlnets=nets[:1])
    files = [next(each.glob("*.safetensors")) for each in nets]
    parts = {
        part: SimpleNamespace(weights={"a": SimpleNamespace(file=file)})
        for part, file in zip(("controlnet", "controlnet_2", "controlnet_3"), files, strict=True)
    }
    many: Any = SimpleNamespace(parts_beside=tuple(parts), parts=parts)
    (tmp_path / "weights").mkdir()
    weights = WeightFolder(tmp_path / "weights", owners=_files_beside(many))
    name = files[0].name
    assert [weights.link(file) for file in files] == [
        f"controlnet.{name}",
        f"controlnet_2.{name}",
        f"controlnet.{name}",
    ]
    own = next(iter(opened.parts["transformer"].weights.values())).file
    assert weights.link(own) == f"transformer.{own.name}"
