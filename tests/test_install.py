"""The command that installs an extra: what works where this package came from."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from fluxdeploy import install


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as it is installed in a folder of pip's; `direct_url.json` is yet to be told."""
    module = tmp_path / "site-packages" / "fluxdeploy" / "install.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(install, "__file__", str(module))
    tell(monkeypatch, None)
    return tmp_path


def tell(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    found = SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr(install.importlib.metadata, "distribution", lambda name: found)


def checkout(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    return json.dumps({"url": folder.as_uri(), "dir_info": {}})


def test_from_a_checkout_it_is_the_folder() -> None:
    words = shlex.split(install.install_command("export"))
    assert words[:4] == ["pip", "install", "--editable", ".[export]"]


def test_the_checkout_is_named_where_it_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(install.__file__).parents[1]
    monkeypatch.chdir(root)
    assert install.install_command("rtx") == "pip install --editable '.[rtx]'"
    monkeypatch.chdir(tmp_path)
    assert install.install_command("rtx") == f"pip install --editable '.[rtx]' in {root}"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{}",
        "[]",
        "{broken",
        '{"url": "file:///nowhere/at/all", "dir_info": {}}',
        '{"url": "https://example.org/fluxdeploy-1.whl", "archive_info": {}}',
    ],
)
def test_from_an_index_it_is_the_name(
    site: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    tell(monkeypatch, text)
    assert install.install_command("export") == "pip install 'fluxdeploy[export]'"
    assert install.install_command() == "pip install 'fluxdeploy'"


def test_a_copy_of_a_checkout_is_installed_from_there(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = site / "my source"
    tell(monkeypatch, checkout(source))
    monkeypatch.chdir(source)
    assert install.install_command("gpu") == "pip install '.[gpu]'"


def test_without_a_distribution_it_is_still_told(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> object:
        raise install.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install.importlib.metadata, "distribution", missing)
    assert install.install_command("dev") == "pip install 'fluxdeploy[dev]'"


@pytest.mark.parametrize("extra", ["export", "dev", "gpu", "rtx", "openvino", "tensorrt"])
def test_no_shell_takes_the_brackets_for_a_pattern(extra: str) -> None:
    assert f"'.[{extra}]'" in install.install_command(extra)
