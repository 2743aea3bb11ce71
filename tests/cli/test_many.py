"""`fluxdeploy generate --prompts`: what is drawn, what is kept, and which line is wrong."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fluxdeploy.batch.index import Entry, Index
from fluxdeploy.batch.lines import read_lines
from fluxdeploy.batch.order import read_orders
from fluxdeploy.cli import main
from fluxdeploy.errors import UsageError
from fluxdeploy.host.pipeline import FluxPipeline
from tests.support.killed import kill_at, made_wrongly

ENTRY = Entry("a.png", "a fox", 3, 0, 8, 8, 2, 0.5, 4, "0" * 64, "1" * 64)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a fox", "seed": "3"}\n\n{"prompt": "a hen"}\n',
        "\ufeffprompt,seed\r\na fox,3\r\na hen,\r\n",
        'prompt;seed\n"a fox";3\na hen;\n',
    ],
)
def test_each_format_has_the_same_lines(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "p").write_text(text, encoding="utf-8", newline="")
    lines = read_lines(str(path))
    assert [line.values["prompt"] for line in lines] == ["a fox", "a hen"]
    assert [line.number for line in lines] == [1, 2]
    assert lines[0].values["seed"] == "3"


def test_a_comma_in_a_prompt_makes_no_table(tmp_path: Path) -> None:
    (path := tmp_path / "p").write_text("a prompt, of a fox\nb\n")
    assert [line.values["prompt"] for line in read_lines(str(path))] == ["a prompt, of a fox", "b"]


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "p").write_text('{"prompt": "a"}\n{"prompt": \n{"prompt": "b"}\n')
    good, bad, after = read_lines(str(path))
    assert (good.problem, after.problem) == (None, None)
    assert bad.place == f"{path}, line 2"
    assert "not JSON" in str(bad.problem)


@pytest.mark.parametrize("seeds", [[7, 0], "7, 0", "7.0,0"])
def test_seeds_of_a_line_are_orders_of_their_own(tmp_path: Path, seeds: object) -> None:
    usual = {"seed": (3,), "sampler": "ab2", "prompt_2": "owl"}
    orders, _ = read_orders({"prompt": "a", "seed": seeds, "skip": "1,2"}, usual, tmp_path)
    assert [order.seed for order in orders] == [7, 0]
    assert {(o.sampler, o.skip, o.prompt_2) for o in orders} == {("ab2", (1, 2), "owl")}
    (order,), _ = read_orders({"prompt": "a", "seed": ""}, usual, tmp_path)
    assert (order.seed, order.skip) == (3, "none")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": -1}, "out of range"),
        ({"seed": [1, "x"]}, "`seed` must be an integer"),
        ({"seed": True}, "`seed` must be an integer"),
        ({"skip": "some"}, "`skip` must be none, auto or steps"),
        ({"skip": {}}, "`skip` must be none, auto or steps"),
        ({"sampler": 3}, "`sampler` must be text"),
        ({"outpaint": "1,2,3"}, "`outpaint` must be the pixels"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_orders({"prompt": "a", **values}, {"seed": None}, tmp_path)


def test_a_torn_last_line_of_the_index_is_removed(tmp_path: Path) -> None:
    path, picture = tmp_path / "i.jsonl", tmp_path / "a.png"
    picture.write_bytes(b"1234")
    with Index(path) as index:
        index.add(ENTRY)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    with Index(path) as index:
        assert index.find(picture, ENTRY.request) == ENTRY
        assert index.find(picture, "2" * 64) is None
        picture.write_bytes(b"12")  # cut off
        assert index.find(picture, ENTRY.request) is None
    assert path.read_bytes() == whole


def test_what_is_no_index_is_left_alone(tmp_path: Path) -> None:
    (path := tmp_path / "i.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UsageError, match="line 1 is no entry of an index"):
        Index(path)
    assert path.read_text() == '{"prompt": "a"}\n'


def test_an_index_belongs_to_one_process(tmp_path: Path) -> None:
    with Index(tmp_path / "i.jsonl"), pytest.raises(UsageError, match="Another process"):
        Index(tmp_path / "i.jsonl")


def test_bad_lines_are_named_and_the_others_drawn_once(
    tmp_path: Path, demo_bundle: Path, run_generate: Callable[..., tuple[int, str, str]]
) -> None:
    source, out = tmp_path / "p.jsonl", tmp_path / "x.png"
    rows = [
        {"prompt": "a red circle", "seed": 1},
        {"prompt": "a", "width": 30},
        {"prompt": "a", "sed": 1},
        {"prompt": "a blue star", "seed": 2, "out": "sub/star.png"},
        {"prompt": "a", "out": "../a.png"},
        {"prompt": "a", "sampler": "nope", "seed": [1, 2]},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--prompts", source, "--bundle", demo_bundle, "--out", out, "--steps", 1)
    sizes = ("--width", 32, "--height", 32)
    code, stdout, stderr = run_generate(*options, *sizes)
    assert code == 1
    assert stdout.splitlines() == [str(tmp_path / "x-00001.png"), str(tmp_path / "sub/star.png")]
    for line, words in (
        (2, "multiples of 16"),
        (3, "Did you mean `seed`"),
        (5, "`out`"),
        (6, "no sampler"),
    ):
        said = [each for each in stderr.splitlines() if f"line {line}: " in each]
        assert len(said) == 1
        assert words in said[0]
    again = run_generate(*options, *sizes, "--json")[1]
    assert (json.loads(again)["drawn"], json.loads(again)["kept"]) == (0, 2)


def test_a_batch_that_is_killed_goes_on_where_it_was(tmp_path: Path, demo_bundle: Path) -> None:
    rows = [
        {"prompt": f"a {colour} circle", "seed": number, "width": 64 + 32 * (number % 2)}
        for number, colour in enumerate(("red", "green", "blue", "pink", "orange") * 2)
    ]
    (source := tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder := tmp_path / "made").mkdir()
    index = folder / "x.index.jsonl"
    command = [sys.executable, "-m", "fluxdeploy", "generate", "--prompts", str(source)]
    command += ["--bundle", str(demo_bundle), "--out", str(folder / "x.png"), "--batch", "2"]
    command += ["--threads", "1"]
    command += ["--steps", "2", "--height", "64"]
    rng = random.Random(os.getpid())
    moments = [(rng.randint(1, 2), rng.uniform(0, 0.03)), (rng.randint(4, 6), 0.0)]
    killed = [kill_at(command, index, lines, delay) for lines, delay in moments]
    assert any(killed)
    assert not kill_at(command, index, len(rows) + 1)
    assert made_wrongly(folder, index, len(rows)) == []
    with FluxPipeline.from_bundle(demo_bundle) as pipe:
        for number, row in enumerate(rows, 1):
            (image,) = pipe(**row, height=64, num_inference_steps=2).images
            with Image.open(folder / f"x-{number:05}.png") as made:
                # Pictures that are drawn together may be rounded otherwise.
                np.testing.assert_allclose(np.asarray(made, int), np.asarray(image, int), atol=1)


@pytest.fixture
def run_generate() -> Callable[..., tuple[int, str, str]]:
    def run(*args: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, ["generate", *map(str, args)], prog_name="fluxdeploy")
        return result.exit_code, result.stdout, result.stderr

    return run
