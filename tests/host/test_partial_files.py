"""What killed writers of pictures leave is swept, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fluxdeploy.errors import FluxDeployError
from fluxdeploy.host import partial_files
from fluxdeploy.host.partial_files import replacing_picture, sweep
from fluxdeploy.host.pictures import write_png

pytest.importorskip("fcntl")

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

WRITER = """
import sys, time
from pathlib import Path
from fluxdeploy.host.partial_files import replacing_picture
with replacing_picture(Path(sys.argv[1])) as file:
    file.write(b"\\x89PNG\\r\\n\\x1a\\n" + bytes(100000))
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def picture() -> Image.Image:
    return Image.new("RGB", (8, 8), (1, 2, 3))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_kill_leaves_goes_with_the_next_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "fox.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        (partial,) = names(tmp_path)
        assert partial.startswith(".fox.png.")
        # A writer that lives keeps its file, whoever else writes there.
        write_png(picture(), tmp_path / "owl.png")
        assert names(tmp_path) == [partial, "owl.png"]
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert names(tmp_path) == [partial, "owl.png"]
    write_png(picture(), tmp_path / "hen.png")
    assert names(tmp_path) == ["hen.png", "owl.png"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (".fox.png.0123abcd.part", PNG),
        (".fox.png.0123abcd.part", b""),
        (".fox.png.0123abcd.part", PNG[:3]),
        (".a b.c.PNG.ffffffff.part", PNG),
        (".line\nbreak.png.00000000.part", PNG),
    ],
)
def test_left_overs_of_any_picture_go(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    os.utime(tmp_path / name, (1, 1))
    sweep(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (".fox.png.20240101.part", b"notes of a user"),
        (".fox.png.0123abcd.part", b"\x89PNX"),
        (".fox.png.part", PNG),
        (".fox.png.0123abcd.part2", PNG),
        (".fox.png.0123ABCG.part", PNG),
        (".fox.jpg.0123abcd.part", PNG),
        ("fox.png.0123abcd.part", PNG),
        (".png.0123abcd.part", PNG),
        (".fox.png.0123abcde.part", PNG),
        ("fox.png", PNG),
    ],
)
def test_a_users_file_stays(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    sweep(tmp_path)
    assert (tmp_path / name).read_bytes() == data


def test_what_is_no_file_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(PNG)
    (tmp_path / ".a.png.00000000.part").symlink_to(target)
    (tmp_path / ".b.png.00000000.part").mkdir()
    os.mkfifo(tmp_path / ".c.png.00000000.part")
    before = names(tmp_path)
    began = time.monotonic()
    sweep(tmp_path)
    assert time.monotonic() - began < 1
    assert names(tmp_path) == before


def test_another_users_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".a.png.00000000.part").write_bytes(PNG)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    sweep(tmp_path)
    assert names(tmp_path) == [".a.png.00000000.part"]


def test_a_folder_that_cannot_be_read_is_no_error(tmp_path: Path) -> None:
    sweep(tmp_path / "missing")
    with pytest.raises(FluxDeployError, match="Cannot write"):
        write_png(picture(), tmp_path / "missing" / "a.png")


def test_a_writer_that_a_sweep_overtook_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of a file and its lock, it looks like a left-over."""
    flock, overtaken = partial_files.fcntl.flock, []

    def overtake(file: object, how: int) -> None:
        if not overtaken:
            (partial,) = tmp_path.iterdir()
            partial.unlink()
            overtaken.append(partial)
        flock(file, how)

    monkeypatch.setattr(partial_files.fcntl, "flock", overtake)
    with replacing_picture(tmp_path / "a.png") as file:
        file.write(PNG)
    assert names(tmp_path) == ["a.png"]


def test_two_writers_of_one_name_do_not_disturb_each_other(tmp_path: Path) -> None:
    with replacing_picture(tmp_path / "a.png") as first:
        with replacing_picture(tmp_path / "a.png") as second:
            second.write(PNG + b"second")
        first.write(PNG + b"first")
    assert names(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == PNG + b"first"
