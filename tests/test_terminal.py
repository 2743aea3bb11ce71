"""What reaches a terminal: nothing that it would obey, whatever was closed or has gone away."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fluxdeploy.cli import main
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say, say_json, show, visible

ROOT = Path(__file__).parents[1]

HOSTILE = {
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m",
    "\x1b]0;a title\x07": r"\x1b]0;a title\x07",
    "\x9b2J": r"\x9b2J",
    "gnp.exe\u202egpj": r"gnp.exe\u202egpj",
    "\u2066isolated\u2069": r"\u2066isolated\u2069",
    "two\nlines": r"two\nlines",
    "over\rwritten": r"over\rwritten",
    "back\b\b\b\bfront": r"back\x08\x08\x08\x08front",
    "a\u2028b\u2029c": r"a\u2028b\u2029c",
    "no\u200bwidth\ufeff": r"no\u200bwidth\ufeff",
    "\U000e0041hidden": r"\U000e0041hidden",
    "file-\udcff.png": r"file-\udcff.png",
    "\x7f\x00": r"\x7f\x00",
}

HARMLESS = (
    "a fox",
    "un café",
    "猫 [red] :smile:",
    "שלום",
    "👩\u200d🚀",
    "می\u200cخواهم",
    "C:\\new",
    "",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_obeys_is_shown(text: str) -> None:
    assert visible(text) == HOSTILE[text]
    assert visible(visible(text)) == HOSTILE[text]


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_is_left_alone(text: str) -> None:
    assert visible(text) == text


def test_every_control_character_is_shown() -> None:
    for number in (*range(0x3000), *range(0xD800, 0xE000), *range(0xFE00, 0x10000)):
        if unicodedata.category(chr(number)) in ("Cc", "Cs", "Zl", "Zp"):
            assert visible(chr(number)).isascii(), hex(number)
        if unicodedata.bidirectional(chr(number)) in ("LRE", "RLE", "LRO", "RLO", "PDF", "RLI"):
            assert visible(chr(number)).isascii(), hex(number)


@pytest.mark.parametrize("text", HOSTILE)
def test_lines_tables_progress_and_json(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(text, title=text)
    table.add_row(text)
    say(text)
    show(table, text)
    assert capsys.readouterr().out.count(HOSTILE[text]) == 5
    say_json({text: [text]})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {text: [text]}
    assert set(printed) & {chr(number) for number in (*range(32), 127)} == {"\n"}
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.note(text)
        progress.task(text).finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == HOSTILE[text]
    assert lines[1].startswith(f"{HOSTILE[text]}: ")


@pytest.mark.parametrize("text", ["\x1b]52;c;x\x07", "a\u202eb", "two\nlines", "\x9b1m", "\udcfe"])
def test_errors_and_usage_quote_safely(text: str, tmp_path: Path) -> None:
    commands: list[tuple[str, ...]] = [
        (text,),
        ("inspect", str(tmp_path / text)),
        ("inspect", f"--{text}"),
        ("generate", "a fox", "--bundle", str(tmp_path / text)),
        ("plan", "--min-size", text),
        ("bench", "--against", text),
    ]
    for arguments in commands:
        result = CliRunner().invoke(main, arguments, prog_name="fluxdeploy")
        assert result.exit_code in (1, 2), arguments
        assert visible(text) in result.stderr, arguments
        assert text not in result.output


def test_a_picture_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    chunks = PngInfo()
    for key in ("true_cfg_scale", "index", "num_inference_steps", "guidance_scale", "height"):
        chunks.add_text(key, "1")
    for key in ("max_sequence_length", "width"):
        chunks.add_text(key, "1")
    prompt = "\x1b[2J\u202eevil\nError: fake"
    for key in ("prompt", "bundle_hash", "fluxdeploy_version"):
        chunks.add_itxt(key, prompt)
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png", pnginfo=chunks)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "x.png")], prog_name="fluxdeploy")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(visible(prompt)) == 3
    assert "\x1b" not in result.output


PROGRAM = """
import sys, types, click
from fluxdeploy.cli import main
from fluxdeploy.errors import BundleError
from fluxdeploy.progress import Progress
from fluxdeploy.terminal import say
@click.command()
@click.argument("outcome")
def command(outcome):
    with Progress() as progress:
        progress.note("a note")
        for _ in range(3000):
            say("a line that fills the pipe of a reader who has gone away")
    if outcome == "error":
        raise BundleError("No bundle there.")
    if outcome == "verdict":
        raise SystemExit(1)
module = types.ModuleType("fluxdeploy.cli.doctor")
module.command = command
sys.modules["fluxdeploy.cli.doctor"] = module
main(["doctor", *sys.argv[1:]], prog_name="fluxdeploy")
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return f"{sys.executable} {path}"


@pytest.mark.parametrize(
    ("outcome", "redirection", "code"),
    [
        ("well", ">&-", 0),
        ("well", "2>&-", 0),
        ("well", ">&- 2>&-", 0),
        ("well", "| head -1", 0),
        ("error", ">&- 2>&- <&-", 1),
        ("error", "| head -1", 1),
        ("error", "2>&1 | head -1", 1),
        ("verdict", "| true", 1),
        ("well", ">/dev/full", 1),
        ("well", "2>/dev/full", 0),
        ("--help", "| true", 0),
    ],
)
def test_the_exit_code_is_that_of_the_work(
    program: str, outcome: str, redirection: str, code: int
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{program} {outcome} {redirection}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    for word in ("Traceback", "Exception ignored", "Broken pipe"):
        assert word not in done.stderr + done.stdout
