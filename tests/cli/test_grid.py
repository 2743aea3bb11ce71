"""`fluxdeploy generate --grid`: what its axes are, and what of a grid is drawn and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluxdeploy.batch.grid import AXES, Grid, make_grid, parse_axis
from fluxdeploy.cli import grid as module
from fluxdeploy.errors import UsageError
from fluxdeploy.host.sheet import grid_sheet
from tests.cli.test_generate import FakePipeline, fake, run

__all__ = ["fake"]

USUAL = {"seed": None, "image": None, "num_images_per_prompt": 1}
OUT = Path("fox.png")


def grid(*axes: str, prompts: Sequence[str] = ("a fox",), **usual: Any) -> Grid:
    return make_grid(prompts, [parse_axis(axis) for axis in axes], {**USUAL, **usual}, OUT)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("steps=4,8, 28", (4, 8, 28)),
        (" seed = 7", (7,)),
        ("guidance=1,3.5", (1.0, 3.5)),
        ("true-cfg-scale=2,1e1", (2.0, 10.0)),
        ("sampler=euler,heun", ("euler", "heun")),
    ],
)
def test_an_axis_has_values_of_its_options_kind(text: str, values: tuple[Any, ...]) -> None:
    axis = parse_axis(text)
    assert axis.values == values
    assert list(map(type, axis.values)) == list(map(type, values))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stesp=4", "no axis `stesp`. There are steps, seed"),
        ("width=64,128", "no axis `width`"),
        ("steps", "not `steps`"),
        ("", "not ``"),
        ("steps=", "has '', where an integer must be"),
        ("steps=4,,8", "has ''"),
        ("steps=4.5", "has '4.5', where an integer"),
        ("seed=" + "9" * 5000, "where an integer must be"),
        ("guidance=high", "has 'high', where a number"),
        ("guidance=nan", "has 'nan', where a number"),
        ("steps=4,04", "has 4 twice"),
    ],
)
def test_an_axis_that_cannot_be_is_named(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_axis(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_first_of_two_axes_goes_down() -> None:
    made = grid("seed=1,2", "guidance=1,3.5,10")
    orders = [(request.order.seed, request.order.guidance_scale) for request in made.requests]
    assert orders == [(1, 1.0), (1, 3.5), (1, 10.0), (2, 1.0), (2, 3.5), (2, 10.0)]
    assert made.rows == ["seed 1", "seed 2"]
    assert made.columns == ["guidance 1", "guidance 3.5", "guidance 10"]
    assert [path.name for request in made.requests for path in request.paths][1:4] == [
        "fox-seed1-guidance3.5.png",
        "fox-seed1-guidance10.png",
        "fox-seed2-guidance1.png",
    ]


def test_all_pictures_have_one_seed_where_no_axis_says() -> None:
    seeds = {request.order.seed for request in grid("steps=1,2,3").requests}
    assert len(seeds) == 1
    assert seeds != {None}
    (seed,) = {request.order.seed for request in grid("steps=1,2", seed=(5,)).requests}
    assert seed == 5


def test_several_prompts_are_rows() -> None:
    made = grid("steps=1,2", prompts=["a fox", "an owl"])
    assert made.rows == ["a fox", "an owl"]
    assert [request.order.prompt for request in made.requests] == ["a fox"] * 2 + ["an owl"] * 2
    assert len({path for request in made.requests for path in request.paths}) == 4


@pytest.mark.parametrize(
    ("axes", "usual", "words"),
    [
        (["steps=1", "seed=1", "sampler=euler"], {}, "two axes at most, not 3"),
        (["steps=1", "seed=1"], {"prompts": ["a", "b"]}, "Several prompts are one"),
        (["steps=1", "steps=2"], {}, "`steps` is given twice"),
        ([f"seed={','.join(map(str, range(101)))}"], {}, "has 101 pictures; 100 are the most"),
        (["strength=0.5"], {}, "`strength` needs --image"),
        (["steps=1"], {"num_images_per_prompt": 2}, "leave out --num-images"),
        (["steps=1"], {"seed": (1, 2)}, "--grid seed=1,2"),
        (["seed=-1"], {}, "seed -1 is out of range"),
        (["steps=1"], {"seed": (2**64,)}, "is out of range"),
    ],
)
def test_what_makes_no_grid_is_refused(axes: list[str], usual: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        grid(*axes, **usual)
    assert words in str(caught.value)


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_beside_its_option_is_refused(bundle: Path, tmp_path: Path, axis: str) -> None:
    value = "euler" if axis == "sampler" else "1"
    place = ("--bundle", bundle, "--sheet", tmp_path / "grid.png")
    result = run("a fox", *place, "--grid", f"{axis}={value}", f"--{axis}", value)
    assert result.exit_code == 2
    assert f"--{axis} is also an axis" in result.stderr
    assert not FakePipeline.calls


def test_a_grid_of_a_file_of_prompts_is_refused(tmp_path: Path) -> None:
    result = run("--prompts", tmp_path / "prompts.txt", "--grid", "steps=1")
    assert result.exit_code == 2
    assert "not of --prompts" in result.stderr


def test_the_sheet_alone_is_kept(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    shown: list[Any] = []

    def sheet(pictures: list[Image.Image], *words: Any) -> Image.Image:
        shown.append((len(pictures), *words))
        return grid_sheet(pictures, *words)

    monkeypatch.setattr("fluxdeploy.host.sheet.grid_sheet", sheet)
    result = run("a fox", "--bundle", bundle, "--grid", "seed=1,2", "--grid", "steps=1,2,3")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == ["grid.png"]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "grid.png"}
    assert shown == [(6, ["seed 1", "seed 2"], ["steps 1", "steps 2", "steps 3"], "a fox")]
    asked = [(call["seed"], call["num_inference_steps"]) for call in FakePipeline.calls]
    assert asked == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert "2 x 3 pictures, seed 1, 2" in result.stderr


def test_out_keeps_the_pictures_too(bundle: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "fox.png", tmp_path / "all.png"
    options = ("--bundle", bundle, "--out", out, "--sheet", sheet, "--seed", 3, "--json")
    result = run("a fox", *options, "--grid", "steps=1,2")
    assert result.exit_code == 0, result.stderr
    paths = [tmp_path / "fox-steps1.png", tmp_path / "fox-steps2.png"]
    report = json.loads(result.stdout)
    assert report.pop("seconds") >= 0
    assert report == {
        "sheet": str(sheet),
        "paths": list(map(str, paths)),
        "axes": [{"name": "steps", "values": [1, 2]}],
        "seeds": [3],
        "warnings": [],
    }
    assert all(path.is_file() for path in (*paths, sheet))


def test_each_axis_is_an_option_that_can_be_told_from_its_default() -> None:
    from fluxdeploy.cli.generate import command

    names = {f"--{axis}": module._PARAMETERS.get(axis, axis) for axis in AXES}
    known = {option: param.name for param in command.params for option in param.opts}
    assert {option: known[option] for option in names} == names
