"""Others find the installed library; the tree's packages say what the build does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxdeploy import FluxPipeline, __version__
from tests.engines.cpp.conftest import ROOT, run

CPP = ROOT / "engines" / "cpp"
PROMPT = "a red circle above a blue square"

FOREIGN = """\
cmake_minimum_required(VERSION 3.20)
project(foreign LANGUAGES CXX)
find_package(fluxdeploy 0.1 REQUIRED)
add_executable(foreign {source})
target_link_libraries(foreign PRIVATE fluxdeploy::fluxdeploy)
"""


@pytest.fixture(scope="module")
def prefix(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, installed and moved to where no build knows of."""
    installed = tmp_path_factory.mktemp("installed") / "first"
    run("cmake", "--install", str(built), "--prefix", str(installed))
    return installed.rename(installed.with_name("moved"))


@pytest.fixture(scope="module")
def wanted(demo_bundle: Path) -> Iterator[np.ndarray]:
    with FluxPipeline.from_bundle(demo_bundle, "onnxruntime") as pipe:
        yield np.asarray(pipe(PROMPT, seed=7).images[0])


def assert_is(path: Path, wanted: np.ndarray) -> None:
    assert np.abs(np.asarray(Image.open(path)).astype(int) - wanted).max() <= 1


def library_folder(prefix: Path) -> Path:
    return next(prefix.rglob("libfluxdeploy.so")).parent


def test_a_foreign_cmake_project_uses_the_class(
    prefix: Path, demo_bundle: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    source = CPP / "examples" / "picture.cpp"
    (tmp_path / "CMakeLists.txt").write_text(FOREIGN.format(source=source))
    build = tmp_path / "build"
    options = ("-G", "Ninja", "-D", f"CMAKE_PREFIX_PATH={prefix}")
    run("cmake", "-S", str(tmp_path), "-B", str(build), *options)
    run("cmake", "--build", str(build))
    run(str(build / "foreign"), str(demo_bundle), PROMPT, str(tmp_path / "x.png"))
    assert_is(tmp_path / "x.png", wanted)


def test_a_program_in_c_is_built_by_pkg_config(
    prefix: Path, demo_bundle: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    found = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "fluxdeploy"],
        env={**os.environ, "PKG_CONFIG_PATH": str(library_folder(prefix) / "pkgconfig")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    program = tmp_path / "program"
    strict = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")
    source = str(CPP / "examples" / "picture.c")
    rpath = f"-Wl,-rpath,{library_folder(prefix)}"
    run("cc", *strict, source, *found, rpath, "-o", str(program))
    run(str(program), str(demo_bundle), PROMPT, str(tmp_path / "x.png"))
    assert_is(tmp_path / "x.png", wanted)


def test_the_interface_is_called_from_ctypes(
    prefix: Path, demo_bundle: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    library, out = library_folder(prefix) / "libfluxdeploy.so", tmp_path / "x.png"
    example = str(CPP / "examples" / "picture.py")
    run(sys.executable, example, str(library), str(demo_bundle), PROMPT, str(out))
    assert_is(out, wanted)


def test_the_library_has_a_soversion_and_is_small(prefix: Path) -> None:
    library = library_folder(prefix) / "libfluxdeploy.so"
    assert os.readlink(library) == "libfluxdeploy.so.0"
    assert library.stat().st_size < 3_000_000
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "Library soname: [libfluxdeploy.so.0]" in needed
    # Runtimes are loaded when they are needed.
    assert "onnxruntime" not in needed


def test_it_gives_no_symbols_but_its_interface(prefix: Path) -> None:
    library = str(library_folder(prefix) / "libfluxdeploy.so")
    names = run("nm", "-D", "--defined-only", "--format=posix", library).splitlines()
    given = {line.split()[0].partition("@")[0] for line in names} - {"FLUXDEPLOY_0"}
    header = (CPP / "include" / "fluxdeploy" / "fluxdeploy.h").read_text()
    interface = header.partition("#if defined(__cplusplus) &&")[0]
    assert given == set(re.findall(r"\b(fluxdeploy_\w+)\(", interface))


def test_the_command_installed_elsewhere_makes_a_picture(
    prefix: Path, demo_bundle: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "image.png"
    run(str(prefix / "bin" / "fluxdeploy-cpp"), str(demo_bundle), PROMPT, "--seed", "7", "-o", out)
    assert_is(out, wanted)


def test_the_server_makes_what_it_is_asked_and_ends_what_is_cancelled(
    built: Path, demo_bundle: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    jobs = f"1 {PROMPT}\n2 a\n3 b\n4 c\ncancel 4\n"
    program = [str(built / "server"), str(demo_bundle), str(tmp_path)]
    done = subprocess.run(program, input=jobs, capture_output=True, text=True, check=True)
    said = sorted(done.stdout.splitlines())
    assert [line.split()[1] for line in said] == ["done", "done", "done", "cancelled"]
    assert done.stderr == ""
    assert_is(tmp_path / "1.png", wanted)


def test_the_recipes_ask_for_what_the_build_looks_for() -> None:
    build = (CPP / "CMakeLists.txt").read_text()
    wanted = set(re.findall(r"^find_package\((\w+)", build, re.MULTILINE)) - {"Threads"}
    wanted = {{"PNG": "libpng"}.get(name, name) for name in wanted} | {"onnxruntime"}
    port = json.loads((CPP / "packaging/vcpkg/fluxdeploy/vcpkg.json").read_text())
    libraries = {each for each in port["dependencies"] if isinstance(each, str)}
    assert {name.replace("-", "_") for name in libraries} == wanted
    recipe = (CPP / "packaging/conan/conanfile.py").read_text()
    assert set(re.findall(r'"(\w+)/\[>=', recipe)) == wanted
    profile = (CPP / "packaging/conan/system").read_text()
    assert set(re.findall(r"^(\w+)/", profile, re.MULTILINE)) == wanted


def test_the_recipe_takes_along_all_that_the_library_is_built_of() -> None:
    recipe = (CPP / "packaging/conan/conanfile.py").read_text()
    (patterns,) = re.findall(r"for pattern in \((.*)\):", recipe)
    taken = set(re.findall(r'"(\w+)/\*"', patterns))
    assert '"CMakeLists.txt"' in patterns
    build = (CPP / "CMakeLists.txt").read_text()
    named = set(re.findall(r"\b([a-z]+)/[\w*./-]+\.(?:cpp|in|map)\b", build))
    # Programs, which the recipe does not build.
    assert "FLUXDEPLOY_COMMAND" in recipe
    assert named - {"command", "examples", "tests", "fuzz"} <= taken
    assert {"include", "src", "cmake"} <= taken


@pytest.mark.parametrize(
    "path",
    [
        "CMakeLists.txt",
        "include/fluxdeploy/fluxdeploy.h",
        "packaging/vcpkg/fluxdeploy/vcpkg.json",
        "packaging/conan/conanfile.py",
    ],
)
def test_versions_are_the_packages(path: str) -> None:
    pattern = r'(?:VERSION|"version":|version =) "?(\d+\.\d+\.\d+)"?'
    assert re.findall(pattern, (CPP / path).read_text()) == [__version__]
